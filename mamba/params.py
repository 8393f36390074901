"""The tensors of a weights file -> the parameters of our model: every one of them, piece by piece.

Which tensor goes where is the table of ``naming``. Here the file is held against it, and the
numbers are turned and copied, so that memory holds the model and a little more.
"""

import math
import warnings
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from mamba.checkpoint import CheckpointError, quote, read_tensors
from mamba.naming import tensor_table

__all__ = ["compare_tensors", "read_params"]

THREADS = 4  # NumPy copies in parallel; new memory, too, is quicker had by several at once
BLOCK = 2**20  # bytes: what is converted at a time stays in the processor's cache


def read_params(path, config):
    """Read the weights at ``path`` -> nested dict of the parameters of Mamba(config).

    Nothing is allocated before names, shapes and kinds of all tensors agree with ``config``. Raises
    CheckpointError if they do not, or if a tied model's file holds another head. Warns of NaN and
    infinity, by the tensor's name.
    """
    tensors = read_tensors(path)
    if config.n_layer > len(tensors):  # before we build a table of that many rows
        raise CheckpointError(
            f"{path}: holds {len(tensors)} tensors, too few for the {config.n_layer} layers that "
            "config.json announces"
        )
    scheme = "embeddings" if "backbone.embeddings.weight" in tensors else "embedding"
    rows = tensor_table(config, scheme)
    head = tensors.pop("lm_head.weight", None) if config.tie_embeddings else None
    compare_tensors(
        path,
        {row.name: row.shape for row in rows},
        {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()},
    )
    if head is not None:
        _check_tied(path, head, tensors[rows[0].name])

    def convert(row):
        dtype = jnp.float32 if row.float32 else config.dtype
        array, finite = _convert(tensors[row.name].read(), row, jnp.dtype(dtype))
        return jax.device_put(array), finite

    with ThreadPoolExecutor(THREADS) as pool:
        arrays = list(pool.map(convert, rows))
    odd = [row.name for row, (_, finite) in zip(rows, arrays, strict=True) if not finite]
    if odd:
        warnings.warn(f"{path}: NaN or infinity in {', '.join(_first(odd, 10))}", stacklevel=3)
    params = {row.path: array for row, (array, _) in zip(rows, arrays, strict=True)}
    return unflatten_dict(params, sep=".")


def _convert(values, row, dtype):
    """A tensor of a file -> (our array, whether all its numbers are finite).

    The array is a copy of our own: the file may be mapped into memory, and may change or go away.
    It begins at a multiple of 64 bytes, so that JAX on a CPU takes it as it is, without another.
    """
    if row.transpose:
        values = values.reshape(row.shape[0], row.shape[-1])
    nbytes = math.prod(row.shape) * dtype.itemsize
    memory = np.empty(nbytes + 64, np.uint8)
    begin = -memory.ctypes.data % 64
    array = memory[begin : begin + nbytes].view(dtype).reshape(row.our_shape)
    target, finite = array.T if row.transpose else array, True
    step = max(1, BLOCK // (values[:1].size * dtype.itemsize))
    for start in range(0, len(values), step):
        with np.errstate(over="ignore"):  # an infinity is reported with the tensor's name
            block = values[start : start + step].astype(dtype)
        finite &= bool(np.isfinite(block).all())
        target[start : start + step] = block
    return array, finite


def compare_tensors(where, expected, found):
    """Raise CheckpointError unless the tensors found, {name: (shape, dtype)}, are those expected.

    ``expected``: {name: shape}. The dtype may be any floating point. The error lists what is wrong.
    """
    wrong = [f"missing: {name} {shape}" for name, shape in expected.items() if name not in found]
    for name, (shape, dtype) in found.items():
        if name not in expected:
            wrong.append(f"unexpected: {_shown(name)} {shape}")
        elif shape != expected[name]:
            wrong.append(f"wrong shape: {name}: expected {expected[name]}, found {shape}")
        elif not jnp.issubdtype(dtype, jnp.floating):
            wrong.append(f"wrong dtype: {name}: expected floating point, found {dtype}")
    if wrong:
        lines = "\n  ".join(_first(wrong, 30))
        raise CheckpointError(f"{where}: not the tensors that the configuration needs\n  {lines}")


def _shown(name):
    """A name from a file: as it is, unless it would spoil the message."""
    return name if name.isprintable() and len(name) <= 100 else quote(name)


def _first(items, most):
    """The first of a list, and how many more there are."""
    more = len(items) - most
    return [*items[:most], f"and {more} more"] if more > 0 else items


def _check_tied(path, head, embedding):
    """A tied checkpoint may repeat the embedding as its head; with another head it is ambiguous.

    Tied is what the original code and transformers both assume when a configuration is silent, so
    we assume it too, and do not guess from the weights which of the two was meant.
    """
    if head.shape != embedding.shape or not _equal(head.read(), embedding.read()):
        raise CheckpointError(
            f"{path}: lm_head.weight differs from the embedding, but config.json ties the two (as "
            "it does when it says nothing). If the head is meant to be separate, set "
            "tie_embeddings (in transformers' naming tie_word_embeddings) to false there"
        )


def _equal(a, b, rows=64):
    """Whether two large arrays hold the same numbers; in pieces, so that no third one is made."""
    pieces = [slice(start, start + rows) for start in range(0, len(a), rows)]
    if a.dtype == b.dtype and all(a[piece].tobytes() == b[piece].tobytes() for piece in pieces):
        return True  # bit for bit, which is quickly seen
    return all(np.array_equal(a[piece], b[piece], equal_nan=True) for piece in pieces)
