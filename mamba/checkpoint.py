"""Weights on disk -> names and NumPy arrays, and back. Nothing here knows what a Mamba is.

Reading is lazy: ``read_tensors`` returns names, shapes and dtypes at once and each tensor's numbers
when asked, so that a model is never in memory twice. The format written is safetensors (a JSON
header, then raw numbers); read are safetensors, single or in shards, and PyTorch's ``.bin``.
"""

import json
import os
from pathlib import Path, PurePosixPath, PureWindowsPath

import ml_dtypes
import numpy as np
import safetensors.numpy

from mamba.tensors import MAX_METADATA, CheckpointError, Tensor, on_disk, quote
from mamba.torch_bin import read_bin

__all__ = ["CheckpointError", "Tensor", "read_json", "read_tensors", "shard_names", "write_tensors"]


def read_json(path):
    """Read the JSON object in ``path`` -> dict. Raises CheckpointError if it holds none.

    Refused as well: a key that occurs twice (readers differ in which of the two they take), and a
    file larger than what describes a model.
    """
    if os.path.getsize(path) > MAX_METADATA:
        raise CheckpointError(f"{path}: more than {MAX_METADATA} bytes of JSON: no model needs it")
    return _parse_json(path, Path(path).read_bytes())


def _parse_json(path, data):
    def once(pairs):
        found = dict(pairs)
        if len(found) < len(pairs):
            seen = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))
            raise CheckpointError(f"{path}: {quote(twice)} occurs twice in one JSON object")
        return found

    try:
        value = json.loads(data, object_pairs_hook=once)
    except CheckpointError:
        raise
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
    """8 bytes: the header's length; the header, JSON: {name: dtype, shape, place}; the numbers.

    The numbers must follow each other without gap or overlap, up to the end of the file, so the
    tensors take no more memory than the file. Source: the format's description in the README of
    huggingface/safetensors.
    """

    def fail(message):
        raise CheckpointError(f"{path}: not a complete safetensors file: {message}")

    size = os.path.getsize(path)
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        start = 8 + length
        if size < 8 or start > size:
            fail(f"it has {size} bytes, and its header would have {length}")
        if length > MAX_METADATA:
            fail(f"its header has {length} bytes, more than any model needs")
        header = file.read(length)
    try:
        text = header.decode()
    except UnicodeDecodeError:
        fail("its header is not text")
    entries = _parse_json(path, text) if text.startswith("{") else fail("its header is not JSON")
    notes = entries.pop("__metadata__", {})
    if not isinstance(notes, dict) or not all(isinstance(note, str) for note in notes.values()):
        fail("__metadata__ must be an object of strings")
    tensors, spans = {}, []
    for name, entry in entries.items():
        keys = ("dtype", "shape", "data_offsets")
        if not isinstance(entry, dict) or sorted(entry) != sorted(keys):
            fail(f"{quote(name)} must have exactly {', '.join(keys)}")
        kind, shape, place = (entry[key] for key in keys)
        if not isinstance(kind, str) or kind not in _DTYPES:
            raise CheckpointError(f"{path}: {quote(name)} has unsupported dtype {quote(kind)}")
        for numbers in (shape, place):
            if not isinstance(numbers, list) or any(type(n) is not int or n < 0 for n in numbers):
                fail(f"{quote(name)}: expected a list of sizes, found {quote(numbers)}")
        if len(place) != 2:
            fail(f"{quote(name)}: data_offsets must be two numbers, found {quote(place)}")
        tensor = on_disk(path, _DTYPES[kind], start + place[0], tuple(shape))
        if place[1] - place[0] != tensor.nbytes:
            fail(f"{quote(name)}: {quote(shape)} × {kind} do not make the bytes {quote(place)}")
        tensors[name] = tensor
        spans.append((*place, name))
    end = 0
    for begin, after, name in sorted(spans):
        if begin != end:
            fail(f"{quote(name)} begins at byte {quote(begin)}, expected {quote(end)}")
        end = after
    if start + end != size:
        fail(f"its tensors end at byte {quote(start + end)}, the file at {size}")
    return tensors


def shard_names(path):
    """File names that a ``model.safetensors.index.json`` refers to -> sorted list, no paths."""
    return sorted(set(_weight_map(path).values()))


def _weight_map(path):
    mapping = read_json(path).get("weight_map")
    if not isinstance(mapping, dict) or not mapping:
        raise CheckpointError(f"{path}: expected a non-empty object 'weight_map'")
    for name, file in mapping.items():
        # A shard lies beside its index; a path could point at any file of the machine.
        if not isinstance(file, str) or not file.endswith(".safetensors") or not file.isprintable():
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
                f"{file}: not what {path.name} lists; missing: {quote(lacking)}, unexpected: "
                f"{quote(extra)}"
            )
        tensors |= held
    return tensors
