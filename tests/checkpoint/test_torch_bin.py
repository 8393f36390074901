"""PyTorch's files are read bit for bit. Files that do harm or reach too far are refused."""

import pickle
import struct
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from mamba.checkpoint.files import read_tensors
from tests.helpers import bin_files as b
from tests.helpers.checkpoints import assert_same_arrays, read_arrays
from tests.helpers.hostile import refused

BINS = Path(__file__).parents[1] / "golden" / "bin"
READABLE = sorted(path.stem for path in BINS.glob("*.safetensors"))


# ---------------------------------------------------------------------- what torch.save wrote


@pytest.mark.parametrize("name", READABLE)
def test_files_by_torch_save(name):
    expected = load_file(BINS / f"{name}.safetensors")
    tensors = read_tensors(BINS / f"{name}.bin")
    assert_same_arrays({key: t.read() for key, t in tensors.items()}, expected)
    for key, t in tensors.items():  # known before a number is read
        assert (t.shape, t.dtype) == (expected[key].shape, expected[key].dtype)


def test_there_are_files_by_torch_save():
    assert set(READABLE) == {"dtypes", "module", "parameters", "protocol4", "views"}
    kinds = {t.dtype.name for t in read_tensors(BINS / "dtypes.bin").values()}
    assert {"float64", "float32", "float16", "bfloat16", "int64", "bool"} <= kinds


def test_legacy_format_says_how_to_convert():
    refused(BINS / "legacy.bin", "before version 1.6", "torch.save(")


def test_bin_by_hand(path):
    rng = np.random.default_rng(0)
    arrays = {
        f"{kind} {shape}": rng.normal(size=shape).astype(dtype)
        for kind, dtype in [("f", np.float32), ("h", np.float16), ("b", ml_dtypes.bfloat16)]
        for shape in [(), (3,), (2, 1, 4), (0, 2)]
    }
    b.write_bin(path, arrays)
    assert_same_arrays(read_arrays(path), arrays)


def test_a_renamed_archive_inside_is_found(path):
    """torch.save names the folder inside the archive after the file. Any name is accepted."""
    archive = zipfile.ZipFile(BINS / "views.bin")
    with zipfile.ZipFile(path, "w") as copy:
        for name in archive.namelist():
            copy.writestr(name.replace("views/", "another name/"), archive.read(name))
    assert_same_arrays(read_arrays(path), load_file(BINS / "views.safetensors"))


# ------------------------------------------------------------------ a .bin that does harm


class Harm:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_nothing_is_executed(path, tmp_path, protocol):
    trace = tmp_path / "executed"
    b.write_archive(path, pickle.dumps({"weight": Harm(trace)}, protocol))
    refused(path, "io.open", "refused")
    assert not trace.exists()


@pytest.mark.parametrize(
    "module, name",
    [
        ("os", "system"),
        ("builtins", "eval"),
        ("torch", "load"),
        ("torch._utils", "_rebuild_sparse_tensor"),
        ("torch", "FloatStorage.__class__"),
        ("collections", "OrderedDict.fromkeys"),
        ("collections OrderedDict", ""),
        ("x" * 10**6, "y"),
    ],
)
def test_globals_outside_the_list(path, module, name):
    b.write_archive(path, b.PROTO + b"}" + b.text("w") + b.symbol(module, name) + b"s.")
    refused(path, "refers to", module[:50].replace(" ", "."))


def test_a_global_by_another_opcode(path):
    pickled = b"\x80\x04}" + b.text("w") + b.text("os") + b.text("system") + b"\x93s."
    b.write_archive(path, pickled)
    refused(path, "os.system")


@pytest.mark.parametrize(
    "opcode, name",
    [
        (b"0", "POP"),
        (b"2", "DUP"),
        (b"I1\n", "INT"),
        (b"ios\nsystem\n", "INST"),
        (b"o", "OBJ"),
        (b"\x81", "NEWOBJ"),
        (b"\x92", "NEWOBJ_EX"),
        (b"\x82\x01", "EXT1"),
        (b"Pkey\n", "PERSID"),
        (b"G" + b"\0" * 8, "BINFLOAT"),
        (b"\x8b\x02\0\0\0\xff\xff", "LONG4"),
        (b"]", "EMPTY_LIST"),
        (b"\x8f", "EMPTY_SET"),
    ],
)
def test_opcodes_outside_the_list(path, opcode, name):
    b.write_archive(path, b.PROTO + b"}" + b.text("w") + opcode + b"s.")
    refused(path, f"opcode {name}")


def test_no_function_is_called_with_other_arguments(path):
    ok = b.tensor(b.storage("0", "FloatStorage", 2), 0, (2,), (1,))
    for value in [
        b.call(b.symbol("torch", "FloatStorage")),
        b.call(b.symbol("collections", "OrderedDict"), b.integer(1)),
        b.call(b.symbol("torch._utils", "_rebuild_parameter"), b.integer(1)),
        b.call(b.symbol("torch._utils", "_rebuild_tensor_v2"), ok),
        b.call(b.symbol("torch._utils", "_rebuild_tensor_v2")),
        b.call(b.integer(1)),
        b.storage("0", "FloatStorage", 2) + b"Q",
    ]:
        b.write_archive(path, b.PROTO + b.dict_of({"w": value}) + b.STOP, [bytes(8)])
        refused(path, "data.pkl")


def test_what_is_not_a_state_dict(path):
    tensor = b.tensor(b.storage("0", "FloatStorage", 2), 0, (2,), (1,))
    for pickled, part in [
        (tensor, "expected dict"),
        (b.dict_of({"model": b.dict_of({"w": tensor})}), "'model' is not a tensor"),
        (b.dict_of({"epoch": b.integer(3)}), "'epoch' is not a tensor"),
        (b"}(" + b.integer(3) + tensor + b"u", "not a name"),
        (b"}(" + (b.text("twice") + tensor) * 2 + b"u", "'twice' occurs twice"),
    ]:
        b.write_archive(path, b.PROTO + pickled + b.STOP, [bytes(8)])
        refused(path, part)


@pytest.mark.parametrize(
    "pickled",
    [
        b"",
        b".",
        b"}",
        b"s.",
        b"(u.",
        b"}K\x01u.",
        b"h\0.",
        b"}X\xff\xff\xff\x7fa.",
        b"\xff",
        b"R.",
        b"t.",
    ],
)
def test_broken_pickles(path, pickled):
    b.write_archive(path, pickled)
    refused(path, "data.pkl")


def test_nesting_sharing_and_large_memos_cost_no_more_than_their_length(path):
    n = 100_000
    nest = b")" + b"\x85" * n  # ((((…))))
    laughs = b")q\0" + b"h\0h\0\x86q\0" * (n // 4)  # each holds the one before twice
    memo = b"".join(b"}r" + struct.pack("<I", 2**32 - 1 - i) for i in range(n // 4))
    itself = b"}q\0" + b.text("w") + b"h\0s"
    for pickled in [
        b"}" + b.text("w") + nest + b"s",  # as a value
        b"}" + nest + b"Ns",  # as a key, which must not be hashed
        nest + b"Q",
        b.symbol("torch._utils", "_rebuild_tensor_v2") + nest + b"R",
        b"}" * n,
        b"}" + b.text("w") + laughs + b"s",
        b"}" + b.text("w") + memo + b"s",
        itself,
        b"(" * n,
    ]:
        b.write_archive(path, b.PROTO + pickled + b.STOP)
        refused(path, "data.pkl")


# --------------------------------------------------------------- a .bin that reaches too far


@pytest.mark.parametrize(
    "offset, shape, strides",
    [
        (0, (7,), (1,)),
        (1, (6,), (1,)),
        (6, (1,), (1,)),
        (0, (2, 3), (4, 1)),
        (0, (2, 3), (3, 2)),
        (0, (2,), (2**62,)),
        (2**70, (1,), (1,)),
        (0, (2**40,), (0,)),  # a terabyte made of one number
        (0, (2, 4), (0, 1)),  # also larger than its storage
        (-1, (2,), (1,)),
        (5, (2,), (-1,)),
        (0, (-2,), (1,)),
        (0, (2, 3), (1,)),
        (0, (1,) * 65, (1,) * 65),
        (0, (2**31, 2**31, 2**31), (0, 0, 0)),
    ],
)
def test_tensors_stay_inside_their_storage(path, offset, shape, strides):
    value = b.tensor(b.storage("0", "FloatStorage", 6), offset, shape, strides)
    b.write_archive(path, b.PROTO + b.dict_of({"w": value}) + b.STOP, [bytes(24)])
    refused(path, "a tensor")


def test_harmless_shapes(path):
    """PyTorch writes any stride along an axis of length 1, and empty tensors."""
    data = b.storage("0", "FloatStorage", 6)
    shapes = {
        "one": b.tensor(data, 5, (1, 1), (2**62, 7)),
        "none": b.tensor(data, 6, (0, 5), (5, 1)),
        "scalar": b.tensor(data, 2, (), ()),
        "broadcast": b.tensor(data, 2, (2, 2), (0, 1)),
    }
    numbers = np.arange(6, dtype=np.float32)
    b.write_archive(path, b.PROTO + b.dict_of(shapes) + b.STOP, [numbers.tobytes()])
    expected = {
        "one": np.float32([[5]]),
        "none": np.zeros((0, 5), np.float32),
        "scalar": np.float32(2).reshape(()),
        "broadcast": np.float32([[2, 3], [2, 3]]),
    }
    assert_same_arrays(read_arrays(path), expected)


@pytest.mark.parametrize(
    "key, kind, count, part",
    [
        ("0", "FloatStorage", 5, "'0': 5 × float32 does not fill its 24 bytes"),
        ("0", "FloatStorage", 7, "24 bytes"),
        ("0", "DoubleStorage", 6, "24 bytes"),
        ("0", "FloatStorage", -6, "24 bytes"),
        ("0", "FloatStorage", 2**62, "24 bytes"),
        ("1", "FloatStorage", 6, "'1' has no file"),
        ("../byteorder", "ByteStorage", 6, "no file"),
        ("weights/byteorder", "FloatStorage", 6, "no file"),
    ],
)
def test_storages_are_exactly_their_files(path, key, kind, count, part):
    value = b.tensor(b.storage(key, kind, count), 0, (1,), (1,))
    b.write_archive(path, b.PROTO + b.dict_of({"w": value}) + b.STOP, [bytes(24)])
    refused(path, part)


def test_true_is_no_integer(path):
    data = b.storage("0", "FloatStorage", 1)
    value = b.call(
        b.symbol("torch._utils", "_rebuild_tensor_v2"), data, b"\x89", b"(\x88t", b"(\x88t", b"\x89"
    )
    b.write_archive(path, b.PROTO + b.dict_of({"w": value}) + b.STOP, [bytes(4)])
    refused(path, "integers")
