"""What tests of broken files need: valid small files, and what holds for every file."""

import io
import pickle
import struct
import warnings
import zipfile

import numpy as np

from mamba.checkpoint.files import read_tensors
from mamba.checkpoint.tensors import CheckpointError
from tests.helpers import bin_files as b

KINDS = dict(b.STORAGES) | {
    "int32": "IntStorage",
    "int16": "ShortStorage",
    "int8": "CharStorage",
    "uint8": "ByteStorage",
    "bool": "BoolStorage",
}


class FakeTorch:
    """Python's own pickler, made to write what PyTorch writes for a ``state_dict``.

    ``dumps({name: (key, kind, count, offset, shape, strides)}, protocol)`` pickles objects that
    refer to PyTorch's functions by their names. PyTorch itself is not needed.
    """

    class Named:
        def __init__(self, module, name):
            self.module, self.name = module, name

    class Call:
        def __init__(self, function, *arguments):
            self.function, self.arguments = function, arguments

    class Storage:
        def __init__(self, key, kind, count):
            self.identity = (key, kind, count)

    @classmethod
    def dumps(cls, items, protocol, parameters=()):
        class Pickler(pickle._Pickler):  # Python's, because it lets us write any global
            def persistent_id(self, value):
                if isinstance(value, cls.Storage):
                    key, kind, count = value.identity
                    return ("storage", cls.Named("torch", kind), key, "cpu", count)
                return None

            def save(self, value, save_persistent_id=True):
                if isinstance(value, cls.Named):
                    if self.proto >= 4:
                        self.save(value.module)
                        self.save(value.name)
                        return self.write(pickle.STACK_GLOBAL)
                    return self.write(f"c{value.module}\n{value.name}\n".encode())
                if isinstance(value, cls.Call):
                    self.save(value.function)
                    self.save(value.arguments)
                    return self.write(pickle.REDUCE)
                return super().save(value, save_persistent_id)

        ordered = cls.Call(cls.Named("collections", "OrderedDict"))
        state = {}
        for name, (key, kind, count, offset, shape, strides) in items.items():
            rebuild = cls.Named("torch._utils", "_rebuild_tensor_v2")
            data = cls.Storage(key, kind, count)
            value = cls.Call(rebuild, data, offset, tuple(shape), tuple(strides), False, ordered)
            if name in parameters:
                rebuild = cls.Named("torch._utils", "_rebuild_parameter")
                value = cls.Call(rebuild, value, True, ordered)
            state[name] = value
        buffer = io.BytesIO()
        Pickler(buffer, protocol).dump(state)
        return buffer.getvalue()


def outcome(path):
    """Read a file -> {name: array}, or the CheckpointError. Any other exception is a bug.

    Checks what holds in either case: the error names the file and is short; an array has the shape
    and dtype announced, and all together take no more than twice the size of the file.
    """
    size = path.stat().st_size
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            tensors = read_tensors(path)
            arrays = {name: tensor.read() for name, tensor in tensors.items()}
    except CheckpointError as error:
        assert str(error).startswith(f"{path}: "), str(error)[:300]
        assert len(str(error)) < 2000 and len(str(error).partition(": ")[2]) > 5
        return error
    assert sum(array.nbytes for array in arrays.values()) <= 2 * size
    for name, tensor in tensors.items():
        array = arrays[name]
        assert isinstance(name, str) and type(array) is np.ndarray
        assert (array.shape, array.dtype) == (tensor.shape, tensor.dtype)
        array.tobytes()  # every number is there
    return arrays


def refused(path, *parts):
    """Check that the file is refused, and that the reason has these parts -> the message."""
    error = outcome(path)
    assert isinstance(error, CheckpointError), "it was read"
    reason = str(error).removeprefix(f"{path}: ")
    for part in parts:
        assert part in reason, reason
    return str(error)


def identical(found, expected):
    """Whether two dicts of arrays are the same, bit for bit."""
    return found.keys() == expected.keys() and all(
        found[name].dtype == array.dtype
        and found[name].shape == array.shape
        and found[name].tobytes() == array.tobytes()
        for name, array in expected.items()
    )


def safetensors(header, data=b""):
    """A safetensors file from the header's bytes and the numbers' bytes."""
    return struct.pack("<Q", len(header)) + header + data


def structure(data):
    """Bytes of a zip archive that are neither numbers nor pickle: its headers and directory."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        infos = archive.infolist()
        directory = archive.start_dir
    spots = list(range(directory, len(data)))
    for info in infos:
        start = info.header_offset
        name_length, _ = struct.unpack("<HH", data[start + 26 : start + 30])
        spots += range(start, start + 30 + name_length)
    return spots
