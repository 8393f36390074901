"""Files of weights -> names and NumPy arrays, and back. Nothing here knows what a Mamba is.

Reading is lazy: ``read_tensors`` returns names, shapes and dtypes at once, and reads the numbers of
a tensor when they are asked for. So a model is never in memory twice. It reads safetensors (a JSON
header, then raw numbers), in one file or in shards, and PyTorch's ``.bin``. We write safetensors.
"""

import contextlib
import json
import os
from pathlib import Path, PurePosixPath, PureWindowsPath

import ml_dtypes
import numpy as np
import safetensors.numpy

from mamba.checkpoint.tensors import MAX_METADATA_BYTES, CheckpointError, on_disk, quote
from mamba.checkpoint.torch_bin import read_bin

__all__ = [
    "read_json",
    "read_tensors",
    "shard_names",
    "sync_to_disk",
    "write_atomically",
    "write_tensors",
]

_DTYPES = {  # as safetensors names them
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


def read_tensors(path):
    """Open a weights file of any supported kind -> {name: Tensor}; the numbers stay on disk.

    Args:
        path: a ``.safetensors`` file, a ``.safetensors.index.json`` whose shards lie in the same
            folder, or a PyTorch ``.bin``.

    Raises:
        CheckpointError: the file is broken.
        FileNotFoundError: there is no such file, or a shard is missing.
    """
    path = Path(path)
    if path.name.endswith(".index.json"):
        return _read_shards(path)
    if path.exists() and not path.is_file():  # to open a pipe would wait for ever
        kind = "a folder" if path.is_dir() else "a pipe or a device"
        raise CheckpointError(f"{path}: {kind}, not a file")
    with open(path, "rb") as file:
        start = file.read(40)
    named_safetensors = path.suffix == ".safetensors"
    if start.startswith(b"version https://git-lfs.github.com"):
        raise CheckpointError(f"{path}: a Git LFS pointer, not the weights: run `git lfs pull`")
    if named_safetensors and start.startswith(b"PK\3\4"):
        raise CheckpointError(f"{path}: holds PyTorch's format: rename it to pytorch_model.bin")
    if not named_safetensors and start[8:9] == b"{":
        raise CheckpointError(f"{path}: is a safetensors file: rename it to model.safetensors")
    return _read_safetensors(path) if named_safetensors else read_bin(path)


def write_tensors(path, arrays):
    """Write {name: array} as a safetensors file. Arrays may be bfloat16 (ml_dtypes)."""
    # The library writes memory as it lies, so an array in another order would come back shuffled.
    contiguous = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    path = Path(path)
    path.touch()
    mode = path.stat().st_mode
    # Other readers look for this entry. The bytes are the same for every framework.
    safetensors.numpy.save_file(contiguous, str(path), metadata={"format": "pt"})
    path.chmod(mode)  # newer versions of the library write files that other users cannot read


# ------------------------------------------------------------------------------ writing safely


@contextlib.contextmanager
def write_atomically(path):
    """Replace a file such that an interruption leaves the old content or all of the new.

        with write_atomically(path) as part:
            part.write_bytes(data)

    The block writes the new content to ``part``, a path in the same folder. When the block ends,
    the content is on disk and has the name ``path``. If the block raises, ``part`` is removed.
    """
    path = Path(path)
    part = path.with_name(path.name + ".part")
    part.unlink(missing_ok=True)  # a link there could lead to any file
    try:
        yield part
        sync_to_disk(part)
        os.replace(part, path)
        sync_to_disk(path.parent)
    finally:
        part.unlink(missing_ok=True)


def sync_to_disk(path):
    """Wait until a file, or the list of names in a folder, has reached the disk itself."""
    folder = path.is_dir()
    if folder and os.name == "nt":
        return  # Windows cannot open a folder
    descriptor = os.open(path, os.O_RDONLY if folder else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ------------------------------------------------------------------------------ JSON and shards


def read_json(path):
    """Read the JSON object in ``path`` -> dict.

    Raises:
        CheckpointError: the file holds no JSON object, or it is larger than a model's description
            can be, or a key occurs twice (readers differ in which of the two values they take).
    """
    if os.path.getsize(path) > MAX_METADATA_BYTES:
        raise CheckpointError(
            f"{path}: more than {MAX_METADATA_BYTES} bytes of JSON, which no model needs"
        )
    return _parse_json(path, Path(path).read_bytes())


def _parse_json(path, data):
    def without_duplicates(pairs):
        found = {}
        for key, value in pairs:
            if key in found:
                raise CheckpointError(f"{path}: {quote(key)} occurs twice in one JSON object")
            found[key] = value
        return found

    try:
        value = json.loads(data, object_pairs_hook=without_duplicates)
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def shard_names(path):
    """The file names that a ``model.safetensors.index.json`` refers to -> sorted list, no paths."""
    return sorted(set(_weight_map(path).values()))


def _weight_map(path):
    """The {tensor: file name} of an index; each name is that of a file beside it."""
    mapping = read_json(path).get("weight_map")
    if not isinstance(mapping, dict) or not mapping:
        raise CheckpointError(f"{path}: expected a non-empty object 'weight_map'")
    for name, file in mapping.items():
        if not isinstance(file, str) or not file.endswith(".safetensors") or not file.isprintable():
            raise CheckpointError(
                f"{path}: {quote(name)}: expected the name of a .safetensors file"
            )
        # A path could point at any file of the machine.
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
            missing, unexpected = sorted(listed - held.keys()), sorted(held.keys() - listed)
            raise CheckpointError(
                f"{file}: does not hold the tensors that {path.name} lists; missing: "
                f"{quote(missing)}, unexpected: {quote(unexpected)}"
            )
        tensors |= held
    return tensors


# ------------------------------------------------------------------------------ safetensors


def _read_safetensors(path):
    """Read a header -> {name: Tensor}.

    The file is the length of the header in 8 bytes, then the header, a JSON object
    {name: {dtype, shape, data_offsets}}, then the numbers.

    Source: the README of huggingface/safetensors. The library itself would copy every tensor before
    we convert it, take up to 900 MB to parse a header, and keep the second of two equal names.
    """
    size = os.path.getsize(path)
    header, start = _read_header(path, size)
    notes = header.pop("__metadata__", {})
    if not isinstance(notes, dict) or not all(isinstance(note, str) for note in notes.values()):
        raise _incomplete(path, "__metadata__ must be an object of strings")
    tensors, spans = {}, []
    for name, entry in header.items():
        tensors[name], begin, end = _read_entry(path, start, name, entry)
        spans.append((begin, end, name))
    # The numbers follow each other without gap or overlap, up to the end of the file. So the
    # tensors take no more memory than the file.
    expected = 0
    for begin, end, name in sorted(spans):
        if begin != expected:
            message = f"{quote(name)} begins at byte {quote(begin)}, expected {quote(expected)}"
            raise _incomplete(path, message)
        expected = end
    if start + expected != size:
        message = f"its tensors end at byte {quote(start + expected)}, the file at {size}"
        raise _incomplete(path, message)
    return tensors


def _read_header(path, size):
    """-> (the header as a dict, the byte at which the numbers begin)."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        start = 8 + length
        if size < 8 or start > size:
            raise _incomplete(path, f"it has {size} bytes, and its header would have {length}")
        if length > MAX_METADATA_BYTES:
            raise _incomplete(path, f"its header has {length} bytes, more than any model needs")
        data = file.read(length)
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise _incomplete(path, "its header is not text") from error
    if not text.startswith("{"):
        raise _incomplete(path, "its header is not JSON")
    return _parse_json(path, text), start


def _read_entry(path, start, name, entry):
    """An entry of the header -> (Tensor, its first byte, the byte after its last)."""
    keys = ("dtype", "shape", "data_offsets")
    if not isinstance(entry, dict) or sorted(entry) != sorted(keys):
        raise _incomplete(path, f"{quote(name)} must have exactly {', '.join(keys)}")
    kind, shape, offsets = (entry[key] for key in keys)
    if not isinstance(kind, str) or kind not in _DTYPES:
        raise CheckpointError(f"{path}: {quote(name)} has unsupported dtype {quote(kind)}")
    for numbers in (shape, offsets):
        if not isinstance(numbers, list) or any(type(n) is not int or n < 0 for n in numbers):
            message = f"{quote(name)}: expected a list of sizes, found {quote(numbers)}"
            raise _incomplete(path, message)
    if len(offsets) != 2:
        message = f"{quote(name)}: data_offsets must be two numbers, found {quote(offsets)}"
        raise _incomplete(path, message)
    begin, end = offsets
    tensor = on_disk(path, _DTYPES[kind], start + begin, tuple(shape))
    if end - begin != tensor.nbytes:
        message = f"{quote(name)}: {quote(shape)} × {kind} does not fill the bytes {quote(offsets)}"
        raise _incomplete(path, message)
    return tensor, begin, end


def _incomplete(path, message):
    return CheckpointError(f"{path}: not a complete safetensors file: {message}")
