"""trapezoidal_scan against a float64 loop and a matrix; padding, resets, angles, bad input."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mamba.rotation import PAIRS
from mamba.trapezoid import METHODS, TrapezoidState, trapezoidal_scan
from mamba_book.reference import relative_error, trapezoid_gradients, trapezoid_loop

ALONG_TIME = ("x", "delta", "A", "lam", "B", "C", "theta")
STATE = TrapezoidState._fields
scan = jax.jit(trapezoidal_scan, static_argnames=("pairs", "method", "chunk", "return_state"))


def random_inputs(b, l, h, r, p, n, s, seed=0):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.normal(size=shape)  # noqa: E731
    state = (
        rng.uniform(-3, 3, (b, h, s)),
        normal(b, h, p, n),
        normal(b, h, r, n),
        normal(b, h, r, p),
    )
    return {
        "x": normal(b, l, h, r, p),
        "delta": np.exp(rng.uniform(np.log(1e-3), np.log(1.0), (b, l, h))),
        "A": -rng.uniform(0.1, 16, (b, l, h)),
        "lam": rng.uniform(size=(b, l, h)),
        "B": normal(b, l, h, r, n),
        "C": normal(b, l, h, r, n),
        "theta": np.float64(np.float32(rng.uniform(-3, 3, (b, l, h, s)))),
        "D": normal(h),
        "state": TrapezoidState(*state),
    }


def as_float32(inputs):
    return jax.tree.map(np.float32, inputs)


def error(actual, expected):
    """The largest relative error of arrays with elements: s may be 0."""
    pairs = zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
    return max((relative_error(a, e) for a, e in pairs if np.size(e)), default=0.0)


def angle_error(actual, expected):
    """Radians between two angles, whatever the number of whole turns between them."""
    difference = np.float64(actual) - np.float64(expected)
    return np.abs(np.angle(np.exp(1j * difference))).max(initial=0.0)


@partial(jax.jit, static_argnames=("pairs", "method", "chunk"))
def with_gradients(inputs, dy, dstate, resets, pairs, method, chunk):
    """-> (y, state), and the gradients of Σ dy ⊙ y + Σ dstate ⊙ state in every argument."""
    options = {"pairs": pairs, "resets": resets, "method": method, "chunk": chunk}
    out, pull = jax.vjp(lambda v: scan(**v, **options, return_state=True), inputs)
    return out, pull((dy, dstate))[0]


def check(inputs, pairs="interleaved", resets=None, method="auto", chunk=None):
    rng = np.random.default_rng(1)
    dy, *dstate = (rng.normal(size=v.shape) for v in (inputs["x"], *inputs["state"]))
    dstate = TrapezoidState(*dstate)
    arguments = as_float32((inputs, dy, dstate))
    (y, state), grads = with_gradients(*arguments, resets, pairs, method, chunk)
    y_ref, state_ref = trapezoid_loop(**inputs, pairs=pairs, resets=resets)
    assert relative_error(y, y_ref) < 2e-5
    assert angle_error(state.angle, state_ref[0]) < 2e-6
    assert np.abs(state.angle).max(initial=0) < 3.1416
    for name, actual, expected in zip(STATE[1:], state[1:], state_ref[1:], strict=True):
        assert relative_error(actual, expected) < 2e-5, name
    expected = trapezoid_gradients(dy, dstate, **inputs, pairs=pairs, resets=resets)
    for name in grads:
        assert error(grads[name], expected[name]) < 2e-4, name


def some(shape, probability, seed=0):
    return np.random.default_rng(seed).uniform(size=shape) < probability


# --- against the loop ---------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize(
    ("b", "l", "h", "r", "p", "n", "s", "pairs"),
    [
        (2, 1, 3, 1, 3, 4, 2, "interleaved"),
        (1, 2, 2, 4, 1, 5, 1, "interleaved"),
        (2, 63, 2, 4, 3, 6, 2, "halves"),
        (1, 129, 3, 1, 2, 4, 2, "halves"),
    ],
)
def test_agrees_with_float64(method, b, l, h, r, p, n, s, pairs, reset):
    resets = some((b, l), 0.1) if reset else None
    check(random_inputs(b, l, h, r, p, n, s, seed=l), pairs, resets, method)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize("s", [0, 3])
def test_any_number_of_angles(method, pairs, s):
    check(random_inputs(1, 21, 2, 2, 2, 6, s), pairs, None, method)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("l", "r"), [(517, 1), (517, 4), (4096, 1)])
def test_long(method, l, r):
    check(random_inputs(1, l, 2, r, 2, 4, 2, seed=l), "halves", some((1, l), 0.003), method)


@pytest.mark.parametrize("chunk", [1, 2, 7, 64, 1000])
def test_any_chunk(chunk):
    check(random_inputs(2, 21, 2, 3, 3, 4, 2), "halves", None, "chunked", chunk)


@pytest.mark.parametrize("method", METHODS)
def test_long_memory(method):
    """Time steps so small that the first token still counts after 4,096: nothing is cut off."""
    inputs = random_inputs(1, 4096, 2, 1, 2, 4, 1)
    inputs["delta"] *= 1e-4
    check(inputs, method=method)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("steps", ["all", "some"])
def test_steps_that_forget_all(method, steps):
    """Δ A of −1,000: no inf and no NaN in any gradient."""
    inputs = random_inputs(1, 45, 2, 2, 2, 4, 2)
    far = some((1, 45, 1), 0.2) if steps == "some" else True
    inputs["A"] = np.full((1, 45, 2), -16.0)
    inputs["delta"] = np.where(far, 1000 / 16, 1e-3 * np.ones((1, 45, 2)))
    check(inputs, method=method)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("fast", [-86.9, -80.0, -16.0])
def test_fast_steps_among_slow_ones(method, fast):
    """Steps that forget almost all, and nearly none: sums grow, and differences stay small."""
    inputs = random_inputs(1, 129, 2, 1, 2, 4, 2)
    inputs["A"] = np.full((1, 129, 2), fast)
    inputs["delta"] = np.where(some((1, 129, 2), 0.3), 1.0, 1e-4)
    check(inputs, method=method)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("lam", [0.0, 1.0])
def test_all_weight_at_one_end(method, lam):
    inputs = random_inputs(1, 40, 2, 1, 2, 4, 2)
    inputs["lam"] = np.full((1, 40, 2), lam)
    check(inputs, method=method)


@pytest.mark.parametrize("method", METHODS)
def test_a_small_step_before_a_large_one(method):
    """The own weight λ Δ of a token stays exact beside what the next token adds to it."""
    inputs = random_inputs(1, 40, 1, 1, 2, 4, 2)
    inputs["delta"] = np.where(np.arange(40)[:, None] % 2, 50.0, 1e-4)[None]
    inputs["A"], inputs["D"] = np.full((1, 40, 1), -1.0), np.zeros(1)
    y = scan(**as_float32(inputs), method=method)
    expected, _ = trapezoid_loop(**inputs)
    small = slice(2, None, 2)  # Δ A = −50 lies before them
    assert relative_error(y[:, small], expected[:, small]) < 2e-5


# --- a second derivation: the whole sequence as one matrix -------------------------------------


def by_matrix(x, delta, A, lam, B, C, theta, D, pairs):
    """y in float64 from complex numbers and products: no state, no loop over what it remembers."""
    (_, l, _, _, n), s = B.shape, theta.shape[-1]
    turn = np.exp(1j * np.cumsum(theta, axis=1))[:, :, :, None]  # (b, l, h, 1, s)

    def turned(v):  # pairs as complex numbers, then the rest
        first = np.arange(s) * (2 if pairs == "interleaved" else 1)
        second = first + (1 if pairs == "interleaved" else n // 2)
        rest = np.setdiff1d(np.arange(n), np.concatenate([first, second]))
        return (v[..., first] + 1j * v[..., second]) * turn, v[..., rest]

    (B_turned, B_rest), (C_turned, C_rest) = turned(B), turned(C)
    fit = np.einsum("bthri,bshqi->bhtrsq", C_turned, B_turned.conj()).real
    fit += np.einsum("bthri,bshqi->bhtrsq", C_rest, B_rest)
    alpha = np.exp(delta * A)
    beta, gamma = (1 - lam) * delta * alpha, lam * delta
    M = np.zeros((*delta.shape[::2], l, l))  # (b, h, t, s)
    for t in range(l):
        M[:, :, t, t] = gamma[:, t]
        for k in range(t):
            once = beta[:, k + 1] * alpha[:, k + 2 : t + 1].prod(1)
            M[:, :, t, k] = gamma[:, k] * alpha[:, k + 1 : t + 1].prod(1) + once
    y = np.einsum("bhts,bhtrsq,bshqp->bthrp", M, fit, x)
    return y + D[:, None, None] * x


@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize("r", [1, 4])
def test_the_matrix_of_the_whole_sequence(pairs, r):
    inputs = random_inputs(2, 37, 2, r, 3, 6, 2, seed=4)
    del inputs["state"]
    expected = by_matrix(**inputs, pairs=pairs)
    zeros = TrapezoidState.zeros(2, 2, r, 3, 6, 2)
    assert relative_error(trapezoid_loop(**inputs, state=zeros, pairs=pairs)[0], expected) < 1e-12
    for method in METHODS:
        y = scan(**as_float32(inputs), pairs=pairs, method=method)
        assert relative_error(y, expected) < 2e-5, method


# --- state, padding, resets ---------------------------------------------------------------------


def cut(inputs, start, stop):
    return inputs | {name: inputs[name][:, start:stop] for name in ALONG_TIME}


@pytest.mark.parametrize("method", METHODS)
def test_segments_of_any_lengths_continue_each_other(method):
    inputs = as_float32(random_inputs(2, 70, 2, 2, 3, 4, 2))
    run = partial(scan, pairs="halves", method=method, return_state=True)
    y, state = run(**inputs)
    ys, now, ends = [], inputs["state"], [0, 1, 2, 9, 40, 41, 70]
    for start, stop in zip(ends, ends[1:], strict=False):
        y_part, now = run(**cut(inputs, start, stop) | {"state": now})
        ys.append(y_part)
    assert relative_error(np.concatenate(ys, axis=1), y) < 2e-6
    assert angle_error(now.angle, state.angle) < 1e-6
    assert error(now[1:], state[1:]) < 2e-6


def with_padding(inputs, places, l):
    """The tokens at ``places`` of rows of length l. Between them lies padding: Δ = 0, and noise."""
    noise = random_inputs(*inputs["x"].shape[:1], l, *inputs["x"].shape[2:], 4, 2, seed=8)
    noise["delta"] = np.zeros_like(noise["delta"])
    padded = inputs | {name: noise[name] for name in ALONG_TIME}
    for name in ALONG_TIME:
        padded[name][:, places] = inputs[name]
    return padded


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("places", [range(30), range(11, 41), (*range(9), *range(20, 41))])
def test_padding_changes_nothing(method, places):
    """After, before and between the tokens: outputs, the state and gradients of the row alone."""
    inputs = random_inputs(1, 30, 2, 2, 3, 4, 2)
    padded, places = with_padding(inputs, list(places), 41), list(places)
    check(padded, "halves", None, method, 8 if method == "chunked" else None)
    options = {"pairs": "halves", "method": method, "return_state": True}
    y, state = scan(**as_float32(padded), **options)
    expected, state_alone = scan(**as_float32(inputs), **options)
    assert relative_error(y[:, places], expected) < 2e-6
    assert not np.delete(y, places, axis=1).any()
    assert angle_error(state.angle, state_alone.angle) == 0
    assert error(state[1:], state_alone[1:]) < 2e-6


@pytest.mark.parametrize("method", METHODS)
def test_rows_of_different_lengths_continue(method):
    """A ragged batch: the next token finds each row's last real one, head by head."""
    inputs = random_inputs(3, 20, 2, 1, 3, 4, 2)
    lengths = np.array([20, 7, 0])
    real = np.arange(20) < lengths[:, None]
    ragged = inputs | {"delta": np.where(real[..., None], inputs["delta"], 0.0)}
    run = partial(scan, return_state=True)
    _, state = run(**as_float32(ragged), method=method)
    more = as_float32(random_inputs(3, 5, 2, 1, 3, 4, 2, seed=3))
    y, last = run(**more | {"state": state, "D": np.float32(inputs["D"])}, method=method)
    for i, length in enumerate(lengths):
        row = {k: v[i : i + 1] for k, v in inputs.items() if k not in ("D", "state")}
        whole = {k: np.concatenate([row[k][:, :length], more[k][i : i + 1]], 1) for k in row}
        start = TrapezoidState(*(v[i : i + 1] for v in inputs["state"]))
        expected, end = trapezoid_loop(**whole, D=inputs["D"], state=start)
        assert relative_error(y[i], expected[0, length:]) < 2e-5
        assert error([v[i] for v in last[1:]], [v[0] for v in end[1:]]) < 2e-5


@pytest.mark.parametrize("method", METHODS)
def test_padding_alone_leaves_the_state(method):
    inputs = as_float32(random_inputs(2, 9, 2, 2, 3, 4, 2))
    inputs["delta"] = np.zeros_like(inputs["delta"])
    y, state = scan(**inputs, method=method, return_state=True)
    assert not np.asarray(y).any()
    assert angle_error(state.angle, inputs["state"].angle) < 5e-7
    assert error(state[1:], inputs["state"][1:]) == 0


@pytest.mark.parametrize("method", METHODS)
def test_a_reset_in_padding_discards_the_last_token(method):
    inputs = random_inputs(2, 12, 2, 2, 3, 4, 2)
    inputs["delta"][:, 5:9] = 0.0
    resets = np.zeros((2, 12), bool)
    resets[0, 6] = resets[1, 9] = True
    check(inputs, resets=resets, method=method)
    short = cut(inputs, 0, 8)
    check(short, resets=resets[:, :8], method=method)


@pytest.mark.parametrize("method", METHODS)
def test_packed_segments_are_each_as_alone(method):
    inputs = as_float32(random_inputs(1, 50, 2, 2, 3, 4, 2))
    resets = np.zeros((1, 50), bool)
    resets[0, [0, 17, 18]] = True
    run = partial(scan, pairs="halves", method=method, return_state=True)
    y, state = run(**inputs, resets=resets)
    for start, stop in ((0, 17), (17, 18), (18, 50)):
        alone, end = run(**cut(inputs, start, stop) | {"state": None})
        assert relative_error(y[:, start:stop], alone) < 2e-6
    assert angle_error(state.angle, end.angle) == 0 and error(state[1:], end[1:]) < 2e-6


@pytest.mark.parametrize("method", METHODS)
def test_a_reset_discards_nan(method):
    """Of the state at the first token, and of tokens in an earlier chunk."""
    inputs = as_float32(random_inputs(2, 12, 2, 1, 3, 4, 2))
    resets = np.zeros((2, 12), bool)
    resets[0, 0] = resets[1, 8] = True
    options = {"method": method, "chunk": 4 if method == "chunked" else None, "resets": resets}
    clean = inputs | {"state": jax.tree.map(np.array, inputs["state"])}
    for v in inputs["state"]:
        v[0] = np.nan
    for v in clean["state"]:
        v[0] = 0.0
    for name in ("x", "B", "theta"):
        inputs[name] = np.array(inputs[name])
        inputs[name][1, 5] = np.nan

    def run(inputs):
        y, state = scan(**inputs, **options, return_state=True)
        return y[0].sum() + y[1, 8:].sum() + sum(v.sum() for v in state[1:]), (y, state)

    run = jax.jit(jax.grad(run, has_aux=True))
    (gradients, (y, state)), (expected, (y_clean, state_clean)) = run(inputs), run(clean)
    assert relative_error(y[0], y_clean[0]) < 1e-6
    assert relative_error(y[1, 8:], y_clean[1, 8:]) < 1e-6
    assert angle_error(state.angle, state_clean.angle) == 0
    assert error(state[1:], state_clean[1:]) < 1e-6
    assert not any(np.asarray(v)[0].any() for v in gradients["state"])
    for name in ALONG_TIME:
        pair = gradients[name], expected[name]
        for part in ((0,), (1, slice(8, None))):
            assert relative_error(*(np.asarray(v)[part] for v in pair)) < 1e-6, name
    assert np.isnan(y[1, 5:8]).any()


@pytest.mark.parametrize("method", METHODS)
def test_no_gradient_crosses_a_reset(method):
    inputs = as_float32(random_inputs(1, 9, 2, 2, 3, 4, 2))
    resets = np.zeros((1, 9), bool)
    resets[0, 4] = True
    run = lambda v: scan(**v, resets=resets, method=method)[:, 4:].sum()  # noqa: E731
    gradients = jax.jit(jax.grad(run))(inputs)
    assert not any(np.asarray(v).any() for v in gradients["state"])
    for name in ("x", "delta", "A", "lam", "B", "theta"):
        gradient = np.asarray(gradients[name])
        assert not gradient[:, :4].any() and gradient.any(), name


def test_nan_in_an_angle_is_not_lost():
    inputs = as_float32(random_inputs(1, 9, 1, 1, 2, 4, 2))
    inputs["theta"][0, 4, 0, 1] = np.nan
    for method in METHODS:
        y, state = scan(**inputs, method=method, return_state=True)
        assert np.isnan(y[0, 4:]).any() and np.isnan(state.h).any()


# --- the interface ------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["auto", *METHODS])
def test_what_is_left_out(method):
    """No D is 0, no state is zeros, and without ``return_state`` there is only y."""
    inputs = random_inputs(2, 40, 2, 1, 2, 4, 2)
    zeros = inputs | {"D": np.zeros(2), "state": TrapezoidState.zeros(2, 2, 1, 2, 4, 2)}
    expected, _ = trapezoid_loop(**zeros)
    y = scan(**as_float32({k: inputs[k] for k in ALONG_TIME}), method=method)
    assert relative_error(y, expected) < 2e-5


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_computes_in_float32_and_returns_the_dtype_of_x(dtype):
    inputs = jax.tree.map(lambda v: jnp.asarray(v, dtype), random_inputs(1, 33, 2, 2, 2, 4, 2))
    y, state = scan(**inputs, return_state=True)
    expected, last = trapezoid_loop(**jax.tree.map(lambda v: np.asarray(v, np.float64), inputs))
    assert y.dtype == dtype and all(v.dtype == jnp.float32 for v in state)
    assert error(state[1:], last[1:]) < 2e-5 and relative_error(y, expected) < 1e-2


def test_memory_of_a_backward_pass_grows_linearly():
    """And is less than half of what the states of all tokens would take."""

    def peak(l):
        inputs = as_float32(random_inputs(1, l, 2, 1, 32, 32, 4))
        loss = lambda v: scan(**v).sum()  # noqa: E731
        return jax.jit(jax.grad(loss)).lower(inputs).compile().memory_analysis().temp_size_in_bytes

    assert peak(4096) < 2.2 * peak(2048)
    assert peak(2048) < (2048 * 2 * 32 * 32 * 4) / 2


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": np.zeros((1, 5, 2, 2), np.float32)}, ValueError, "x must have shape"),
        ({"delta": np.zeros((1, 5, 3), np.float32)}, ValueError, "delta must have shape"),
        ({"A": np.zeros(2, np.float32)}, ValueError, "A must have shape"),
        ({"lam": np.zeros((1, 5), np.float32)}, ValueError, "lam must have shape"),
        ({"B": np.zeros((1, 5, 2, 2, 4), np.float32)}, ValueError, "B must have shape"),
        ({"C": np.zeros((1, 5, 2, 1, 5), np.float32)}, ValueError, "C must have shape"),
        ({"theta": np.zeros((1, 5, 3, 2), np.float32)}, ValueError, "theta must have shape"),
        ({"theta": np.zeros((1, 5, 2, 3), np.float32)}, ValueError, "3 angles, .* 2 pairs"),
        ({"theta": 1.0}, TypeError, "theta must be an array"),
        ({"A": np.zeros((1, 5, 2), np.complex64)}, TypeError, "A must hold floating-point"),
        ({"B": np.zeros((1, 5, 2, 1, 0), np.float32)}, ValueError, "all >= 1"),
        ({"x": np.zeros((1, 0, 2, 1, 2), np.float32)}, ValueError, "all >= 1"),
        ({"state": (1, 2, 3, 4)}, TypeError, "state must be a TrapezoidState, got tuple"),
        ({"pairs": "thirds"}, ValueError, "unknown pairs 'thirds'"),
        ({"method": "tree"}, ValueError, "unknown method 'tree'"),
        ({"method": "recurrence", "chunk": 4}, ValueError, "'recurrence' takes no chunk"),
        ({"method": "chunked", "chunk": 0}, ValueError, "chunk must be a number of tokens"),
        ({"resets": np.zeros((1, 5))}, TypeError, "resets must be bool"),
    ],
)
def test_bad_input(change, error, message):
    with pytest.raises(error, match=message):
        trapezoidal_scan(**(as_float32(random_inputs(1, 5, 2, 1, 2, 4, 2)) | change))


@pytest.mark.parametrize("name", STATE)
def test_a_state_of_other_sizes(name):
    inputs = as_float32(random_inputs(1, 5, 2, 1, 2, 4, 2))
    wrong = inputs["state"]._replace(**{name: np.zeros((1, 3, 2, 4), np.float32)})
    with pytest.raises(ValueError, match=f"state.{name} must have shape"):
        trapezoidal_scan(**inputs | {"state": wrong})
