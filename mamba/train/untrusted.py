"""Whether a folder can be the save of a run: looked at before Orbax reads it.

A save may come from a stranger. What is read here are names, sizes and two small kinds of JSON, so
a refusal takes neither long nor much memory; and what passes holds exactly the bytes of the arrays
that are expected, uncompressed, so that reading it takes no more than these.
"""

import itertools
import math
import os
import stat
from pathlib import Path

import numpy as np

from mamba.checkpoint.files import read_json

__all__ = ["check_save"]

MAX_NOTES_BYTES = 64 * 2**20  # of all files that hold no numbers
MAX_NOTES = 1000  # number of these files
MAX_FILES = 200_000
MAX_ROWS = 2**31  # of an array whose rows are not known
KINDS = ("jax.Array", "np.ndarray", "scalar")  # as Orbax calls them


def check_save(folder, expected):
    """Raise ValueError unless a folder holds exactly the expected arrays, in plain files.

    Args:
        folder: of one save.
        expected: {name: (shape, dtype)}; a shape may begin with None, for any number of rows.
    """
    files = _regular_files(folder)  # {path in the folder: bytes}
    numbers = {}
    for name, (shape, dtype) in expected.items():
        numbers |= _check_array(folder, name, shape, dtype, files)
    if {path: files.get(path) for path in numbers} != numbers:
        raise ValueError("files of numbers are missing, or have another size")
    notes = files.keys() - numbers.keys()
    if len(notes) > MAX_NOTES + len(expected) or sum(files[n] for n in notes) > MAX_NOTES_BYTES:
        raise ValueError("it is larger than the save of this run can be")
    if any("ocdbt" in path for path in files):
        raise ValueError("it is of another kind (OCDBT)")
    _check_metadata(folder, expected)


def _regular_files(folder):
    """{path in the folder: its size}, of everything in it that is no folder."""
    files = {}
    if not stat.S_ISDIR(os.lstat(folder).st_mode):
        raise ValueError("it is no folder")
    for parent, folders, names in os.walk(folder):
        for name in [*folders, *names]:
            path = Path(parent, name)
            mode = os.lstat(path).st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                raise ValueError(f"{path.name!r} is neither a file nor a folder")
            if stat.S_ISREG(mode):
                files[path.relative_to(folder).as_posix()] = os.lstat(path).st_size
        if len(files) > MAX_FILES:
            raise ValueError("it has more files than the save of a run can have")
    return files


def _check_array(folder, name, shape, dtype, files):
    """-> {path: size} of the files that hold the numbers."""
    notes = f"arrays/{name}/.zarray"
    if notes not in files:
        raise ValueError(f"{name} is missing")
    zarr = read_json(Path(folder, notes))
    found, chunk = zarr.get("shape"), zarr.get("chunks")
    for sizes in (found, chunk):
        if not isinstance(sizes, list) or any(type(n) is not int or n < 0 for n in sizes):
            raise ValueError(f"{name} has no shape")
    rows_free = bool(shape) and shape[0] is None
    if len(found) != len(shape) or found[rows_free:] != list(shape[rows_free:]):
        raise ValueError(f"{name} has the shape {tuple(found)}, not {tuple(shape)}"[:200])
    if len(chunk) != len(found) or any(not 1 <= c <= max(n, 1) for c, n in zip(chunk, found)):
        raise ValueError(f"{name} is divided into parts of another shape")
    if rows_free and found[0] > MAX_ROWS:
        raise ValueError(f"{name} has {found[0]} rows")
    expected = {"compressor": None, "filters": None, "order": "C", "zarr_format": 2}
    if {key: zarr.get(key, "missing") for key in expected} != expected:
        raise ValueError(f"{name} is stored in another form")
    if zarr.get("dtype") not in (dtype.str, dtype.name):
        raise ValueError(f"{name} has another dtype than {dtype}")
    separator = zarr.get("dimension_separator", ".")
    if separator not in (".", "/"):
        raise ValueError(f"{name} is stored in another form")
    parts = [-(-n // c) for n, c in zip(found, chunk)]
    if math.prod(parts) > len(files):
        raise ValueError(f"parts of {name} are missing")
    nbytes = math.prod(chunk) * np.dtype(dtype).itemsize
    indices = itertools.product(*map(range, parts))
    places = [separator.join(map(str, index)) or "0" for index in indices]
    return {f"arrays/{name}/{place}": nbytes for place in places}


def _check_metadata(folder, expected):
    """Whether Orbax's own description of the tree is that of the expected arrays."""
    notes = read_json(Path(folder, "arrays", "_METADATA"))
    if notes.get("use_zarr3") or notes.get("use_ocdbt"):
        raise ValueError("it is of another kind (Zarr 3 or OCDBT)")
    tree = notes.get("tree_metadata")
    if not isinstance(tree, dict) or len(tree) != len(expected):
        raise ValueError("it describes other arrays")
    for entry in tree.values():
        keys = [key.get("key") for key in entry["key_metadata"]]
        value = entry["value_metadata"]
        if len(keys) != 1 or keys[0] not in expected or value.get("value_type") not in KINDS:
            raise ValueError("it describes other arrays")
