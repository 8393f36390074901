"""A checkpoint -> the configuration and the parameters of our model.

``names`` says where each tensor goes. Here the file is compared with that table, and its tensors
are converted a few at a time, so that memory holds the model once and little more.
"""

import warnings
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from mamba.checkpoint.files import read_tensors, shard_names
from mamba.checkpoint.hub import CONFIG, WEIGHTS, find_source
from mamba.checkpoint.names import read_config, tensor_table
from mamba.checkpoint.tensors import CheckpointError, abridged, compare_tensors

__all__ = ["load_checkpoint", "read_params"]

CONVERTER_THREADS = 4  # they share the copying and the wait for new memory
CONVERTED_BYTES = 2**20  # in one step, so that it stays in the processor's cache
COMPARED_ROWS = 64  # in one step


def load_checkpoint(name, revision, dtype, cache_dir, shardings=None):
    """Load a folder or a hub repository -> (config, params). See ``Mamba.from_pretrained``.

    Args:
        name: a local folder, or a repository of the hub.
        revision: a branch, tag or commit of the repository; None for its main branch.
        dtype: float32, bfloat16 or float16, of the matrices.
        cache_dir: folder for the hub's files; None for the hub's own cache.
        shardings: see ``read_params``.

    Raises:
        ValueError: another dtype; and (CheckpointError) files that are not a Mamba checkpoint.
        OSError: (FileNotFoundError, ConnectionError, PermissionError) files that cannot be had.
    """
    dtype = jnp.dtype(dtype)
    if dtype not in map(jnp.dtype, (jnp.float32, jnp.bfloat16, jnp.float16)):
        raise ValueError(f"dtype must be float32, bfloat16 or float16, not {dtype}")
    source = find_source(name, revision, cache_dir)
    config = read_config(source.require(CONFIG), dtype)  # before a long download
    weights = source.require(*WEIGHTS)
    if weights.name.endswith(".index.json"):
        for shard in shard_names(weights):
            source.require(shard)
    return config, read_params(weights, config, shardings)


def read_params(path, config, shardings=None):
    """Read the weights at ``path`` -> nested dict of the parameters of Mamba(config).

    Args:
        path: of the file, or of the index of several.
        config: the configuration that they must agree with.
        shardings: a function, the shapes of the parameters -> their shardings, in the same tree.
            Each process then reads only what its own devices hold. None: everything, for JAX's
            default device.

    No memory is allocated before the names, shapes and dtypes of all tensors agree with ``config``.
    NaN and infinity are loaded, with a warning that names the tensors.

    Raises:
        CheckpointError: the tensors do not agree with ``config``, or its embedding and head are
            tied and the file holds another head.
    """
    tensors = read_tensors(path)
    if config.n_layer > len(tensors):  # before a table of so many layers is built
        raise CheckpointError(
            f"{path}: holds {len(tensors)} tensors, too few for the {config.n_layer} layers that "
            "config.json announces"
        )
    scheme = "embeddings" if "backbone.embeddings.weight" in tensors else "embedding"
    specs = tensor_table(config, scheme)
    head = tensors.pop("lm_head.weight", None) if config.tie_embeddings else None
    compare_tensors(
        path,
        {spec.name: (spec.shape, jnp.floating) for spec in specs},
        {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()},
    )
    dtypes = {spec.path: jnp.dtype(jnp.float32 if spec.float32 else config.dtype) for spec in specs}
    layout = dict.fromkeys(dtypes)  # {path: sharding, or None}
    if shardings is not None:
        shapes = {s.path: jax.ShapeDtypeStruct(s.our_shape, dtypes[s.path]) for s in specs}
        layout = flatten_dict(shardings(unflatten_dict(shapes, sep=".")), sep=".")
    if head is not None:
        _check_tied(path, head, tensors[specs[0].name], layout[specs[0].path])

    def convert(spec):
        finite, sharding = [], layout[spec.path]

        def part(index):
            values, dtype = tensors[spec.name].read(), dtypes[spec.path]
            array, good = _convert(values, spec, dtype, index)
            finite.append(good)
            return array

        if sharding is None:
            array = jax.device_put(part(...))
        else:
            array = jax.make_array_from_callback(spec.our_shape, sharding, part)
        return array, all(finite)

    with ThreadPoolExecutor(CONVERTER_THREADS) as pool:
        arrays = list(pool.map(convert, specs))
    not_finite = [spec.name for spec, (_, finite) in zip(specs, arrays, strict=True) if not finite]
    if not_finite:
        names = ", ".join(abridged(not_finite, 10))
        warnings.warn(f"{path}: NaN or infinity in {names}", stacklevel=4)
    params = {spec.path: array for spec, (array, _) in zip(specs, arrays, strict=True)}
    return unflatten_dict(params, sep=".")


def _convert(values, spec, dtype, index=...):
    """A part of a tensor of a file -> (our array, whether all its numbers are finite).

    index: of the part, in our array; ...: all of it.

    The array is a copy, because the file may be mapped into memory and may change or go away. It
    begins at a multiple of 64 bytes, so that JAX on a CPU uses it as it is, without another copy.
    """
    if spec.transpose:
        values = values.reshape(spec.shape[0], spec.shape[-1])
    values = values[index[::-1] if spec.transpose and index is not ... else index]
    nbytes = values.size * dtype.itemsize
    memory = np.empty(nbytes + 64, np.uint8)
    begin = -memory.ctypes.data % 64
    shape = values.shape[::-1] if spec.transpose else values.shape
    array = memory[begin : begin + nbytes].view(dtype).reshape(shape)
    target, finite = array.T if spec.transpose else array, True
    step = max(1, CONVERTED_BYTES // (values[:1].size * dtype.itemsize))
    for start in range(0, len(values), step):
        with np.errstate(over="ignore"):  # an infinity is reported with the tensor's name
            rows = values[start : start + step].astype(dtype)
        finite &= bool(np.isfinite(rows).all())
        target[start : start + step] = rows
    return array, finite


def _check_tied(path, head, embedding, sharding):
    """Raise CheckpointError if a tied checkpoint holds a head that differs from the embedding.

    sharding: of the embedding; with one, the parts are compared that this process holds.

    A configuration that says nothing means a tied head, in the original code as in transformers. So
    it does here, and the weights are not used to guess what was meant.
    """
    parts = [...]
    if sharding is not None:
        parts = sharding.addressable_devices_indices_map(embedding.shape).values()
    if head.shape != embedding.shape or not all(
        _equal(head.read()[part], embedding.read()[part]) for part in parts
    ):
        raise CheckpointError(
            f"{path}: lm_head.weight differs from the embedding, but config.json ties the two (it "
            "does so too when it says nothing). If the head is meant to be separate, set "
            "tie_embeddings (in transformers' naming tie_word_embeddings) to false there"
        )


def _equal(a, b):
    """Whether two large arrays hold the same numbers, without a third one in memory."""
    steps = [slice(start, start + COMPARED_ROWS) for start in range(0, len(a), COMPARED_ROWS)]
    if a.dtype == b.dtype and all(a[rows].tobytes() == b[rows].tobytes() for rows in steps):
        return True  # the bits are equal, which is quick to see
    return all(np.array_equal(a[rows], b[rows], equal_nan=True) for rows in steps)
