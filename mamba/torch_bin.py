"""PyTorch's ``pytorch_model.bin`` -> names and NumPy arrays, without PyTorch or unpickling.

The file is a zip archive that holds a pickle (``*/data.pkl``: names, shapes, strides) and one raw
file per storage (``*/data/<key>``: the numbers). A pickle is a program, and unpickling runs it. So
we do not unpickle: we walk the opcodes, know only those that a dict of tensors needs, and treat the
names of functions as symbols. No file can make this code call anything, or read outside its
storages.

Sources: Python's ``pickletools`` (what each opcode does) and ``zipfile``; PyTorch's notes on
serialization.
"""

import io
import math
import pickletools
import struct
import zipfile
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import ml_dtypes
import numpy as np

__all__ = ["CheckpointError", "Tensor", "read_bin"]

# A state dict of a thousand tensors pickles to 250 kB; its zip directory is smaller still. What is
# larger than this is no state dict, and would only make us allocate.
MAX_METADATA = 16 * 2**20
MAX_DIMS = 8


class CheckpointError(ValueError):
    """A file is not what a checkpoint must be. The message names the file and what is wrong."""


class Tensor(NamedTuple):
    """A tensor still on disk. ``read()`` -> its numbers, perhaps a read-only view of the file."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]


def quote(name):
    """A name from a file, for an error message: however long, the message stays readable."""
    return repr(name if len(name) <= 100 else name[:100] + "…")


def read_bin(path):
    """Open a file written by ``torch.save(model.state_dict(), path)`` -> {name: Tensor}.

    Shapes and dtypes are known at once; each tensor's numbers are read when asked for. Raises
    CheckpointError for anything but a dict of tensors, FileNotFoundError for an absent file.
    """
    with open(path, "rb") as file:
        if file.read(len(_LEGACY_START)) == _LEGACY_START:
            raise CheckpointError(
                f"{path}: PyTorch's format from before version 1.6. Convert it where PyTorch is "
                "installed: torch.save(torch.load(file, weights_only=True), file)"
            )
    members = _zip_members(path)
    pickles = [name for name in members if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise CheckpointError(f"{path}: expected one */data.pkl inside, found {len(pickles)}")
    prefix = pickles[0].removesuffix("data.pkl")

    def small(name):
        offset, size = members[name]
        if size > MAX_METADATA:
            raise CheckpointError(f"{path}: {quote(name)} has {size} bytes: no state dict does")
        with open(path, "rb") as file:
            file.seek(offset)
            return file.read(size)

    if prefix + "byteorder" in members and small(prefix + "byteorder") != b"little":
        raise CheckpointError(f"{path}: big-endian numbers; only little-endian files are supported")
    storages = {name.removeprefix(prefix + "data/"): span for name, span in members.items()}
    return _StateDict(path, storages).interpret(small(pickles[0]))


# ------------------------------------------------------------------------------- the zip archive

# How torch.save began its files before version 1.6 (protocol 2, then a magic number).
_LEGACY_START = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19."


class _ShortReads(io.FileIO):
    """A file for ``zipfile`` that refuses to read a directory of absurd size in one piece."""

    def read(self, size=-1):
        if size > MAX_METADATA:
            raise CheckpointError(f"its directory has {size} bytes, more than any state dict's")
        return super().read(size)


def _zip_members(path):
    """Members of a zip archive -> {name: (offset, size)}: stored plain, disjoint, in the file."""
    spans, members = [], {}
    with _ShortReads(path) as file:
        try:
            infos = zipfile.ZipFile(file).infolist()
        except Exception as error:  # zipfile meets broken input with exceptions of many kinds
            raise CheckpointError(f"{path}: not a PyTorch file (a zip archive): {error}") from error
        total = file.seek(0, io.SEEK_END)
        for info in infos:
            name, size, start = info.filename, info.file_size, info.header_offset
            told = f"{path}: member {quote(name)}"
            plain = info.compress_type == zipfile.ZIP_STORED and not info.flag_bits & 1
            if not plain or size != info.compress_size:
                raise CheckpointError(f"{told} is compressed or encrypted; PyTorch does neither")
            if name in members:
                raise CheckpointError(f"{told} occurs twice")
            # The directory gives the place of the member's own header, which ends with the lengths
            # of two fields of variable size; the data come after those.
            header = b""
            if 0 <= start <= total - 30:
                file.seek(start)
                header = file.read(30)
            if header[:4] != b"PK\3\4":
                raise CheckpointError(f"{told} is not where the archive's directory says")
            offset = start + 30 + sum(struct.unpack("<HH", header[26:30]))
            if offset + size > total:
                raise CheckpointError(f"{told} reaches beyond the end of the file: truncated?")
            spans.append((start, offset + size, name))
            members[name] = (offset, size)
    spans.sort()
    for (_, end, first), (start, _, second) in zip(spans, spans[1:], strict=False):
        if end > start:
            raise CheckpointError(f"{path}: members {quote(first)} and {quote(second)} overlap")
    return members


# ------------------------------------------------------------------- the pickle, read as data

_STORAGE_DTYPES = {
    "torch DoubleStorage": np.float64,
    "torch FloatStorage": np.float32,
    "torch HalfStorage": np.float16,
    "torch BFloat16Storage": ml_dtypes.bfloat16,
    "torch LongStorage": np.int64,
    "torch IntStorage": np.int32,
    "torch ShortStorage": np.int16,
    "torch CharStorage": np.int8,
    "torch ByteStorage": np.uint8,
    "torch BoolStorage": np.bool_,
}
_TENSOR = "torch._utils _rebuild_tensor_v2"
_PARAMETER = {
    "torch._utils _rebuild_parameter",
    "torch._utils _rebuild_parameter_with_state",  # the original Mamba marks some: _no_weight_decay
}
_ORDERED_DICT = "collections OrderedDict"
_GLOBALS = {*_STORAGE_DTYPES, _TENSOR, *_PARAMETER, _ORDERED_DICT}
_MARK = object()


class _Symbol(NamedTuple):
    """The name of a function or class that the pickle refers to: a mere value, never looked up."""

    name: str


class _Storage(NamedTuple):
    dtype: np.dtype
    offset: int  # bytes, in the file
    count: int  # elements


class _StateDict:
    """The pickle format's stack machine, cut down to what describes a dict of tensors.

    Nothing recurses, and only strings and integers are compared or printed, so neither nesting nor
    sharing inside a hostile pickle costs more than its length.
    """

    def __init__(self, path, storages):
        self.path, self.storages = path, storages
        self.stack, self.memo = [], {}

    def fail(self, message):
        raise CheckpointError(f"{self.path}: data.pkl: {message}")

    def interpret(self, data):
        """The bytes of data.pkl -> {name: Tensor}."""
        try:
            for opcode, argument, _ in pickletools.genops(data):
                self.step(opcode.name, argument)
            result = self.pop(dict, "the result")
        except CheckpointError:
            raise
        except (ValueError, IndexError) as error:  # from genops, or an empty stack
            self.fail(f"broken pickle: {error}")
        if self.stack:
            self.fail("broken pickle: more than one result")
        for name, value in result.items():
            if type(value) is not Tensor:
                self.fail(
                    f"entry {quote(name)} is not a tensor; save the state dict alone: "
                    "torch.save(model.state_dict(), file)"
                )
        return result

    def pop(self, kind, what):
        """Take the top value, whose type must be exactly ``kind`` (so that True is no integer)."""
        value = self.stack.pop()
        if type(value) is not kind:
            self.fail(f"{what}: expected {kind.__name__}, found {type(value).__name__}")
        return value

    def pop_to_mark(self):
        items = []
        while (value := self.stack.pop()) is not _MARK:
            items.append(value)
        return items[::-1]

    def step(self, opcode, argument):
        """Carry out one opcode: it pushes a value, or combines what lies on top of the stack."""
        stack = self.stack
        match opcode:
            case "PROTO" | "FRAME" | "STOP":
                pass
            case "MARK":
                stack.append(_MARK)
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(opcode == "NEWTRUE")
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINUNICODE" | "SHORT_BINUNICODE":
                stack.append(argument)
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                items = [stack.pop() for _ in range(int(opcode[-1]))]
                stack.append(tuple(items[::-1]))
            case "TUPLE":
                stack.append(tuple(self.pop_to_mark()))
            case "EMPTY_DICT":
                stack.append({})
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                self.set_items([key, value])
            case "SETITEMS":
                self.set_items(self.pop_to_mark())
            case "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                if argument not in self.memo:
                    self.fail(f"broken pickle: memo {argument} is read before it is written")
                stack.append(self.memo[argument])
            case "GLOBAL":
                self.push_symbol(argument)
            case "STACK_GLOBAL":
                name, module = self.pop(str, "a global's name"), self.pop(str, "a global's module")
                self.push_symbol(f"{module} {name}")
            case "BINPERSID":
                stack.append(self.storage(self.pop(tuple, "a storage")))
            case "REDUCE":
                arguments = self.pop(tuple, "arguments")
                stack.append(self.build(self.pop(_Symbol, "a function").name, arguments))
            case "BUILD":  # an OrderedDict's attributes: PyTorch keeps version numbers there
                stack.pop()
                if type(stack[-1]) is not dict:
                    self.fail("broken pickle: BUILD without a dict")
            case _:
                self.fail(f"opcode {opcode}, which no dict of tensors needs; the file is refused")

    def set_items(self, pairs):
        target = self.stack[-1]
        if type(target) is not dict or len(pairs) % 2:
            self.fail("broken pickle: items without a dict")
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            if type(key) is not str:  # this also keeps us from hashing a nest of tuples
                self.fail(f"a dict's key is of type {type(key).__name__}, not a name")
            if key in target:
                self.fail(f"{quote(key)} occurs twice")
            target[key] = value

    def push_symbol(self, name):
        if name not in _GLOBALS:
            name = quote(name.replace(" ", ".", 1))
            self.fail(f"refers to {name}, which no dict of tensors needs; the file is refused")
        self.stack.append(_Symbol(name))

    def storage(self, identity):
        """('storage', type, key, device, number of elements) -> where in the file it lies."""
        kinds = [type(part) for part in identity]
        if kinds != [str, _Symbol, str, str, int] or identity[0] != "storage":
            self.fail("a storage is not described as PyTorch does it")
        _, symbol, key, _, count = identity
        if symbol.name not in _STORAGE_DTYPES or key not in self.storages:
            self.fail(f"storage {quote(key)} has no file in the archive, or no known type")
        dtype, (offset, size) = np.dtype(_STORAGE_DTYPES[symbol.name]), self.storages[key]
        if count < 0 or count * dtype.itemsize != size:
            self.fail(f"storage {quote(key)}: {count} × {dtype} do not make its {size} bytes")
        return _Storage(dtype, offset, count)

    def build(self, function, arguments):
        """What the known functions would return, as data."""
        first = type(arguments[0]) if arguments else None
        if function == _ORDERED_DICT and not arguments:
            return {}
        if function in _PARAMETER and first is Tensor:
            return arguments[0]
        if function == _TENSOR and first is _Storage and len(arguments) >= 4:
            return self.tensor(*arguments[:4])
        self.fail(f"{function.replace(' ', '.')} has other arguments than PyTorch writes")

    def tensor(self, storage, offset, shape, strides):
        """A view of a storage: all that it can reach lies inside, and it is not larger than it."""
        if type(shape) is not tuple or type(strides) is not tuple or len(shape) != len(strides):
            self.fail("a tensor's shape and strides must be tuples of one length")
        if len(shape) > MAX_DIMS:
            self.fail(f"a tensor has {len(shape)} dimensions; at most {MAX_DIMS} are supported")
        if any(type(n) is not int or n < 0 for n in (offset, *shape, *strides)):
            self.fail("a tensor's offset, shape and strides must be non-negative integers")
        # A stride along an axis of length 1 is never taken, and PyTorch writes anything there.
        strides = tuple(s if n > 1 else 0 for n, s in zip(shape, strides, strict=True))
        last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
        count = math.prod(shape)
        if count and (last >= storage.count or count > storage.count):
            self.fail(f"a tensor of shape {shape} reaches outside its {storage.count} numbers")
        read = partial(_read_view, self.path, storage, offset, shape, strides)
        return Tensor(shape, storage.dtype, read)


def _read_view(path, storage, offset, shape, strides):
    if 0 in shape:
        return np.zeros(shape, storage.dtype)
    data = np.memmap(path, storage.dtype, "r", storage.offset, (storage.count,))
    strides = [stride * storage.dtype.itemsize for stride in strides]
    return np.lib.stride_tricks.as_strided(data[offset:], shape, strides, writeable=False)
