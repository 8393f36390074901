"""Safetensors, shards and JSON are read bit for bit or refused. Writing survives interruptions."""

import json
import os
import random
import stat
import struct
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from mamba.checkpoint.files import (
    read_json,
    read_tensors,
    shard_names,
    write_atomically,
    write_tensors,
)
from mamba.checkpoint.tensors import CheckpointError
from tests.helpers.checkpoints import assert_same_arrays, read_arrays
from tests.helpers.hostile import refused

BINS = Path(__file__).parents[1] / "golden" / "bin"


def test_git_lfs_pointer(path, tmp_path):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"
    for file in (path, tmp_path / "model.safetensors"):
        file.write_bytes(pointer)
        refused(file, "git lfs pull")


@pytest.mark.parametrize("source", ["module.bin", "views.bin", "dtypes.safetensors"])
def test_every_change_is_read_or_refused(tmp_path, source):
    """With random bytes changed, we raise our own error or return arrays of the announced sizes."""
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
    assert_same_arrays(read_arrays(path), ARRAYS)
    assert read_tensors(path)["bf16"].shape == (4, 1)
    assert "torch" not in sys.modules


def test_an_array_in_another_order_is_not_shuffled(tmp_path):
    array = np.arange(6, dtype=np.float32).reshape(2, 3).T
    write_tensors(tmp_path / "model.safetensors", {"w": array})
    np.testing.assert_array_equal(read_arrays(tmp_path / "model.safetensors")["w"], array)


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
    assert_same_arrays(read_arrays(path), ARRAYS)

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


# -------------------------------------------------------------------------- writing safely


def test_a_file_is_replaced_by_the_whole_new_one(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with write_atomically(path) as part:
        assert part.parent == path.parent  # else the rename could cross file systems
        part.write_bytes(b"new, and ")
        assert path.read_bytes() == b"old"
        with open(part, "ab") as file:
            file.write(b"longer")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new, and longer"
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("before", [b"old", None])
def test_an_exception_while_writing_leaves_what_was_there(tmp_path, before):
    path = tmp_path / "file"
    if before is not None:
        path.write_bytes(before)
    with pytest.raises(KeyboardInterrupt), write_atomically(path) as part:
        part.write_bytes(b"half of the ne")
        raise KeyboardInterrupt
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [before] * (before is not None)


def test_the_content_is_on_disk_before_it_gets_the_name(tmp_path, monkeypatch):
    """And the name is on disk before the block ends: then even a power failure loses nothing."""
    events = []

    def fsync(descriptor):
        kind = "folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file"
        events.append(f"sync {kind}")

    def replace(source, target):
        events.append(f"rename to {target.name}")
        os.rename(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    with write_atomically(tmp_path / "file") as part:
        part.write_bytes(b"new")
        assert events == []
    assert events == ["sync file", "rename to file", "sync folder"]


@pytest.mark.parametrize("name", ["a.safetensors", "a.bin"])
def test_a_pipe_or_a_folder_is_not_opened(tmp_path, name):
    path = tmp_path / name
    os.mkfifo(path)
    with pytest.raises(CheckpointError, match="a pipe or a device, not a file"):
        read_tensors(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(CheckpointError, match="a folder, not a file"):
        read_tensors(path)


def test_a_file_whose_name_says_another_format(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    write_tensors(path, {"a": np.zeros(3)})
    with pytest.raises(CheckpointError, match="safetensors file: rename it to model.safetensors"):
        read_tensors(path)
    (tmp_path / "model.safetensors").write_bytes((BINS / "module.bin").read_bytes())
    with pytest.raises(CheckpointError, match="PyTorch's format: rename it to pytorch_model.bin"):
        read_tensors(tmp_path / "model.safetensors")


def test_a_link_in_the_place_of_the_part_is_not_followed(tmp_path):
    """In a folder that others write to, it could lead to any file of the user's."""
    (tmp_path / "precious").write_bytes(b"precious")
    (tmp_path / "a.safetensors.part").symlink_to(tmp_path / "precious")
    with write_atomically(tmp_path / "a.safetensors") as part:
        write_tensors(part, {"a": np.zeros(3)})
    assert (tmp_path / "precious").read_bytes() == b"precious"
    assert not (tmp_path / "a.safetensors").is_symlink()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors", "precious"]
