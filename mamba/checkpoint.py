"""Weights on disk -> names and NumPy arrays, and back. Nothing here knows what a Mamba is.

Reading is lazy: ``read_tensors`` returns names, shapes and dtypes at once and each tensor's numbers
when asked, so that a model is never in memory twice. The format written is safetensors (a JSON
header, then raw numbers); read are safetensors, single or in shards, and PyTorch's ``.bin``.
"""

import json
from functools import partial
from pathlib import Path, PurePosixPath, PureWindowsPath

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from mamba.torch_bin import CheckpointError, Tensor, quote, read_bin

__all__ = ["CheckpointError", "Tensor", "read_json", "read_tensors", "shard_names", "write_tensors"]


def read_json(path):
    """Read the JSON object in ``path`` -> dict. Raises CheckpointError if it holds none."""
    try:
        value = json.loads(Path(path).read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def read_tensors(path):
    """Open a weights file of any supported kind -> {name: Tensor}; the numbers stay on disk.

    ``path``: a ``.safetensors`` file, a ``.safetensors.index.json`` (its shards lie in the same
    folder) or a PyTorch ``.bin``. Raises CheckpointError for a broken file, FileNotFoundError for
    an absent one.
    """
    path = Path(path)
    if path.name.endswith(".index.json"):
        return _read_shards(path)
    with open(path, "rb") as file:
        if file.read(40).startswith(b"version https://git-lfs.github.com"):
            raise CheckpointError(f"{path}: a Git LFS pointer, not the weights: run `git lfs pull`")
    return _read_safetensors(path) if path.suffix == ".safetensors" else read_bin(path)


def write_tensors(path, arrays):
    """Write {name: array} as a safetensors file. Arrays may be bfloat16 (ml_dtypes)."""
    # The library writes memory as it lies: an array in another order would come back shuffled.
    contiguous = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    # Other readers look for this entry; the bytes are the same for every framework.
    safetensors.numpy.save_file(contiguous, str(path), metadata={"format": "pt"})


_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}


def _read_safetensors(path):
    tensors = {}
    try:
        with safetensors.safe_open(str(path), "np") as file:
            for name in file.keys():  # noqa: SIM118 (it is not a dict)
                entry = file.get_slice(name)
                kind = entry.get_dtype()
                if kind not in _DTYPES:
                    raise CheckpointError(f"{path}: {quote(name)} has unsupported dtype {kind}")
                read = partial(_read_safetensor, path, name)
                tensors[name] = Tensor(tuple(entry.get_shape()), np.dtype(_DTYPES[kind]), read)
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{path}: not a complete safetensors file: {error}") from error
    return tensors


def _read_safetensor(path, name):
    # Opened anew for each tensor: the library maps the whole file, and the pages once read would
    # otherwise stay in memory beside the parameters until the last tensor is done.
    with safetensors.safe_open(str(path), "np") as file:
        return file.get_tensor(name)


def shard_names(path):
    """File names that a ``model.safetensors.index.json`` refers to -> sorted list, no paths."""
    return sorted(set(_weight_map(path).values()))


def _weight_map(path):
    mapping = read_json(path).get("weight_map")
    if not isinstance(mapping, dict) or not mapping:
        raise CheckpointError(f"{path}: expected a non-empty object 'weight_map'")
    for name, file in mapping.items():
        # A shard lies beside its index; a path could point at any file of the machine.
        if not isinstance(file, str) or not file.endswith(".safetensors") or "\0" in file:
            raise CheckpointError(
                f"{path}: {quote(name)}: expected the name of a .safetensors file"
            )
        if not PurePosixPath(file).name == PureWindowsPath(file).name == file:
            raise CheckpointError(
                f"{path}: {quote(name)}: {quote(file)} is a path, not a file name"
            )
    return mapping


def _read_shards(path):
    mapping = _weight_map(path)
    tensors = {}
    for shard in sorted(set(mapping.values())):
        file = path.parent / shard
        if not file.is_file():
            raise FileNotFoundError(
                f"{file}: missing, though {path.name} lists it: download it too"
            )
        held = read_tensors(file)
        listed = {name for name, other in mapping.items() if other == shard}
        if listed != held.keys():
            lacking, extra = sorted(listed - held.keys()), sorted(held.keys() - listed)
            raise CheckpointError(
                f"{file}: not what {path.name} lists; missing: {lacking}, unexpected: {extra}"
            )
        tensors |= held
    return tensors
