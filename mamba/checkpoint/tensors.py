"""What all readers of weights share: a tensor that is still on disk, and the errors they raise."""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

__all__ = [
    "MAX_METADATA_BYTES",
    "CheckpointError",
    "Tensor",
    "abridged",
    "compare_tensors",
    "on_disk",
    "quote",
]

# The metadata of a file (its pickle, directory, header or index) must be read as a whole. For a
# thousand tensors it takes 250 kB. More than this describes no model and would only waste memory,
# since one byte can become thirty when it is parsed.
MAX_METADATA_BYTES = 4 * 2**20
MAX_AXES = 8  # of a tensor


class CheckpointError(ValueError):
    """A file is not a valid checkpoint. The message names the file and says what is wrong."""


class Tensor(NamedTuple):
    """A tensor that is still on disk."""

    shape: tuple[int, ...]  # known before a number is read
    dtype: np.dtype  # of the numbers in the file
    read: Callable[[], np.ndarray]  # -> the numbers, perhaps a read-only view of the file

    @property
    def nbytes(self):
        """Size of the numbers in memory, in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def quote(value):
    """A value from a file, as an error message shows it: on one line, and short."""
    text = repr(value[:100] if isinstance(value, str) else value)
    cut = len(value) > 100 if isinstance(value, str) else len(text) > 300
    return text[:300] + "…" if cut else text


def abridged(items, limit):
    """The first ``limit`` strings of a list, then "and 12 more" if there are more."""
    more = len(items) - limit
    return [*items[:limit], f"and {more} more"] if more > 0 else items


def compare_tensors(where, expected, found):
    """Raise CheckpointError unless exactly the expected tensors were found.

    Args:
        where: the file or the argument that holds the tensors; the message begins with it.
        expected: {name: (shape, dtype)}; the dtype jnp.floating admits every floating-point dtype.
        found: {name: (shape, dtype)}.

    Raises:
        CheckpointError: lists all tensors that are missing, unexpected, or of a wrong shape or
            dtype.
    """
    wrong = [f"missing: {name} {expected[name][0]}" for name in expected if name not in found]
    for name, (shape, dtype) in found.items():
        if name not in expected:
            wrong.append(f"unexpected: {quote(name)} {shape}")
            continue
        right_shape, right_dtype = expected[name]
        if shape != right_shape:
            wrong.append(f"wrong shape: {name}: expected {right_shape}, found {shape}")
        elif not jnp.issubdtype(dtype, right_dtype):
            floating = right_dtype is jnp.floating
            kind = "floating point" if floating else np.dtype(right_dtype)
            wrong.append(f"wrong dtype: {name}: expected {kind}, found {dtype}")
    if wrong:
        lines = "\n  ".join(abridged(wrong, 30))
        raise CheckpointError(f"{where}: these are not the tensors of this model\n  {lines}")


def on_disk(path, dtype, start, shape, strides=None):
    """The Tensor whose first number lies at byte ``start`` of a file.

    Args:
        path: the file. The caller has checked that all the numbers lie in it.
        dtype: of the numbers.
        start: byte at which the first number begins.
        shape: of the tensor.
        strides: how many numbers lie between neighbours along each axis. None: the numbers follow
            each other, the last axis fastest.

    Returns:
        A Tensor. Its ``read()`` maps the file into memory and copies nothing.

    Raises:
        CheckpointError: the shape has more or larger axes than any model needs.
    """
    # An empty tensor takes no bytes, so the size of the file does not bound its other axes.
    if len(shape) > MAX_AXES or (0 in shape and math.prod(n or 1 for n in shape) > 2**31):
        raise CheckpointError(
            f"{path}: a tensor has the shape {quote(shape)}, which no model needs"
        )
    dtype = np.dtype(dtype)
    if strides is None:
        strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    return Tensor(shape, dtype, partial(_map, path, dtype, start, shape, strides))


def _map(path, dtype, start, shape, strides):
    """Map the part of the file that a tensor spans into memory -> a read-only view of it."""
    if 0 in shape:
        return np.zeros(shape, dtype)
    count = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides))
    try:
        data = np.memmap(path, dtype, "r", start, (count,))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: changed while it was being read: {error}") from error
    strides = [stride * dtype.itemsize for stride in strides]
    return np.lib.stride_tricks.as_strided(data, shape, strides, writeable=False)
