"""Tensors that lie in a file: what every reader of weights returns, and how each one complains."""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np

__all__ = ["MAX_METADATA", "CheckpointError", "Tensor", "on_disk", "quote"]

# What describes the tensors of a file (a pickle, a directory, a header, an index) must be read
# whole. For a thousand tensors it takes 250 kB. What is larger than this describes no model, and
# would only make us allocate: parsed, a byte can become thirty.
MAX_METADATA = 4 * 2**20
MAX_DIMS = 8


class CheckpointError(ValueError):
    """A file is not what a checkpoint must be. The message names the file and what is wrong."""


class Tensor(NamedTuple):
    """A tensor still on disk. ``read()`` -> its numbers, perhaps a read-only view of the file."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    @property
    def nbytes(self):
        """Memory that its numbers take, in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def quote(value):
    """Something from a file, for an error message: however long or odd, one readable line."""
    text = repr(value[:100] if isinstance(value, str) else value)
    cut = len(value) > 100 if isinstance(value, str) else len(text) > 300
    return text[:300] + "…" if cut else text


def on_disk(path, dtype, start, shape, strides=None):
    """The Tensor whose first number lies at byte ``start`` of a file.

    ``strides`` (in numbers, not bytes) say how far apart neighbours along each axis lie; without
    them the numbers follow each other, the last axis fastest. The caller has checked that all of
    them lie in the file. Raises CheckpointError for a shape that no array can have.
    """
    # An empty tensor needs no room in the file, so nothing else bounds its other sizes.
    if len(shape) > MAX_DIMS or (0 in shape and math.prod(n or 1 for n in shape) > 2**31):
        raise CheckpointError(f"{path}: a tensor has the shape {quote(shape)}: no array does")
    dtype = np.dtype(dtype)
    if strides is None:
        strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    return Tensor(shape, dtype, partial(_map, path, dtype, start, shape, strides))


def _map(path, dtype, start, shape, strides):
    """Map the part of the file that a tensor spans into memory: read when used, never copied."""
    if 0 in shape:
        return np.zeros(shape, dtype)
    count = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides))
    try:
        data = np.memmap(path, dtype, "r", start, (count,))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: changed while it was being read: {error}") from error
    strides = [stride * dtype.itemsize for stride in strides]
    return np.lib.stride_tricks.as_strided(data, shape, strides, writeable=False)
