"""What every scan says of its arguments: None where an array must be, and numbers of tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mamba.checks import check_chunk, choose_method
from mamba.scan import METHODS, selective_scan
from mamba.ssd import ssd
from mamba.trapezoid import trapezoidal_scan

B, L, H, R, P, N = 2, 3, 2, 1, 2, 4
SCANS = {  # name: (the function, the shapes of its arrays, those that may be None)
    "selective_scan": (
        selective_scan,
        {"x": (B, L, P), "delta": (B, L, P), "A": (P, N), "B": (B, L, N), "C": (B, L, N)}
        | {"D": (P,), "z": (B, L, P), "h0": (B, P, N), "resets": (B, L)},
        {"z", "h0", "resets"},
    ),
    "ssd": (
        ssd,
        {"x": (B, L, H, P), "delta": (B, L, H), "A": (H,), "B": (B, L, 1, N), "C": (B, L, 1, N)}
        | {"D": (H,), "h0": (B, H, P, N), "resets": (B, L)},
        {"D", "h0", "resets"},
    ),
    "trapezoidal_scan": (
        trapezoidal_scan,
        {"x": (B, L, H, R, P), "delta": (B, L, H), "A": (B, L, H), "lam": (B, L, H)}
        | {"B": (B, L, H, R, N), "C": (B, L, H, R, N), "theta": (B, L, H, 1)}
        | {"D": (H,), "resets": (B, L)},
        {"D", "resets"},
    ),
}
every_scan = pytest.mark.parametrize("name", SCANS)


def arrays(name, l=L):
    """Random arguments of a scan over l tokens."""
    rng = np.random.default_rng(0)
    _, shapes, _ = SCANS[name]
    found = {}
    for key, shape in shapes.items():
        timed = len(shape) > 1 and shape[:2] == (B, L)
        shape = (B, l, *shape[2:]) if timed else shape
        found[key] = rng.uniform(0.1, 1, shape).astype(np.float32)
    found["A"] = -found["A"]
    found["resets"] = np.zeros(found["resets"].shape, bool)
    return found


@every_scan
def test_only_what_may_be_none_is_none(name):
    """Shapes are enough to know: nothing is computed."""
    scan, shapes, optional = SCANS[name]
    for key in shapes:
        given = arrays(name) | {key: None}
        if key in optional:
            jax.eval_shape(lambda given=given: scan(**given))
        else:
            with pytest.raises(TypeError, match=f"^{key} must be an array, got NoneType$"):
                scan(**given)


@every_scan
@pytest.mark.parametrize("dtype", [np.int32, np.complex64, bool])
def test_numbers_of_another_kind_are_refused(name, dtype):
    """Integers would be rounded to, complex ones cut short."""
    scan, shapes, _ = SCANS[name]
    for key in shapes.keys() - {"resets"}:
        given = arrays(name)
        given[key] = given[key].astype(dtype)
        with pytest.raises(TypeError, match=f"^{key} must hold floating-point numbers, got "):
            scan(**given)
    with pytest.raises(TypeError, match="^resets must be bool"):
        scan(**arrays(name) | {"resets": np.zeros((B, L), np.int32)})


@every_scan
def test_lists_and_empty_arrays_are_refused(name):
    scan, shapes, _ = SCANS[name]
    for key in shapes:
        with pytest.raises(TypeError, match=f"^{key} must be an array, got list"):
            scan(**arrays(name) | {key: arrays(name)[key].tolist()})
    for l in (0, 1):
        given = {k: v[:l] if v.shape[:1] == (B,) else v for k, v in arrays(name, l).items()}
        given = given if l == 0 else {k: v[..., :0] for k, v in given.items()}
        with pytest.raises(ValueError, match="all >= 1"):
            scan(**given)


@every_scan
def test_any_integer_is_a_chunk(name):
    """NumPy's too, and where there is a single token."""
    scan, *_ = SCANS[name]
    for l in (1, L):
        given = arrays(name, l)
        y = jax.eval_shape(lambda given=given: scan(**given, chunk=np.int64(2)))
        assert y.shape == given["x"].shape


@pytest.mark.parametrize("chunk", [0, -1, 2.0, True, "2", None, np.float32(2)])
def test_what_is_no_chunk(chunk):
    with pytest.raises(ValueError, match="chunk must be a number of tokens, at least 1"):
        check_chunk(chunk)


def test_a_chunk_chooses_the_method_that_takes_it():
    assert choose_method("auto", ("a", "chunked"), "a", None) == "a"
    assert choose_method("auto", ("a", "chunked"), "a", 4) == "chunked"
    with pytest.raises(ValueError, match="method 'a' takes no chunk"):
        choose_method("a", ("a", "chunked"), "a", 4)


@pytest.mark.parametrize("method", [m for m in METHODS if m != "pallas"])
def test_gradients_of_the_rates_at_a_huge_time_step(method):
    """At Δ = 1e30 nothing is left of the state before: A changes nothing, by 0 and not by NaN."""
    given = arrays("selective_scan")
    given["delta"][:, 1] = 1e30
    given["x"][:, 1] = 1e-30
    grad = jax.grad(lambda A: selective_scan(**given | {"A": A}, method=method).sum())
    found = np.asarray(grad(jnp.asarray(given["A"])))
    assert np.isfinite(found).all()
    half = given | {"delta": np.where(given["delta"] > 1e9, 1e3, given["delta"])}
    half["x"] = np.where(given["x"] < 1e-9, 1e-3, given["x"])
    expected = jax.grad(lambda A: selective_scan(**half | {"A": A}, method=method).sum())
    np.testing.assert_allclose(found, expected(jnp.asarray(given["A"])), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["ssd", "trapezoidal_scan"])
@pytest.mark.parametrize("method", ["recurrence", "chunked"])
def test_gradients_of_the_other_rates_at_a_huge_time_step(name, method):
    scan, *_ = SCANS[name]
    given = arrays(name)
    given["delta"][:, 1] = 1e30
    found = jax.grad(lambda A: scan(**given | {"A": A}, method=method).sum())(given["A"])
    assert np.isfinite(found).all()
