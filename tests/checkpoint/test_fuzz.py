"""Random weights files: valid ones are read bit for bit, broken ones are read or refused.

Hypothesis draws the files, the same ones on every run. scripts/fuzz_checkpoint.py (`make fuzz`)
searches for files that break the same properties, guided by the code that they reach.
"""

import json
import struct
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from mamba.checkpoint.files import write_tensors
from mamba.checkpoint.tensors import CheckpointError
from tests.helpers import bin_files as b
from tests.helpers.hostile import KINDS, FakeTorch, identical, outcome, structure

BINS = Path(__file__).parents[1] / "golden" / "bin"
SEEDS = [*sorted(BINS.glob("*.bin")), BINS / "dtypes.safetensors", BINS / "views.safetensors"]
many = settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
DTYPES = {name: np.dtype(getattr(ml_dtypes, name, None) or name) for name in KINDS}
names = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


@st.composite
def arrays(draw):
    dtype = DTYPES[draw(st.sampled_from(sorted(DTYPES)))]
    shape = tuple(draw(st.lists(st.integers(0, 4), max_size=4)))
    nbytes = int(np.prod(shape)) * dtype.itemsize
    data = draw(st.binary(min_size=nbytes, max_size=nbytes))
    if dtype == np.bool_:
        data = bytes(byte % 2 for byte in data)
    return np.frombuffer(data, dtype).reshape(shape)


@st.composite
def checkpoints(draw):
    """(storages, {name: tensor as FakeTorch takes it}, {name: what it must be read as})."""
    storages = []
    for _ in range(draw(st.integers(1, 3))):
        kind = draw(st.sampled_from(sorted(DTYPES)))
        count = draw(st.integers(0, 24))
        dtype = DTYPES[kind]
        data = draw(st.binary(min_size=count * dtype.itemsize, max_size=count * dtype.itemsize))
        if kind == "bool":
            data = bytes(byte % 2 for byte in data)
        storages.append((kind, np.frombuffer(data, dtype)))
    items, expected = {}, {}
    for name in draw(st.lists(names, max_size=5, unique=True)):
        key = draw(st.integers(0, len(storages) - 1))
        kind, numbers = storages[key]
        # A view: grow a shape axis by axis, as long as all that it reaches lies inside.
        offset = draw(st.integers(0, len(numbers)))
        shape, strides, last = [], [], offset
        for _ in range(draw(st.integers(0, 3))):
            n, stride = draw(st.integers(0, 4)), draw(st.integers(0, 6))
            grown = last + max(n - 1, 0) * stride
            if grown < len(numbers) and np.prod([*shape, n], dtype=int) <= len(numbers):
                shape.append(n)
                strides.append(stride)
                last = grown
        if last >= len(numbers):  # nothing to see there: an empty tensor
            shape, strides = [0, 3], [3, 1]
            view = np.zeros((0, 3), numbers.dtype)
        else:
            places = np.full((), offset)
            for n, stride in zip(shape, strides):
                places = places[..., None] + np.arange(n) * stride
            view = numbers[places]
        items[name] = (str(key), KINDS[kind], len(numbers), offset, shape, strides)
        expected[name] = view
    return [numbers.tobytes() for _, numbers in storages], items, expected


# --------------------------------------------------------------------------------- valid files


@many
@given(checkpoints(), st.integers(2, 5), st.booleans())
def test_what_torch_could_write_is_read_bit_for_bit(path, checkpoint, protocol, parameters):
    storages, items, expected = checkpoint
    chosen = list(items)[::2] if parameters else ()
    b.write_archive(path, FakeTorch.dumps(items, protocol, chosen), storages)
    found = outcome(path)
    assert not isinstance(found, CheckpointError), found
    assert list(found) == list(expected) and identical(found, expected)


@many
@given(st.dictionaries(names.filter(lambda name: name != "__metadata__"), arrays(), max_size=4))
def test_safetensors_there_and_back(tmp_path, expected):
    file = tmp_path / "model.safetensors"
    write_tensors(file, expected)
    found = outcome(file)
    assert not isinstance(found, CheckpointError), found
    assert identical(found, expected)
    assert identical(found, load_file(file))


# -------------------------------------------------------------------------------- broken files


@st.composite
def breakages(draw):
    """A function that flips, sets, cuts, deletes, inserts, swaps or repeats bytes."""
    steps = []
    for _ in range(draw(st.integers(1, 4))):
        kind = draw(st.sampled_from(["flip", "set", "cut", "delete", "insert", "swap", "repeat"]))
        steps.append((kind, *draw(st.tuples(*[st.integers(0, 2**20)] * 3)), draw(st.binary())))

    def change(data, spots=None):
        for kind, i, j, k, new in steps:
            if not data:
                break
            at = spots[i % len(spots)] if spots else i % len(data)
            at, n = min(at, len(data) - 1), k % 40
            other = j % len(data)
            if kind == "flip":
                data = data[:at] + bytes([data[at] ^ 1 << k % 8]) + data[at + 1 :]
            elif kind == "set":
                data = data[:at] + new[: len(data) - at] + data[at + len(new) :]
            elif kind == "cut":
                data = data[:at]
            elif kind == "delete":
                data = data[:at] + data[at + n :]
            elif kind == "insert":
                data = data[:at] + new + data[at:]
            elif kind == "swap" and abs(at - other) >= n:
                at, other = sorted((at, other))
                data = (
                    data[:at]
                    + data[other : other + n]
                    + data[at + n : other]
                    + data[at : at + n]
                    + data[other + n :]
                )
            elif kind == "repeat":
                data = data[:at] + data[at : at + n] + data[at:]
        return data

    return change


@many
@given(st.sampled_from(SEEDS), breakages())
def test_a_broken_file_is_read_or_refused(tmp_path, seed, change):
    file = tmp_path / seed.name
    file.write_bytes(change(seed.read_bytes()))
    outcome(file)


@many
@given(st.sampled_from(SEEDS[:-2]), breakages())
def test_broken_headers_of_the_archive(tmp_path, seed, change):
    file = tmp_path / seed.name
    if seed.stem == "legacy":
        return
    data = seed.read_bytes()
    file.write_bytes(change(data, structure(data)))
    outcome(file)


@many
@given(checkpoints(), st.integers(2, 5), breakages())
def test_a_broken_pickle_in_a_good_archive(path, checkpoint, protocol, change):
    storages, items, _ = checkpoint
    b.write_archive(path, change(FakeTorch.dumps(items, protocol)), storages)
    outcome(path)


opcodes = st.one_of(
    st.integers(0, 255).map(lambda byte: bytes([byte])),
    st.sampled_from([b"(", b")", b"}", b"u", b"s", b"R", b"Q", b"t", b"0", b"b", b"2", b"\x94"]),
    st.sampled_from([b"h\0", b"q\0", b"\x85", b"\x86", b"\x87", b"\x88", b"N", b"\x93", b"."]),
    st.integers(-(2**70), 2**70).map(b.integer),
    st.text(max_size=5).map(
        lambda text: b"X" + struct.pack("<I", len(text.encode())) + text.encode()
    ),
    st.sampled_from(sorted(KINDS.values())).map(lambda kind: b.symbol("torch", kind)),
    st.just(b.symbol("torch._utils", "_rebuild_tensor_v2")),
    st.just(b.symbol("torch._utils", "_rebuild_parameter")),
    st.just(b.storage("0", "FloatStorage", 6)),
    st.just(b.tensor(b.storage("0", "FloatStorage", 6), 0, (2, 3), (3, 1))),
    st.just(b.ORDERED_DICT),
)


@many
@given(st.lists(opcodes, max_size=30))
def test_any_sequence_of_opcodes(path, program):
    b.write_archive(path, b.PROTO + b"".join(program) + b.STOP, [bytes(24)])
    outcome(path)


sizes = st.one_of(st.integers(-3, 12), st.sampled_from([2**31, 2**32 - 1, 2**62, 2**63, 2**64]))


@many
@given(
    sizes, st.lists(st.tuples(sizes, sizes), max_size=4), st.sampled_from(sorted(KINDS.values()))
)
def test_any_offset_shape_and_strides(path, offset, axes, kind):
    shape, strides = [n for n, _ in axes], [stride for _, stride in axes]
    value = b.tensor(b.storage("0", kind, 3), offset, shape, strides)
    b.write_archive(path, b.PROTO + b.dict_of({"w": value}) + b.STOP, [bytes(24)])
    outcome(path)


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), sizes, st.floats(), st.text(max_size=5)),
    lambda inner: st.one_of(st.lists(inner), st.dictionaries(st.text(max_size=5), inner)),
    max_leaves=6,
)
entries = st.fixed_dictionaries(
    {
        "dtype": st.one_of(st.sampled_from(["F32", "BF16", "I8", "F8_E4M3"]), json_values),
        "shape": st.one_of(st.lists(sizes, max_size=3), json_values),
        "data_offsets": st.one_of(st.lists(sizes, min_size=2, max_size=2), json_values),
    },
    optional={"more": json_values},
)


@many
@given(st.dictionaries(st.text(max_size=3), entries | json_values, max_size=3), st.binary())
def test_any_safetensors_header(tmp_path, header, data):
    """What we accept, the format's own library accepts too, and reads the same."""
    file = tmp_path / "model.safetensors"
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)
    found = outcome(file)
    if not isinstance(found, CheckpointError):
        assert identical(found, load_file(file))


@many
@given(breakages())
def test_we_accept_no_more_safetensors_than_their_library(tmp_path, change):
    file = tmp_path / "model.safetensors"
    original = {"a": np.arange(3, dtype=np.float32), "b": np.ones((2, 2), np.int8)}
    save_file(original, file, metadata={"format": "pt"})
    file.write_bytes(change(file.read_bytes()))
    found = outcome(file)
    if not isinstance(found, CheckpointError):
        try:
            theirs = load_file(file)
        except safetensors.SafetensorError as error:
            pytest.fail(f"accepted, though the library says: {error}")
        assert identical(found, theirs)
