"""Weights files: what PyTorch writes is read bit for bit, what is broken is refused."""

import json
import pickle
import random
import struct
import sys
import zipfile
from pathlib import Path

import bin_files as b
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mamba.checkpoint import (
    CheckpointError,
    read_json,
    read_tensors,
    shard_names,
    write_tensors,
)

BINS = Path(__file__).parent / "golden" / "bin"
READABLE = sorted(path.stem for path in BINS.glob("*.safetensors"))


def load(path):
    return {name: tensor.read() for name, tensor in read_tensors(path).items()}


def assert_same(found, expected):
    assert list(found) == list(expected) or found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype, name
        assert found[name].shape == array.shape, name
        assert found[name].tobytes() == array.tobytes(), name


@pytest.fixture
def path(tmp_path):
    return tmp_path / "pytorch_model.bin"


def refused(path, *parts):
    """read_tensors refuses the file, and says which file and why."""
    with pytest.raises(CheckpointError) as info:
        load(path)
    where, _, why = str(info.value).partition(f"{path}: ")
    assert not where and why, "the message begins with the file"
    for part in parts:
        assert part in why
    assert len(why) < 2000


# ---------------------------------------------------------------------- what torch.save wrote


@pytest.mark.parametrize("name", READABLE)
def test_files_by_torch_save(name):
    expected = load_file(BINS / f"{name}.safetensors")
    tensors = read_tensors(BINS / f"{name}.bin")
    assert_same({key: t.read() for key, t in tensors.items()}, expected)
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
    assert_same(load(path), arrays)


def test_a_renamed_archive_inside_is_found(path):
    """torch.save names the folder inside the archive after the file; any name will do."""
    archive = zipfile.ZipFile(BINS / "views.bin")
    with zipfile.ZipFile(path, "w") as copy:
        for name in archive.namelist():
            copy.writestr(name.replace("views/", "another name/"), archive.read(name))
    assert_same(load(path), load_file(BINS / "views.safetensors"))


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
    """What PyTorch does write: any stride along an axis of length 1, and empty tensors."""
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
    assert_same(load(path), expected)


@pytest.mark.parametrize(
    "key, kind, count, part",
    [
        ("0", "FloatStorage", 5, "'0': 5 × float32 do not make its 24 bytes"),
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


# ------------------------------------------------------------------------- a broken archive


def small(path, **options):
    value = b.tensor(b.storage("0", "FloatStorage", 64), 0, (64,), (1,))
    pickled = b.PROTO + b.dict_of({"w": value}) + b.STOP
    b.write_archive(path, pickled, [bytes(256)], **options)


def test_not_an_archive(path):
    for data in [b"", b"PK\3\4", b"PK\5\6" + bytes(18), bytes(1000), b'{"a": 1}']:
        path.write_bytes(data)
        refused(path)


def test_git_lfs_pointer(path, tmp_path):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"
    for file in (path, tmp_path / "model.safetensors"):
        file.write_bytes(pointer)
        refused(file, "git lfs pull")


def test_compressed(path):
    small(path, compression=zipfile.ZIP_DEFLATED)
    refused(path, "compressed")


def test_encrypted(path):
    small(path)
    data = bytearray(path.read_bytes())
    data[data.index(b"PK\1\2") + 8] |= 1
    path.write_bytes(data)
    refused(path, "encrypted")


def test_big_endian(path):
    small(path)
    path.write_bytes(path.read_bytes().replace(b"little", b"bigbig"))
    refused(path, "big-endian")


def test_two_pickles_or_none(path):
    small(path, extra=[("other/data.pkl", b".")])
    refused(path, "found 2")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data.pkl", b".")
    refused(path, "found 0")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_member_twice(path):
    small(path, extra=[("weights/data/0", bytes(256))])
    refused(path, "occurs twice")


def test_overlapping_members(path):
    """Many members may not share one stretch of the file: that is how a small file grows large."""
    small(path, extra=[("weights/data/1", bytes(256))])
    data = bytearray(path.read_bytes())
    entry = data.index(b"weights/data/0", data.index(b"PK\1\2")) - 46
    other = data.index(b"weights/data/1", data.index(b"PK\1\2")) - 46
    same_place = data.copy()
    same_place[other + 42 : other + 46] = data[entry + 42 : entry + 46]
    path.write_bytes(same_place)
    refused(path, "another name in its own header")
    data[entry + 20 : entry + 28] = struct.pack("<II", 300, 300)
    path.write_bytes(data)
    refused(path, "overlap")


def test_a_member_that_is_not_there(path):
    small(path)
    data = bytearray(path.read_bytes())
    entry = data.index(b"weights/data/0", data.index(b"PK\1\2")) - 46
    for offset in (1, len(data) - 5, 2**31):
        data[entry + 42 : entry + 46] = struct.pack("<I", offset)
        path.write_bytes(data)
        refused(path, "not where the archive's directory says")


def test_a_member_that_is_too_long(path):
    small(path)
    data = bytearray(path.read_bytes())
    entry = data.index(b"weights/data/0", data.index(b"PK\1\2")) - 46
    data[entry + 20 : entry + 28] = struct.pack("<II", 2**30, 2**30)
    path.write_bytes(data)
    refused(path, "truncated")


def test_a_pickle_of_absurd_size(path):
    with open(path, "wb") as file, zipfile.ZipFile(file, "w") as archive:
        archive.writestr("weights/data.pkl", bytes(17 * 2**20))
    refused(path, "no state dict")


def test_a_directory_of_absurd_size(path):
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(270):
            archive.writestr(f"{i}" + "x" * 65000, b"")
    refused(path, "its directory has")


def test_every_truncation_is_refused(tmp_path):
    data = (BINS / "module.bin").read_bytes()
    path = tmp_path / "cut.bin"
    for length in range(0, len(data), 23):
        path.write_bytes(data[:length])
        refused(path)


@pytest.mark.parametrize("source", ["module.bin", "views.bin", "dtypes.safetensors"])
def test_every_change_is_read_or_refused(tmp_path, source):
    """Bytes changed at random: an error of ours, or arrays of the size that they say they have."""
    rng = random.Random(source)
    data = (BINS / source).read_bytes()
    path = tmp_path / source
    outcomes = {"read": 0, "refused": 0}
    for _ in range(400):
        changed = bytearray(data)
        for _ in range(rng.choice([1, 1, 2, 8])):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        path.write_bytes(changed)
        try:
            tensors = read_tensors(path)
        except CheckpointError as error:
            assert source in str(error)
            outcomes["refused"] += 1
            continue
        for tensor in tensors.values():
            array = tensor.read()
            assert (array.shape, array.dtype) == (tensor.shape, tensor.dtype)
            assert array.nbytes <= len(data)
        outcomes["read"] += 1
    assert all(count > 10 for count in outcomes.values()), outcomes


# ------------------------------------------------------------------------------ safetensors

ARRAYS = {
    "f32": np.arange(6, dtype=np.float32).reshape(2, 3),
    "f16": np.float16([1, -2.5]),
    "bf16": np.arange(4).astype(ml_dtypes.bfloat16).reshape(4, 1),
    "i64": np.array(7),
    "empty": np.zeros((0, 2), np.float32),
}


def test_safetensors_there_and_back(tmp_path):
    path = tmp_path / "model.safetensors"
    write_tensors(path, ARRAYS)
    assert_same(load(path), ARRAYS)
    assert read_tensors(path)["bf16"].shape == (4, 1)
    assert "torch" not in sys.modules


def test_an_array_in_another_order_is_not_shuffled(tmp_path):
    array = np.arange(6, dtype=np.float32).reshape(2, 3).T
    write_tensors(tmp_path / "model.safetensors", {"w": array})
    np.testing.assert_array_equal(load(tmp_path / "model.safetensors")["w"], array)


def test_broken_safetensors(tmp_path):
    path = tmp_path / "model.safetensors"
    write_tensors(path, ARRAYS)
    data = path.read_bytes()
    for broken in [b"", b"\0" * 100, data[:-1], data[:50], data + b"\0", b"\xff" * 100]:
        path.write_bytes(broken)
        refused(path, "not a complete safetensors file")


def test_unsupported_safetensors_dtype(tmp_path):
    path = tmp_path / "model.safetensors"
    header = b'{"tiny": {"dtype": "F8_E4M3", "shape": [1], "data_offsets": [0, 1]}}'
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"\0")
    refused(path, "'tiny'", "F8_E4M3")


def test_absent_file(tmp_path):
    for name in ("model.safetensors", "pytorch_model.bin", "model.safetensors.index.json"):
        with pytest.raises(FileNotFoundError, match=name):
            read_tensors(tmp_path / name)


def write_index(folder, mapping):
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": mapping}))
    return path


def test_shards(tmp_path):
    names = list(ARRAYS)
    save_file({name: ARRAYS[name] for name in names[:2]}, tmp_path / "1.safetensors")
    save_file({name: ARRAYS[name] for name in names[2:]}, tmp_path / "2.safetensors")
    mapping = {name: f"{1 + (i >= 2)}.safetensors" for i, name in enumerate(names)}
    path = write_index(tmp_path, mapping)
    assert shard_names(path) == ["1.safetensors", "2.safetensors"]
    assert_same(load(path), ARRAYS)

    write_index(tmp_path, {**mapping, "f32": "2.safetensors"})
    with pytest.raises(CheckpointError, match=r"1\.safetensors.*unexpected: \['f32'\]"):
        read_tensors(path)
    write_index(tmp_path, {**mapping, "ghost": "2.safetensors"})
    with pytest.raises(CheckpointError, match=r"2\.safetensors.*missing: \['ghost'\]"):
        read_tensors(path)
    write_index(tmp_path, {**mapping, "f32": "3.safetensors"})
    with pytest.raises(FileNotFoundError, match=r"3\.safetensors"):
        (tmp_path / "1.safetensors").rename(tmp_path / "gone")
        read_tensors(write_index(tmp_path, {"f32": "3.safetensors"}))


@pytest.mark.parametrize(
    "file",
    [
        "../1.safetensors",
        "/1.safetensors",
        "folder/1.safetensors",
        "folder\\1.safetensors",
        "C:1.safetensors",
        "./1.safetensors",
        "1.safetensors/",
        "1.safetensors/..",
        "1.bin",
        "..",
        "",
        "a\0.safetensors",
        None,
        3,
        ["1.safetensors"],
    ],
)
def test_shards_lie_beside_their_index(tmp_path, file):
    save_file(ARRAYS, tmp_path / "1.safetensors")
    path = write_index(tmp_path, {"f32": file})
    for function in (read_tensors, shard_names):
        with pytest.raises(CheckpointError, match="'f32'"):
            function(path)


@pytest.mark.parametrize("mapping", [{}, [], None, "x"])
def test_an_index_without_a_map(tmp_path, mapping):
    with pytest.raises(CheckpointError, match="weight_map"):
        read_tensors(write_index(tmp_path, mapping))


@pytest.mark.parametrize("data", [b"", b"{", b"[1]", b"3", b"\xff", b"[" * 10**5, b"1" * 5000])
def test_broken_json(tmp_path, data):
    path = tmp_path / "config.json"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_json(path)
