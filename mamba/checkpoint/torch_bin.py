"""PyTorch's ``pytorch_model.bin`` -> names and NumPy arrays, without PyTorch or unpickling.

The file is a zip archive that holds a pickle (``*/data.pkl``: names, shapes, strides) and one raw
file per storage (``*/data/<key>``: the numbers). A pickle is a program, and unpickling runs it. So
we do not unpickle. We go through the opcodes, accept only those that a dict of tensors needs, and
treat the names of functions as symbols. No file can make this code call anything, or read outside
its storages.

Sources: Python's ``pickletools`` (what each opcode does) and ``zipfile``; PyTorch's notes on
serialization.
"""

import math
import os
import pickletools
from typing import NamedTuple

import ml_dtypes
import numpy as np

from mamba.checkpoint.tensors import MAX_METADATA_BYTES, CheckpointError, Tensor, on_disk, quote
from mamba.checkpoint.torch_zip import zip_members

__all__ = ["read_bin"]

# A tensor takes about 40 opcodes. One opcode of a hostile file can make us keep about 100 bytes, so
# this limit bounds the memory that a file can cost before it is refused to about 50 MB.
MAX_OPCODES = 500_000

# How torch.save began its files before version 1.6 (protocol 2, then a magic number).
_LEGACY_START = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19."


def read_bin(path):
    """Open a file written by ``torch.save(model.state_dict(), path)`` -> {name: Tensor}.

    Shapes and dtypes are known at once; each tensor's numbers are read when they are asked for.

    Raises:
        CheckpointError: the file holds anything but a dict of tensors, or tensors that share their
            numbers and so take more than twice the size of the file.
        FileNotFoundError: there is no such file.
    """
    with open(path, "rb") as file:
        if file.read(len(_LEGACY_START)) == _LEGACY_START:
            raise CheckpointError(
                f"{path}: PyTorch's format from before version 1.6. Convert it where PyTorch is "
                "installed: torch.save(torch.load(file, weights_only=True), file)"
            )
    members = zip_members(path)
    pickles = [name for name in members if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise CheckpointError(f"{path}: expected one */data.pkl inside, found {len(pickles)}")
    prefix = pickles[0].removesuffix("data.pkl")

    def read_metadata(name):
        offset, size = members[name]
        if size > MAX_METADATA_BYTES:
            raise CheckpointError(
                f"{path}: {quote(name)} has {size} bytes, more than any state dict"
            )
        with open(path, "rb") as file:
            file.seek(offset)
            return file.read(size)

    if prefix + "byteorder" in members and read_metadata(prefix + "byteorder") != b"little":
        raise CheckpointError(f"{path}: big-endian numbers; only little-endian files are supported")
    data = prefix + "data/"
    storages = {name[len(data) :]: at for name, at in members.items() if name.startswith(data)}
    tensors = _StateDict(path, storages).interpret(read_metadata(pickles[0]))
    # Tensors may share a storage, as a tied head does. Without a limit, a small file could turn
    # into a thousand layers that all share one storage.
    total, size = sum(tensor.nbytes for tensor in tensors.values()), os.path.getsize(path)
    if total > 2 * size:
        raise CheckpointError(
            f"{path}: its tensors share their numbers so often that they take {total} bytes, "
            f"more than twice the file's {size}"
        )
    return tensors


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
    """The name of a function or class that the pickle refers to. It is never looked up."""

    name: str  # "module name"


class _Storage(NamedTuple):
    """The numbers that one or more tensors are views of."""

    dtype: np.dtype  # of the numbers
    start: int  # byte of the file at which they begin
    count: int  # how many they are


class _StateDict:
    """The stack machine of the pickle format, reduced to what describes a dict of tensors.

    Nothing recurses, and only strings and integers are compared or printed. So neither nesting nor
    sharing inside a hostile pickle costs more than its length.
    """

    def __init__(self, path, storages):
        self.path, self.storages = path, storages
        self.stack, self.memo = [], {}

    def error(self, message):
        return CheckpointError(f"{self.path}: data.pkl: {message}")

    def interpret(self, data):
        """The bytes of data.pkl -> {name: Tensor}."""
        try:
            for count, (opcode, argument, _) in enumerate(pickletools.genops(data)):
                if count >= MAX_OPCODES:
                    raise self.error(f"more than {MAX_OPCODES} opcodes: no state dict has so many")
                self.step(opcode.name, argument)
            result = self.pop(dict, "the result")
        except CheckpointError:
            raise
        # Raised by genops (a Warning where warnings are errors), or by a stack that is empty.
        except (ValueError, IndexError, Warning) as error:
            raise self.error(f"broken pickle: {str(error)[:300]}") from error
        if self.stack:
            raise self.error("broken pickle: more than one result")
        for name, value in result.items():
            if type(value) is not Tensor:
                raise self.error(
                    f"entry {quote(name)} is not a tensor; save the state dict alone: "
                    "torch.save(model.state_dict(), file)"
                )
        return result

    def pop(self, kind, what):
        """Take the top value, whose type must be exactly ``kind`` (so that True is no integer)."""
        value = self.stack.pop()
        if type(value) is not kind:
            raise self.error(f"{what}: expected {kind.__name__}, found {type(value).__name__}")
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
                    raise self.error(f"broken pickle: memo {argument} is read before it is written")
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
            case "BUILD":  # sets attributes of an OrderedDict, where PyTorch keeps version numbers
                stack.pop()
                if type(stack[-1]) is not dict:
                    raise self.error("broken pickle: BUILD without a dict")
            case _:
                raise self.error(
                    f"opcode {opcode}, which no dict of tensors needs; the file is refused"
                )

    def set_items(self, pairs):
        target = self.stack[-1]
        if type(target) is not dict or len(pairs) % 2:
            raise self.error("broken pickle: items without a dict")
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            if type(key) is not str:  # also so that no nest of tuples is ever hashed
                raise self.error(f"a dict's key is of type {type(key).__name__}, not a name")
            if key in target:
                raise self.error(f"{quote(key)} occurs twice")
            target[key] = value

    def push_symbol(self, name):
        if name not in _GLOBALS:
            name = quote(name.replace(" ", ".", 1))
            raise self.error(
                f"refers to {name}, which no dict of tensors needs; the file is refused"
            )
        self.stack.append(_Symbol(name))

    def storage(self, identity):
        """('storage', type, key, device, number of elements) -> where in the file it lies."""
        kinds = [type(part) for part in identity]
        if kinds != [str, _Symbol, str, str, int] or identity[0] != "storage":
            raise self.error("a storage is not described in PyTorch's way")
        _, symbol, key, _, count = identity
        if symbol.name not in _STORAGE_DTYPES or key not in self.storages:
            raise self.error(f"storage {quote(key)} has no file in the archive, or no known type")
        dtype, (offset, size) = np.dtype(_STORAGE_DTYPES[symbol.name]), self.storages[key]
        if count < 0 or count * dtype.itemsize != size:
            raise self.error(
                f"storage {quote(key)}: {quote(count)} × {dtype} does not fill its {size} bytes"
            )
        return _Storage(dtype, offset, count)

    def build(self, function, arguments):
        """What one of the known functions would return, as data."""
        first = type(arguments[0]) if arguments else None
        if function == _ORDERED_DICT and not arguments:
            return {}
        if function in _PARAMETER and first is Tensor:
            return arguments[0]
        if function == _TENSOR and first is _Storage and len(arguments) >= 4:
            return self.tensor(*arguments[:4])
        raise self.error(f"{function.replace(' ', '.')} has arguments that PyTorch does not write")

    def tensor(self, storage, offset, shape, strides):
        """A view of a storage, which lies inside it and has no more numbers than it."""
        if type(shape) is not tuple or type(strides) is not tuple or len(shape) != len(strides):
            raise self.error("a tensor's shape and strides must be tuples of one length")
        if any(type(n) is not int or n < 0 for n in (offset, *shape, *strides)):
            raise self.error("a tensor's offset, shape and strides must be non-negative integers")
        # The stride of an axis of length 1 is never used, and PyTorch writes any number there.
        strides = tuple(s if n > 1 else 0 for n, s in zip(shape, strides, strict=True))
        last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
        tensor = on_disk(
            self.path,
            storage.dtype,
            storage.start + offset * storage.dtype.itemsize,
            shape,
            strides,
        )
        if 0 not in shape and (last >= storage.count or math.prod(shape) > storage.count):
            raise self.error(
                f"a tensor of shape {quote(shape)} reaches outside its storage of {storage.count} "
                "numbers"
            )
        return tensor
