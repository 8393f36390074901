"""ssd against a float64 loop: values, states, gradients, groups, awkward lengths, bad input."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mamba.ssd import METHODS, ssd
from mamba_book.reference import relative_error, ssd_gradients, ssd_loop

NAMES = ["x", "delta", "A", "B", "C", "D", "h0"]
ALONG_TIME = {"x", "delta", "B", "C"}


def random_inputs(b, l, h, p, n, g, seed=0):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.normal(size=shape)  # noqa: E731
    return {
        "x": normal(b, l, h, p),
        "delta": np.exp(rng.uniform(np.log(1e-3), np.log(1.0), (b, l, h))),
        "A": -rng.uniform(0.1, 16, h),
        "B": normal(b, l, g, n),
        "C": normal(b, l, g, n),
        "D": normal(h),
        "h0": normal(b, h, p, n),
    }


def as_float32(inputs):
    return {k: np.float32(v) for k, v in inputs.items()}


@partial(jax.jit, static_argnames=("method", "chunk"))
def with_gradients(inputs, dy, dh, resets=None, method="auto", chunk=None):
    """-> (y, h), and the gradients of Σ dy ⊙ y + Σ dh ⊙ h in every argument."""
    f = partial(ssd, resets=resets, method=method, chunk=chunk, return_state=True)
    out, pull = jax.vjp(lambda v: f(**v), inputs)
    return out, pull((jnp.float32(dy), jnp.float32(dh)))[0]


def cotangents(inputs, seed=1):
    rng = np.random.default_rng(seed)
    return rng.normal(size=inputs["x"].shape), rng.normal(size=inputs["h0"].shape)


def check(inputs, resets, method, chunk=None):
    dy, dh = cotangents(inputs)
    (y, h), grads = with_gradients(as_float32(inputs), dy, dh, resets, method, chunk)
    y_ref, h_ref = ssd_loop(**inputs, resets=resets)
    assert relative_error(y, y_ref) < 2e-5
    assert relative_error(h, h_ref) < 2e-5
    expected = ssd_gradients(dy, dh, **inputs, resets=resets)
    for name in NAMES:
        assert relative_error(grads[name], expected[name]) < 2e-4, name


@pytest.mark.parametrize("method", ["auto", *METHODS])
@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize(
    ("b", "l", "h", "p", "n", "g"),
    [(2, 1, 4, 3, 5, 2), (1, 2, 2, 1, 1, 1), (2, 63, 3, 4, 5, 3), (1, 129, 6, 2, 3, 2)],
)
def test_agrees_with_float64(method, b, l, h, p, n, g, reset):
    inputs = random_inputs(b, l, h, p, n, g, seed=l)
    resets = np.random.default_rng(0).uniform(size=(b, l)) < 0.1 if reset else None
    check(inputs, resets, method)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("g", [1, 2, 3, 6])
def test_groups_from_one_to_the_heads(method, g):
    check(
        random_inputs(1, 37, 6, 2, 3, g, seed=g), None, method, 8 if method == "chunked" else None
    )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("l", [517, 4096])
def test_long(method, l):
    resets = np.random.default_rng(l).uniform(size=(1, l)) < 0.003
    check(random_inputs(1, l, 4, 2, 3, 2, seed=l), resets, method)


@pytest.mark.parametrize("method", METHODS)
def test_long_memory(method):
    """Time steps so small that the first token still counts after 4,096: nothing is cut off."""
    inputs = random_inputs(1, 4096, 2, 2, 3, 1)
    inputs["delta"] *= 1e-4
    check(inputs, None, method)


@pytest.mark.parametrize("method", ["auto", *METHODS])
def test_what_is_left_out(method):
    """No D is 0, no h0 is zeros, and without ``return_state`` there is only y."""
    inputs = as_float32(random_inputs(2, 40, 4, 2, 3, 2))
    zeros = inputs | {name: np.zeros_like(inputs[name]) for name in ("D", "h0")}
    expected, _ = ssd_loop(**zeros)
    y = ssd(**{k: inputs[k] for k in ("x", "delta", "A", "B", "C")}, method=method)
    assert relative_error(y, expected) < 2e-5


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("steps", ["all", "some", "none"])
def test_extreme_steps(method, steps):
    """Δ A of −1,000 forgets all at once, and Δ = 0 nothing: no inf and no NaN in any gradient."""
    inputs = random_inputs(1, 45, 2, 2, 3, 1)
    inputs["A"] = np.array([-1.0, -16.0])
    rng = np.random.default_rng(2)
    far = 1000 / -inputs["A"]
    size = {"all": 1.0, "some": rng.uniform(size=(1, 45, 1)) < 0.2, "none": 0.0}[steps]
    inputs["delta"] = np.where(size, far, 1e-3 if steps == "some" else 0.0) * np.ones((1, 45, 2))
    check(inputs, None, method)


@pytest.mark.parametrize("method", METHODS)
def test_a_decay_between_small_and_forgotten(method):
    """Around e^−87, the least decay that counts, and where many small ones add up to it."""
    inputs = random_inputs(1, 60, 3, 1, 2, 1)
    inputs["A"] = np.array([-1.0, -20.0, -86.9])
    inputs["delta"] = np.random.default_rng(3).uniform(0.9, 1.1, (1, 60, 3))
    check(inputs, None, method)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("fast", [-80.0, -16.0])
def test_fast_steps_among_slow_ones(method, fast):
    """Steps that forget almost all, and nearly none: sums grow, and differences stay small."""
    inputs = random_inputs(1, 129, 2, 2, 3, 1)
    inputs["A"] = np.array([fast, fast / 1.1])
    among = np.random.default_rng(5).uniform(size=(1, 129, 2)) < 0.3
    inputs["delta"] = np.where(among, 1.0, 1e-4)
    check(inputs, None, method)


def test_sums_of_a_long_chunk_of_fast_steps():
    """Beyond 2^18, where float32 no longer holds every 64th."""
    inputs = random_inputs(1, 4000, 1, 1, 1, 1)
    inputs["A"] = np.array([-1.0])
    inputs["delta"] = np.where(np.arange(4000) < 3600, 80.0, 0.01)[None, :, None]
    y, h = jax.jit(partial(ssd, method="quadratic", return_state=True))(**as_float32(inputs))
    y_ref, h_ref = ssd_loop(**inputs)
    assert relative_error(y, y_ref) < 2e-5 and relative_error(h, h_ref) < 2e-5


@pytest.mark.parametrize("method", METHODS)
def test_a_reset_discards_nan(method):
    inputs = as_float32(random_inputs(2, 9, 2, 2, 3, 1))
    resets = np.zeros((2, 9), bool)
    resets[0, 0] = resets[0, 5] = resets[1, 4] = True
    inputs["h0"][0] = np.nan
    inputs["x"][1, 2] = np.inf
    y, h = ssd(**inputs, resets=resets, method=method, return_state=True)
    clean = inputs | {"h0": np.zeros_like(inputs["h0"])}
    clean["x"] = np.where(np.isfinite(inputs["x"]), inputs["x"], np.float32(0))
    expected, state = ssd(**clean, resets=resets, method=method, return_state=True)
    assert relative_error(h, state) < 1e-6 and relative_error(y[0], expected[0]) < 1e-6
    assert not np.isfinite(y[1, 2:4]).any()
    if method == "recurrence":
        assert relative_error(y[1, 4:], expected[1, 4:]) < 1e-6


@pytest.mark.parametrize("method", METHODS)
def test_no_gradient_crosses_a_reset(method):
    inputs = as_float32(random_inputs(1, 9, 2, 2, 3, 1))
    resets = np.zeros((1, 9), bool)
    resets[0, 4] = True
    gradients = jax.grad(lambda v: ssd(**v, resets=resets, method=method)[:, 4:].sum())(inputs)
    assert not np.asarray(gradients["h0"]).any()
    for name in ("x", "delta", "B"):
        assert not np.asarray(gradients[name])[:, :4].any() and np.asarray(gradients[name]).any()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_computes_in_float32_and_returns_the_dtype_of_x(dtype):
    inputs = {k: jnp.asarray(v, dtype) for k, v in random_inputs(1, 33, 2, 2, 3, 1).items()}
    y, h = ssd(**inputs, return_state=True)
    expected, state = ssd_loop(**{k: np.asarray(v, np.float64) for k, v in inputs.items()})
    assert y.dtype == dtype and h.dtype == jnp.float32
    assert relative_error(h, state) < 2e-5 and relative_error(y, expected) < 1e-2


def test_memory_of_a_backward_pass_grows_linearly():
    """And is less than half of what the states of all tokens would take."""

    def peak(l):
        inputs = as_float32(random_inputs(1, l, 2, 8, 16, 1))
        program = jax.jit(jax.grad(lambda v: ssd(**v).sum())).lower(inputs).compile()
        return program.memory_analysis().temp_size_in_bytes

    assert peak(4096) < 2.2 * peak(2048)
    assert peak(2048) < (2048 * 2 * 8 * 16 * 4) / 2


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": np.zeros((1, 5, 2), np.float32)}, ValueError, "x must have shape"),
        ({"delta": np.zeros((1, 5, 3), np.float32)}, ValueError, "delta must have shape"),
        ({"A": np.zeros((2, 3), np.float32)}, ValueError, "A must have shape"),
        ({"C": np.zeros((1, 5, 1, 4), np.float32)}, ValueError, "C must have shape"),
        ({"A": np.zeros(2, np.complex64)}, TypeError, "A must hold floating-point"),
        ({"B": np.zeros((1, 5, 1, 0), np.float32)}, ValueError, "all >= 1"),
        ({"x": np.zeros((1, 0, 2, 2), np.float32)}, ValueError, "all >= 1"),
        ({"method": "tree"}, ValueError, "unknown method 'tree'"),
        ({"method": "quadratic", "chunk": 4}, ValueError, "'quadratic' takes no chunk"),
        ({"method": "chunked", "chunk": 0}, ValueError, "chunk must be a number of tokens"),
        ({"resets": np.zeros((1, 5))}, TypeError, "resets must be bool"),
        ({"x": [1.0]}, TypeError, "x must be an array"),
    ],
)
def test_bad_input(change, error, message):
    with pytest.raises(error, match=message):
        ssd(**(as_float32(random_inputs(1, 5, 2, 2, 3, 1)) | change))


def test_groups_divide_the_heads():
    with pytest.raises(ValueError, match="got 2 groups and 3 heads"):
        ssd(**as_float32(random_inputs(1, 5, 3, 2, 3, 2)))


@pytest.mark.parametrize("chunk", [1, 2, 7, 64, 1000])
def test_any_chunk(chunk):
    check(random_inputs(2, 21, 4, 3, 2, 4), None, "chunked", chunk)
