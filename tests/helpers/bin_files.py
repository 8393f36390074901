"""PyTorch's .bin files, written without PyTorch: a pickle made by hand, in a zip archive."""

import struct
import zipfile

import numpy as np

STORAGES = {
    "float64": "DoubleStorage",
    "float32": "FloatStorage",
    "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage",
    "int64": "LongStorage",
}
PROTO, STOP = b"\x80\x02", b"."


def text(value):
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def integer(value):
    if -(2**31) <= value < 2**31:
        return b"J" + struct.pack("<i", value)
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def symbol(module, name):
    return b"c" + f"{module}\n{name}\n".encode()


def tuple_of(*items):
    return b"(" + b"".join(items) + b"t"


def call(function, *arguments):
    return function + tuple_of(*arguments) + b"R"


def storage(key, kind, count):
    identity = (text("storage"), symbol("torch", kind), text(key), text("cpu"), integer(count))
    return tuple_of(*identity) + b"Q"


ORDERED_DICT = symbol("collections", "OrderedDict") + b")R"


def tensor(data, offset, shape, strides):
    return call(
        symbol("torch._utils", "_rebuild_tensor_v2"),
        data,
        integer(offset),
        tuple_of(*map(integer, shape)),
        tuple_of(*map(integer, strides)),
        b"\x89",
        ORDERED_DICT,
    )


def dict_of(items):
    return b"}(" + b"".join(text(name) + value for name, value in items.items()) + b"u"


def write_archive(path, pickled, storages=(), *, compression=zipfile.ZIP_STORED, extra=()):
    """Write a .bin file from a pickle and raw storages, which become data/0, data/1, …"""
    members = [("weights/data.pkl", pickled), ("weights/byteorder", b"little")]
    members += [(f"weights/data/{key}", data) for key, data in enumerate(storages)]
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in [*members, *extra]:
            info = zipfile.ZipInfo(name)
            info.compress_type = compression
            # like PyTorch, start the numbers at a multiple of 64: an extra field fills the gap
            start = archive.fp.tell() + 30 + len(name) + 4
            info.extra = b"FB" + struct.pack("<H", -start % 64) + bytes(-start % 64)
            archive.writestr(info, data)


def write_bin(path, arrays):
    """Write {name: array} as ``torch.save`` would, each in a storage of its own."""
    items, storages = {}, []
    for key, (name, array) in enumerate(arrays.items()):
        array = np.asarray(array)
        strides = [int(np.prod(array.shape[i + 1 :], dtype=int)) for i in range(array.ndim)]
        data = storage(str(key), STORAGES[array.dtype.name], array.size)
        items[name] = tensor(data, 0, array.shape, strides)
        storages.append(array.tobytes())
    write_archive(path, PROTO + dict_of(items) + STOP, storages)
