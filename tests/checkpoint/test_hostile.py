"""Hostile files are refused: pickles that run code, bombs, false sizes, paths.

Where that is safe, a pickle is first given to Python's own unpickler, to see that it would have
done harm: it calls ``hostile_canary.sing``.
"""

import io
import json
import pickle
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from mamba import Mamba, MambaConfig
from mamba.checkpoint.files import read_json, read_tensors
from mamba.checkpoint.names import read_config, write_config
from mamba.checkpoint.tensors import CheckpointError
from tests.helpers import bin_files as b
from tests.helpers import hostile_canary
from tests.helpers.hostile import identical, outcome, refused, safetensors

ROOT = Path(__file__).parents[2]
CANARY = "tests.helpers.hostile_canary"
SING = b.symbol(CANARY, "sing")
SING4 = b.text(CANARY) + b.text("sing") + b"\x93"
CLASS = b.symbol(CANARY, "Singer")
EXTENSION = 240  # a code of the extension registry's private range


def bytes8(data):
    return b"\x8e" + struct.pack("<Q", len(data)) + data


CODE = {
    "REDUCE": SING + b")R",
    "REDUCE, by STACK_GLOBAL": SING4 + b")R",
    "STACK_GLOBAL, its name from the memo": b.text(CANARY) + b.text("sing") + b"q\1\x93)R",
    "INST": b"(i" + CANARY.encode() + b"\nsing\n",
    "OBJ": b"(" + SING + b"o",
    "NEWOBJ": CLASS + b")\x81",
    "NEWOBJ_EX": CLASS + b")}\x92",
    "BUILD, __setstate__": CLASS + b")\x81}b",
    "BUILD, slots": CLASS + b")\x81N}" + b.text("x") + b.integer(1) + b"s\x86b",
    "EXT1": b"\x82" + bytes([EXTENSION]) + b")R",
    "EXT2": b"\x83" + struct.pack("<H", EXTENSION) + b")R",
    "EXT4": b"\x84" + struct.pack("<i", EXTENSION) + b")R",
    "REDUCE inside a list": b"]" + SING + b")Ra",
    "REDUCE inside a frozenset": b"(" + SING + b")R\x91",
    "REDUCE inside a parameter": b.call(
        b.symbol("torch._utils", "_rebuild_parameter"), SING + b")R", b"\x88", b.ORDERED_DICT
    ),
    "REDUCE as a storage": SING + b")RQ",
    "REDUCE thrown away": SING + b")R0N",
    "a dotted name": b.text(CANARY) + b.text("Singer.__call__") + b"\x93)R",
}


@pytest.fixture
def registry():
    import copyreg

    copyreg.add_extension(CANARY, "sing", EXTENSION)
    yield
    copyreg.remove_extension(CANARY, "sing", EXTENSION)


@pytest.mark.parametrize("name", CODE)
@pytest.mark.parametrize("where", ["value", "key", "whole"])
def test_no_opcode_runs_code(path, name, where, registry):
    code = CODE[name]
    program = {"value": b"}" + b.text("w") + code + b"s", "key": b"}" + code + b"Ns", "whole": code}
    pickled = b"\x80\x04" + program[where] + b.STOP

    class Unpickler(pickle.Unpickler):
        def persistent_load(self, identity):
            return identity

    if "parameter" not in name and "dotted" not in name:  # those need PyTorch, a newer pickle
        hostile_canary.songs.clear()
        try:
            Unpickler(io.BytesIO(pickled)).load()
        except Exception:
            pass  # harm is done before the end
        assert hostile_canary.songs, "this pickle would not have run code: the test tests nothing"

    hostile_canary.songs.clear()
    b.write_archive(path, pickled)
    refused(path, "data.pkl: ")
    assert not hostile_canary.songs


@pytest.mark.parametrize("identity", [
    b.text("storage"), b")", b"N", b.integer(3), b"}", b.tuple_of(b.text("module")),
    b.tuple_of(b.text("storage"), SING, b.text("0"), b.text("cpu"), b.integer(6)),
    b.tuple_of(b.text("storage"), b.text("FloatStorage"), b.text("0"), b.text("cpu"), b.integer(6)),
    b.tuple_of(b.text("storage"), b.symbol("torch", "FloatStorage"), b.integer(0), b.text("cpu"),
               b.integer(6)),
    b.tuple_of(b.text("storage"), b.symbol("torch", "FloatStorage"), b.text("0"), b.text("cpu"),
               b"\x88"),
    b.tuple_of(b.text("storage"), b.symbol("torch._utils", "_rebuild_tensor_v2"), b.text("0"),
               b.text("cpu"), b.integer(6)),
    b.tuple_of(b.text("storage"), b.symbol("torch", "FloatStorage"), b.text("../../etc/passwd"),
               b.text("cpu"), b.integer(6)),
    b.tuple_of(b.text("storage"), b.symbol("torch", "FloatStorage"), b"}", b.text("cpu"), b"}"),
])  # fmt: skip
def test_strange_storages(path, identity):
    b.write_archive(path, b.PROTO + b"}" + b.text("w") + identity + b"Qs.", [bytes(24)])
    refused(path, "data.pkl: ")


@pytest.mark.parametrize("opcodes", [
    b"\x8b\xff\xff\xff\x7f", b"\x8b\xff\xff\xff\xff", b"\x8e" + b"\xff" * 7 + b"\x7f",
    b"\x8e" + b"\xff" * 8, b"\x8d" + b"\xff" * 7 + b"\x7f", b"\x96" + b"\xff" * 7 + b"\x7f",
    b"\x95" + b"\xff" * 8, b"\x97", b"\x98", b"B\xff\xff\xff\xff", b"T\xff\xff\xff\x7f",
    b"X\xff\xff\xff\xff", b"I" + b"9" * 10**5 + b"\n", b"L" + b"9" * 10**5 + b"L\n",
    b"F1e999\n", b"Vabc\n", b"S'\\z'\n", b"S'abc\n", b"V\\ud800\n", b"\x8a\xff" + b"\xff" * 255,
    b"g1\n", b"p0\n", b"j\xff\xff\xff\xff", b"\x8c\x02\xff\xff", b"2" * 1000, b"]" + b"2a" * 1000,
])  # fmt: skip
def test_giant_lengths_and_odd_arguments(path, opcodes):
    b.write_archive(path, b.PROTO + b"}" + b.text("w") + opcodes + b"s.")
    refused(path, "data.pkl: ")


# --------------------------------------------------------------------------- memory stays bounded

PEAK = """
import resource, sys
from mamba.checkpoint.files import read_tensors
from mamba.checkpoint.tensors import CheckpointError
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sys.argv[1:]:
    try:
        read_tensors(path)
    except CheckpointError as error:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        print("refused:", path, peak)
"""
LIMIT = 96 * 2**10  # kB: what any file may cost before it is refused, however small it is


def n_times(unit, total=3 * 2**20):
    return unit * (total // len(unit))


def bombs():
    yield "marks", n_times(b"(")
    yield "dicts", n_times(b"}")
    yield "memos", b"}" + n_times(b"\x94")
    yield "memos with numbers", b"}" + b"".join(b"r" + struct.pack("<I", i) for i in range(600_000))
    yield "numbers", n_times(b"\x8a\x08" + b"\x7f" * 8)
    yield "a nest", b")" + n_times(b"\x85")
    yield "laughs", b")q\0" + n_times(b"h\0h\0\x86q\0")
    yield "names", b"".join(b"\x8c\x04" + b"%04x" % (i % 2**16) for i in range(500_000))
    yield "wide text", b"X" + struct.pack("<I", 3 * 2**20) + "\U0001f40d".encode() * (3 * 2**18)
    yield "symbols", n_times(b.ORDERED_DICT)


def peaks(*files):
    """Growth of a new process after each file, in kB. It must refuse all of them."""
    found = subprocess.run(
        [sys.executable, "-c", PEAK, *map(str, files)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
    )
    assert found.returncode == 0, found.stderr[-2000:]
    lines = found.stdout.splitlines()
    assert len(lines) == len(files), found.stdout
    return {line: int(line.split()[-1]) for line in lines}


def test_a_small_pickle_stays_small(tmp_path):
    files = []
    for name, program in bombs():
        files.append(tmp_path / f"{name}.bin")
        b.write_archive(files[-1], b.PROTO + program + b.STOP)
    grown = peaks(*files)
    assert max(grown.values()) < LIMIT, grown


def test_many_members_and_long_headers_stay_small(tmp_path):
    with zipfile.ZipFile(tmp_path / "members.bin", "w") as archive:
        for i in range(65_000):
            archive.writestr(zipfile.ZipInfo(f"{i:x}"), b"")
    deep = safetensors(b'{"a":' + b"[" * 10**6)
    (tmp_path / "deep.safetensors").write_bytes(deep)
    wide = b'{"a":[' + b"[]," * 10**6 + b"[]]}"
    (tmp_path / "wide.safetensors").write_bytes(safetensors(wide))
    (tmp_path / "wide.index.json").write_bytes(wide)
    (tmp_path / "large.index.json").write_bytes(b'{"a":"' + b"x" * 2**23 + b'"}')
    grown = peaks(*sorted(tmp_path.iterdir()))
    assert max(grown.values()) < 2 * LIMIT, grown


def test_a_thousand_tensors_may_not_share_one_storage(path):
    """Each lies inside its storage. Together they would take a thousand times the file."""
    value = b.tensor(b.storage("0", "FloatStorage", 2**16), 0, (2**16,), (1,))
    items = {str(i): value for i in range(1000)}
    b.write_archive(path, b.PROTO + b.dict_of(items) + b.STOP, [bytes(2**18)])
    refused(path, "more than twice")
    twice = dict.fromkeys(["embedding", "head"], value)  # as tied weights are written
    b.write_archive(path, b.PROTO + b.dict_of(twice) + b.STOP, [bytes(2**18)])
    assert not isinstance(outcome(path), CheckpointError)


def test_empty_tensors_of_absurd_shape(path):
    for shape in [(0, 2**62), (2**40, 0, 2**40)]:
        value = b.tensor(b.storage("0", "FloatStorage", 0), 0, shape, (0,) * len(shape))
        b.write_archive(path, b.PROTO + b.dict_of({"w": value}) + b.STOP, [b""])
        refused(path, "which no model needs")
        file = path.with_suffix(".safetensors")
        entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}
        file.write_bytes(safetensors(json.dumps({"w": entry}).encode()))
        refused(file, "which no model needs")


# ------------------------------------------------------------------------------------ archives


def archive(path, **names):
    value = b.tensor(b.storage("0", "FloatStorage", 6), 0, (6,), (1,))
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("w/data.pkl", b.PROTO + b.dict_of({"w": value}) + b.STOP)
        file.writestr(names.get("data", "w/data/0"), bytes(24))
        file.writestr(names.get("other", "w/version"), b"3\n")


@pytest.mark.parametrize(
    "name",
    "../data/0 /data/0 w/../w/data/0 v/data/0 data/0 w/data/../data/0 w//data/0 w/data/00".split(),
)
def test_storages_of_another_place(path, name):
    archive(path, data=name)
    refused(path, "'0' has no file")


def test_nothing_is_written_anywhere(path):
    archive(path, other="../../evil")
    assert not isinstance(outcome(path), CheckpointError)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_deflated_bomb_is_not_inflated(path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("w/data.pkl", bytes(2**26))
    refused(path, "compressed")


def test_sizes_that_lie(path):
    archive(path)
    data = path.read_bytes()
    directory = data.index(b"PK\1\2")
    for place in (20, 24):  # the compressed and the plain size
        for size in (0, 1, 2**31, 2**32 - 1):
            at = data.index(b"w/data/0", directory) - 46 + place
            path.write_bytes(data[:at] + struct.pack("<I", size) + data[at + 4 :])
            refused(path)
    end = data.index(b"PK\5\6")
    for place, width in [(4, 2), (6, 2), (12, 4), (16, 4)]:  # disks, the directory's size and place
        at = end + place
        path.write_bytes(data[:at] + b"\xfe" * width + data[at + width :])
        found = outcome(path)
        assert isinstance(found, CheckpointError) or place < 12, place


def test_zip64_that_lies(path):
    with zipfile.ZipFile(path, "w", allowZip64=True) as file:
        with file.open("w/data.pkl", "w", force_zip64=True) as member:
            member.write(b.PROTO + b"}.")
    assert outcome(path) == {}
    archive(path)
    data = path.read_bytes()
    at = data.index(b"w/data/0", data.index(b"PK\1\2")) - 46
    extra = struct.pack("<HHQQ", 1, 16, 2**63, 2**63)
    changed = bytearray(data)
    changed[at + 20 : at + 28] = b"\xff" * 8
    changed[at + 30 : at + 32] = struct.pack("<H", len(extra))
    changed[at + 54 : at + 54] = extra
    end = changed.index(b"PK\5\6")
    size = struct.unpack("<I", changed[end + 12 : end + 16])[0] + len(extra)
    changed[end + 12 : end + 16] = struct.pack("<I", size)
    path.write_bytes(changed)
    refused(path, "beyond the end")


# --------------------------------------------------------------------- safetensors, JSON, shards

F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize("header, data, message", [
    ({"a": F32}, bytes(7), "end at byte"),
    ({"a": F32}, bytes(9), "end at byte"),
    ({"a": F32, "b": F32}, bytes(8), "begins at byte 0, expected 8"),
    ({"a": F32, "b": F32 | {"data_offsets": [4, 12]}}, bytes(12), "begins at byte 4"),
    ({"a": F32 | {"data_offsets": [8, 16]}}, bytes(16), "begins at byte 8"),
    ({"a": F32 | {"data_offsets": [8, 0]}}, bytes(8), "does not fill"),
    ({"a": F32 | {"data_offsets": [0, 8, 8]}}, bytes(8), "two numbers"),
    ({"a": F32 | {"data_offsets": [0, 8.0]}}, bytes(8), "list of sizes"),
    ({"a": F32 | {"data_offsets": [0, 2**64]}}, bytes(8), "does not fill"),
    ({"a": F32 | {"shape": [-2]}}, bytes(8), "list of sizes"),
    ({"a": F32 | {"shape": [True, 2]}}, bytes(8), "list of sizes"),
    ({"a": F32 | {"shape": "2"}}, bytes(8), "list of sizes"),
    ({"a": F32 | {"shape": [2**62, 4]}}, bytes(8), "does not fill"),
    ({"a": F32 | {"shape": [1] * 50}}, bytes(8), "which no model needs"),
    ({"a": F32 | {"dtype": "F4"}}, bytes(8), "unsupported dtype"),
    ({"a": F32 | {"dtype": ["F32"]}}, bytes(8), "unsupported dtype"),
    ({"a": F32 | {"x": 1}}, bytes(8), "exactly"),
    ({"a": [F32]}, bytes(8), "exactly"),
    ({"__metadata__": {"a": 1}, "a": F32}, bytes(8), "__metadata__"),
    ({"__metadata__": [], "a": F32}, bytes(8), "__metadata__"),
])  # fmt: skip
def test_headers_that_lie(tmp_path, header, data, message):
    file = tmp_path / "model.safetensors"
    file.write_bytes(safetensors(json.dumps(header).encode(), data))
    refused(file, message)


@pytest.mark.parametrize("data, message", [
    (struct.pack("<Q", 2**63) + b"{}", "its header would have"),
    (struct.pack("<Q", 2**64 - 1) + b"{}", "its header would have"),
    (safetensors(b"[]"), "not JSON"),
    (safetensors(b" {}"), "not JSON"),
    (safetensors(b"{" + b"\xff}"), "not text"),
    (safetensors(b'{"a":'), "not valid JSON"),
    (safetensors(b'{"a": 1, "a": 1}'), "'a' occurs twice"),
    (safetensors(b'{"a": {"dtype": "F32", "dtype": "F32"}}'), "'dtype' occurs twice"),
    (safetensors(b"{" + b" " * 5 * 2**20 + b"}"), "more than any model needs"),
])  # fmt: skip
def test_files_that_are_no_safetensors(tmp_path, data, message):
    file = tmp_path / "model.safetensors"
    file.write_bytes(data)
    refused(file, message)


def test_names_do_not_spoil_the_message(tmp_path):
    """Names with terminal escapes, line breaks or a million letters are quoted and cut."""
    write_config(tmp_path / "config.json", MambaConfig(d_model=4, n_layer=1, vocab_size=8))
    names = ["\x1b[2J", "a\nb", "x" * 10**6, *map(str, range(500))]
    save_file({name: np.zeros(1, np.float32) for name in names}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError) as info:
        Mamba.from_pretrained(tmp_path)
    assert "\x1b" not in str(info.value) and len(str(info.value)) < 5000
    assert "and 485 more" in str(info.value)


def test_shards_that_trick(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    save_file({"a": np.zeros(1, np.float32)}, tmp_path / "1.safetensors")
    save_file({"a": np.ones(1, np.float32)}, tmp_path / "2.safetensors")
    index.write_text('{"weight_map": {"a": "1.safetensors", "a": "2.safetensors"}}')
    refused(index, "'a' occurs twice")
    index.write_text('{"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}')
    with pytest.raises(CheckpointError, match=r"2\.safetensors: does not hold the tensors"):
        read_tensors(index)
    index.write_text('{"weight_map": {"a": "\\ud800.safetensors"}}')
    refused(index, "expected the name of a .safetensors file")


@pytest.mark.parametrize("text, message", [
    ('{"d_model": 8, "d_model": 9, "n_layer": 1, "vocab_size": 8}', "'d_model' occurs twice"),
    ('{"d_model": NaN, "n_layer": 1, "vocab_size": 8}', "d_model must be a positive integer"),
    ('{"d_model": 1e400, "n_layer": 1, "vocab_size": 8}', "d_model must be a positive integer"),
    ('{"d_model": "8", "n_layer": 1, "vocab_size": 8}', "d_model must be a positive integer"),
    ('{"d_model": 8, "n_layer": 1, "vocab_size": 8, "ssm_cfg": ' + "[" * 10**5, "not valid JSON"),
    ('{"d_model": ' + "9" * 10**5 + "}", "not valid JSON"),
])  # fmt: skip
def test_configurations_that_mean_harm(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        read_config(tmp_path / "config.json")


def test_json_has_a_largest_size(tmp_path):
    (tmp_path / "config.json").write_text('{"a": "' + "x" * 2**23 + '"}')
    with pytest.raises(CheckpointError, match="more than"):
        read_json(tmp_path / "config.json")


def test_a_large_configuration_allocates_nothing(tmp_path):
    import tracemalloc

    save_file({"backbone.embedding.weight": np.zeros((8, 4), np.float32)},
              tmp_path / "model.safetensors")  # fmt: skip
    text = {"d_model": 2**31 - 1, "n_layer": 1, "vocab_size": 2**31 - 1}
    (tmp_path / "config.json").write_text(json.dumps(text))
    tracemalloc.start()
    with pytest.raises(CheckpointError, match="wrong shape"):
        Mamba.from_pretrained(tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20


def test_the_checks_of_these_tests_can_fail(path):
    archive(path)
    assert identical(outcome(path), {"w": np.zeros(6, np.float32)})
    assert not identical(outcome(path), {"w": np.ones(6, np.float32)})
