"""A check of a chapter passes what is right, refuses what is wrong, and prints one line."""

import jax.numpy as jnp
import numpy as np
import pytest

from mamba_book import Checks, relative_error
from mamba_book.checks import unbroken

RIGHT = {"y": np.array([1.0, -4.0]), "h": [jnp.zeros((2, 3)) + 0.5]}


def off_by(error):
    """RIGHT with one number wrong by ``error`` times the largest of its array."""
    return {"y": np.array([1.0, -4.0]), "h": [RIGHT["h"][0].at[1, 2].add(0.5 * error)]}


def test_relative_error_is_that_of_the_worst_array():
    assert relative_error(RIGHT, RIGHT) == 0
    assert relative_error([2.0, np.array([3.0, 99.0])], [1.0, np.array([0.0, 100.0])]) == 1
    assert relative_error(np.float32([1, 5]), np.float64([1, 4])) == 0.25
    assert relative_error(0.0, 0.0) == 0 and relative_error(1e-9, 0.0) > 1


def test_relative_error_is_computed_in_float64():
    assert relative_error(np.float64(1 + 1e-12), np.float64(1)) == pytest.approx(1e-12, rel=1e-3)
    almost = jnp.full(3, 1 + 2**-8, jnp.bfloat16)  # which rounds it to 1
    assert relative_error(almost, np.ones(3)) == 0


@pytest.mark.parametrize("place", [0, 1])
def test_a_nan_is_an_error_wherever_it_stands(place):
    got = [np.ones(2), np.ones(2)]
    got[place] = np.array([1.0, np.nan])
    assert np.isnan(relative_error(got, [np.ones(2)] * 2))
    assert np.isnan(relative_error([np.ones(2)] * 2, got))


@pytest.mark.parametrize("want", [np.ones(1), np.ones((1, 3)), [np.ones(3)] * 2, 1.0])
def test_nothing_is_broadcast(want):
    with pytest.raises(ValueError, match="shapes"):
        relative_error(np.ones(3), want)


def test_what_agrees_prints_one_line_and_is_noted(capsys):
    checks = Checks()
    checks.close("the `scan`", "a `loop`", off_by(0.9e-5), RIGHT)
    checks.close("by hand", "a loop", off_by(0.9e-3), RIGHT, 1e-3)
    checks.close("copy", "original", RIGHT, RIGHT, tolerance=0)
    assert capsys.readouterr().out.splitlines() == [
        "the scan: agrees with a loop to 1e-5",
        "by hand: agrees with a loop to 1e-3",
        "copy: agrees with original exactly",
    ]
    assert [tolerance for *_, tolerance in checks.rows] == [
        "relative error ≤ 1e-5",
        "relative error ≤ 1e-3",
        "exact",
    ]


@pytest.mark.parametrize(
    ("got", "complaint"),
    [
        (off_by(1.1e-5), "1.1e-05, not within 1e-5"),
        (off_by(-1.0), "1.0e[+]00"),
        (off_by(np.nan), "error nan"),
        (off_by(np.inf), "error inf"),
        ({"y": RIGHT["y"], "h": [np.full((3, 2), 0.5)]}, r"shapes \[\(3, 2\)"),
        ({"y": RIGHT["y"]}, "shapes"),
    ],
)
def test_what_differs_is_refused(got, complaint, capsys):
    checks = Checks()
    with pytest.raises(AssertionError, match=f"the scan, compared with a loop: .*{complaint}"):
        checks.close("the scan", "a loop", got, RIGHT)
    assert checks.rows == [] and capsys.readouterr().out == ""


def test_exact_is_exact():
    with pytest.raises(AssertionError, match="not within 0e"):
        Checks().close("copy", "original", np.float64(1 + 2**-52), np.float64(1), tolerance=0)


def test_a_condition(capsys):
    checks = Checks()
    checks.holds("`stream`", "`generate`", np.bool_(True))
    checks.holds("answers", "512 sequences", jnp.array(3) > 2, "at least 90 % right")
    assert capsys.readouterr().out.splitlines() == [
        "stream: equal (generate)",
        "answers: at least 90 % right (512 sequences)",
    ]
    for wrong in (False, np.bool_(False), jnp.array(0) > 0, 0, None):
        with pytest.raises(AssertionError, match=r"answers: not equal \(the file\)"):
            checks.holds("answers", "the file", wrong)
    with pytest.raises(ValueError, match="ambiguous"):
        checks.holds("answers", "the file", np.array([True, False]))
    assert len(checks.rows) == 2


def test_what_was_checked_several_times_prints_once_and_is_counted(capsys):
    checks = Checks()
    for _ in range(3):
        checks.close("the scan", "a loop", 1.0, 1.0)
    assert capsys.readouterr().out == "the scan: agrees with a loop to 1e-5\n"
    with pytest.raises(AssertionError):  # also after the first time
        checks.close("the scan", "a loop", 1.1, 1.0)
    checks.holds("`stream`", "`generate`", True, "bit for bit")
    assert checks.table().data.splitlines()[2:] == [
        "| the scan | a loop | relative error ≤ 1e\u20115 | holds, 3 times |",
        "| `stream` | `generate` | bit for bit | holds |",
    ]


def test_only_the_hyphen_of_a_number_is_replaced():
    assert unbroken("well-known, 3e-13 or 1e-5") == "well-known, 3e\u201113 or 1e\u20115"
