"""What all readers share: comparing tensors with a table, and quoting values in errors."""

import re

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from mamba.checkpoint.tensors import CheckpointError, abridged, compare_tensors, on_disk, quote

EXPECTED = {"a": ((2, 3), jnp.floating), "b": ((4,), np.dtype("float32")), "c": ((), np.bool_)}
FOUND = {
    "a": ((2, 3), np.dtype(ml_dtypes.bfloat16)),
    "b": ((4,), np.dtype("float32")),
    "c": ((), np.dtype(bool)),
}


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_expected_tensors(dtype):
    compare_tensors("file", EXPECTED, FOUND | {"a": ((2, 3), jnp.dtype(dtype))})


@pytest.mark.parametrize(
    "changes, line",
    [
        (
            {"a": ((2, 3), np.dtype("int32"))},
            "wrong dtype: a: expected floating point, found int32",
        ),
        ({"b": ((4,), np.dtype("float16"))}, "wrong dtype: b: expected float32, found float16"),
        ({"b": ((4,), np.dtype("float64"))}, "wrong dtype: b: expected float32, found float64"),
        ({"c": ((), np.dtype("uint8"))}, "wrong dtype: c: expected bool, found uint8"),
        ({"b": ((3,), np.dtype("float32"))}, "wrong shape: b: expected (4,), found (3,)"),
        ({"a": ((3, 2), np.dtype("float32"))}, "wrong shape: a: expected (2, 3), found (3, 2)"),
        ({"d\n": ((1,), np.dtype("float32"))}, "unexpected: 'd\\n' (1,)"),
    ],
)
def test_a_tensor_that_is_not_as_expected(changes, line):
    with pytest.raises(CheckpointError) as info:
        compare_tensors("file", EXPECTED, FOUND | changes)
    assert str(info.value) == f"file: these are not the tensors of this model\n  {line}"


def test_missing_tensors():
    with pytest.raises(CheckpointError, match=re.escape("\n  missing: b (4,)\n  missing: c ()")):
        compare_tensors("file", EXPECTED, {"a": FOUND["a"]})


def test_values_in_errors_are_short_and_on_one_line():
    assert quote("name") == "'name'" and quote([1, None]) == "[1, None]"
    assert quote("\x1b[2J\n\ud800") == r"'\x1b[2J\n\ud800'"
    for value in ("x" * 10**6, "\U0001f40d\0" * 10**6, list(range(10**5))):
        assert len(quote(value)) <= 701 and quote(value).endswith("…")


def test_a_long_list_is_abridged():
    assert abridged(["a", "b"], 2) == ["a", "b"]
    assert abridged(["a", "b", "c", "d"], 2) == ["a", "b", "and 2 more"]


def test_a_tensor_on_disk(tmp_path):
    """Rows, the transpose and an empty array, as NumPy has them; not writable, and read lazily."""
    path = tmp_path / "numbers"
    numbers = np.arange(12, dtype=np.float32).reshape(3, 4)
    path.write_bytes(b"head" + numbers.tobytes())
    rows = on_disk(path, np.float32, 4, (3, 4))
    columns = on_disk(path, np.float32, 4, (4, 3), (1, 4))
    part = on_disk(path, np.float32, 4 + 4 * 5, (2, 2), (4, 2))
    empty = on_disk(path, np.float32, 4, (0, 5))
    for tensor, expected in [
        (rows, numbers),
        (columns, numbers.T),
        (part, numbers[1:, 1::2]),
        (empty, np.zeros((0, 5), np.float32)),
    ]:
        assert (tensor.shape, tensor.nbytes) == (expected.shape, expected.nbytes)
        np.testing.assert_array_equal(tensor.read(), expected)
    with pytest.raises(ValueError, match="read-only"):
        rows.read()[0, 0] = 1
    path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="numbers: changed while it was being read"):
        rows.read()
