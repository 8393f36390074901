"""Archives that are broken, or that PyTorch would not have written, are refused."""

import struct
import zipfile
from pathlib import Path

import pytest

from tests.helpers import bin_files as b
from tests.helpers.hostile import refused

BINS = Path(__file__).parents[1] / "golden" / "bin"


def small(path, **options):
    value = b.tensor(b.storage("0", "FloatStorage", 64), 0, (64,), (1,))
    pickled = b.PROTO + b.dict_of({"w": value}) + b.STOP
    b.write_archive(path, pickled, [bytes(256)], **options)


def test_not_an_archive(path):
    for data in [b"", b"PK\3\4", b"PK\5\6" + bytes(18), bytes(1000), b'{"a": 1}']:
        path.write_bytes(data)
        refused(path)


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
    """Members may not share bytes of the file, or a small file could turn into a large one."""
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
    refused(path, "more than any state dict")


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
