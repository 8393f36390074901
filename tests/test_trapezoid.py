"""trapezoidal_scan against a float64 loop and a matrix; padding, resets, angles, bad input.

Most of the time goes into compilation. So most tests share the sizes of ``usual_inputs`` and give
resets even where there is none: one program for each method serves them all.
"""

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


def usual_inputs(seed=0):
    """Two rows of 41 tokens with two inputs each: chunks of 16, 16 and 9 tokens."""
    return random_inputs(2, 41, 2, 2, 3, 6, 2, seed)


def no_resets(inputs):
    return np.zeros(inputs["x"].shape[:2], bool)


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


def run(inputs, method, resets=None):
    """-> y, and the state."""
    resets = no_resets(inputs) if resets is None else resets
    options = {"pairs": "halves", "resets": resets, "method": method}
    return scan(**as_float32(inputs), **options, return_state=True)


def check(inputs, pairs="halves", resets=None, methods=METHODS, chunk=None):
    """Compare y, the state and all gradients of each method with the float64 loop."""
    rng = np.random.default_rng(1)
    dy, *dstate = (rng.normal(size=v.shape) for v in (inputs["x"], *inputs["state"]))
    dstate = TrapezoidState(*dstate)
    y_ref, state_ref = trapezoid_loop(**inputs, pairs=pairs, resets=resets)
    grads_ref = trapezoid_gradients(dy, dstate, **inputs, pairs=pairs, resets=resets)
    for method in methods:
        arguments = as_float32((inputs, dy, dstate))
        (y, state), grads = with_gradients(*arguments, resets, pairs, method, chunk)
        assert relative_error(y, y_ref) < 2e-5, method
        assert angle_error(state.angle, state_ref[0]) < 2e-6, method
        assert np.abs(state.angle).max(initial=0) < 3.1416, method
        for name, actual, expected in zip(STATE[1:], state[1:], state_ref[1:], strict=True):
            assert relative_error(actual, expected) < 2e-5, (method, name)
        for name in grads:
            assert error(grads[name], grads_ref[name]) < 2e-4, (method, name)


def some(shape, probability, seed=0):
    return np.random.default_rng(seed).uniform(size=shape) < probability


# --- against the loop ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("b", "l", "h", "r", "p", "n", "s", "pairs"),
    [
        (2, 1, 3, 1, 3, 4, 0, "interleaved"),
        (2, 133, 2, 4, 3, 6, 3, "interleaved"),
        (2, 41, 2, 2, 3, 6, 2, "halves"),
    ],
)
def test_agrees_with_float64(b, l, h, r, p, n, s, pairs):
    resets = some((b, l), 0.1) if l > 1 else np.array([[True], [False]])
    check(random_inputs(b, l, h, r, p, n, s, seed=l), pairs, resets)


@pytest.mark.parametrize(
    ("method", "chunk"), [("recurrence", None), ("chunked", 1), ("chunked", 1000)]
)
def test_any_chunk(method, chunk):
    """And sizes of their own: one channel, an odd number of states, a single pair that turns."""
    check(random_inputs(2, 21, 2, 3, 1, 5, 1), "interleaved", None, [method], chunk)


def test_long():
    check(random_inputs(1, 513, 2, 1, 2, 4, 2), resets=some((1, 513), 0.01))


def test_long_memory():
    """Time steps so small that the first token still counts after 513: nothing is cut off."""
    inputs = random_inputs(1, 513, 2, 1, 2, 4, 2)
    inputs["delta"] *= 1e-4
    check(inputs, resets=no_resets(inputs))


@pytest.mark.parametrize("steps", ["all", "some"])
def test_steps_that_forget_all(steps):
    """Δ A of −1,000: no inf and no NaN in any gradient."""
    inputs = usual_inputs()
    far = some((2, 41, 1), 0.2) if steps == "some" else True
    inputs["A"] = np.full((2, 41, 2), -16.0)
    inputs["delta"] = np.where(far, 1000 / 16, 1e-3 * np.ones((2, 41, 2)))
    check(inputs, resets=no_resets(inputs))


@pytest.mark.parametrize("fast", [-86.9, -80.0, -16.0])
def test_fast_steps_among_slow_ones(fast):
    """Steps that forget almost all, and nearly none: sums grow, and differences stay small."""
    inputs = random_inputs(1, 513, 2, 1, 2, 4, 2)
    inputs["A"] = np.full((1, 513, 2), fast)
    inputs["delta"] = np.where(some((1, 513, 2), 0.3), 1.0, 1e-4)
    check(inputs, resets=no_resets(inputs))


@pytest.mark.parametrize("lam", [0.0, 1.0])
def test_all_weight_at_one_end(lam):
    inputs = random_inputs(1, 513, 2, 1, 2, 4, 2)
    inputs["lam"] = np.full((1, 513, 2), lam)
    check(inputs, resets=no_resets(inputs))


@pytest.mark.parametrize("method", METHODS)
def test_a_small_step_before_a_large_one(method):
    """The own weight λ Δ of a token stays exact beside what the next token adds to it."""
    inputs = usual_inputs()
    inputs["delta"] = np.broadcast_to(np.where(np.arange(41) % 2, 50.0, 1e-4)[:, None], (2, 41, 2))
    inputs["A"], inputs["D"] = np.full((2, 41, 2), -1.0), np.zeros(2)
    y, _ = run(inputs, method)
    expected, _ = trapezoid_loop(**inputs, pairs="halves")
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
    if (r == 1) == (pairs == "interleaved"):  # as the released models have it
        for method in METHODS:
            y = scan(**as_float32(inputs), pairs=pairs, method=method)
            assert relative_error(y, expected) < 2e-5, method


# --- state, padding, resets ---------------------------------------------------------------------


def cut(inputs, start, stop):
    return inputs | {name: inputs[name][:, start:stop] for name in ALONG_TIME}


@pytest.mark.parametrize("method", METHODS)
def test_segments_of_any_lengths_continue_each_other(method):
    inputs = usual_inputs()
    y, state = run(inputs, method)
    ys, now, ends = [], inputs["state"], [0, 1, 2, 21, 22, 41]
    for start, stop in zip(ends, ends[1:], strict=False):
        y_part, now = run(cut(inputs, start, stop) | {"state": now}, method)
        ys.append(y_part)
    assert relative_error(np.concatenate(ys, axis=1), y) < 2e-6
    assert angle_error(now.angle, state.angle) < 1e-6
    assert error(now[1:], state[1:]) < 2e-6


def with_padding(inputs, places):
    """The tokens at ``places`` of longer rows. Between them lies padding: Δ = 0, and noise."""
    noise = usual_inputs(seed=8)
    noise["delta"] = np.zeros_like(noise["delta"])
    padded = inputs | {name: noise[name] for name in ALONG_TIME}
    for name in ALONG_TIME:
        padded[name][:, places] = inputs[name]
    return padded


@pytest.mark.parametrize("places", [range(19), range(22, 41), (*range(10), *range(32, 41))])
def test_padding_changes_nothing(places):
    """After, before and between the tokens: outputs, the state and gradients of the row alone."""
    inputs, places = cut(usual_inputs(), 0, 19), list(places)
    padded = with_padding(inputs, places)
    check(padded, resets=no_resets(padded))
    for method in METHODS:
        y, state = run(padded, method)
        expected, state_alone = run(inputs, method)
        assert relative_error(y[:, places], expected) < 2e-6, method
        assert not np.delete(y, places, axis=1).any(), method
        assert angle_error(state.angle, state_alone.angle) == 0, method
        assert error(state[1:], state_alone[1:]) < 2e-6, method


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("lengths", [(41, 7), (16, 0)])
def test_rows_of_different_lengths_continue(method, lengths):
    """A ragged batch: the next token finds each row's last real one, head by head."""
    inputs = usual_inputs()
    real = np.arange(41) < np.array(lengths)[:, None]
    ragged = inputs | {"delta": np.where(real[..., None], inputs["delta"], 0.0)}
    _, state = run(ragged, method)
    more = cut(usual_inputs(seed=3), 0, 19)
    y, last = run(more | {"state": state, "D": inputs["D"]}, method)
    for i, length in enumerate(lengths):
        row = {k: v[i : i + 1] for k, v in inputs.items() if k not in ("D", "state")}
        whole = {k: np.concatenate([row[k][:, :length], more[k][i : i + 1]], 1) for k in row}
        start = TrapezoidState(*(v[i : i + 1] for v in inputs["state"]))
        expected, end = trapezoid_loop(**whole, D=inputs["D"], state=start, pairs="halves")
        assert relative_error(y[i], expected[0, length:]) < 2e-5
        assert error([v[i] for v in last[1:]], [v[0] for v in end[1:]]) < 2e-5


@pytest.mark.parametrize("method", METHODS)
def test_padding_alone_leaves_the_state(method):
    inputs = as_float32(usual_inputs())
    inputs["delta"] = np.zeros_like(inputs["delta"])
    y, state = run(inputs, method)
    assert not np.asarray(y).any()
    assert angle_error(state.angle, inputs["state"].angle) < 5e-7
    assert error(state[1:], inputs["state"][1:]) == 0


@pytest.mark.parametrize("stop", [9, 41])
def test_a_reset_in_padding_discards_the_last_token(stop):
    """Before more tokens, and before the end: then the state after it is that of no token."""
    inputs, resets = usual_inputs(), np.zeros((2, 41), bool)
    inputs["delta"][:, 5:stop] = 0.0
    resets[0, 6] = resets[1, 9] = True
    check(inputs, resets=resets)


@pytest.mark.parametrize("method", METHODS)
def test_packed_segments_are_each_as_alone(method):
    inputs, starts = usual_inputs(), [0, 19, 20, 39, 40]
    y, state = run(inputs, method, no_resets(inputs) | np.isin(np.arange(41), starts))
    zeros = TrapezoidState(*map(np.zeros_like, inputs["state"]))
    for start, stop in zip(starts, [*starts[1:], 41], strict=True):
        alone, end = run(cut(inputs, start, stop) | {"state": zeros}, method)
        assert relative_error(y[:, start:stop], alone) < 2e-6
    assert angle_error(state.angle, end.angle) == 0 and error(state[1:], end[1:]) < 2e-6


@pytest.mark.parametrize("method", METHODS)
def test_a_reset_discards_nan(method):
    """Of the state at the first token, and of tokens in an earlier chunk."""
    inputs, resets = as_float32(usual_inputs()), np.zeros((2, 41), bool)
    resets[0, 0] = resets[1, 16] = True
    clean = inputs | {"state": jax.tree.map(np.array, inputs["state"])}
    for v in inputs["state"]:
        v[0] = np.nan
    for v in clean["state"]:
        v[0] = 0.0
    for name in ("x", "B", "theta"):
        inputs[name] = np.array(inputs[name])
        inputs[name][1, [13, 15]] = np.nan  # 15: right before the reset
    dy = np.ones_like(inputs["x"])
    dy[1, :16] = 0.0
    dstate = TrapezoidState(*map(np.ones_like, inputs["state"]))
    dstate.angle[:] = 0.0

    options = dy, dstate, resets, "halves", method, None
    (y, state), gradients = with_gradients(inputs, *options)
    (y_clean, state_clean), expected = with_gradients(clean, *options)
    assert relative_error(y[0], y_clean[0]) < 1e-6
    assert relative_error(y[1, 16:], y_clean[1, 16:]) < 1e-6
    assert angle_error(state.angle, state_clean.angle) == 0
    assert error(state[1:], state_clean[1:]) < 1e-6
    assert not any(np.asarray(v)[0].any() for v in gradients["state"])
    for name in ALONG_TIME:
        pair = gradients[name], expected[name]
        for part in ((0,), (1, slice(16, None))):
            assert relative_error(*(np.asarray(v)[part] for v in pair)) < 1e-6, name
    assert np.isnan(y[1, 13:16]).any()


@pytest.mark.parametrize("method", METHODS)
def test_no_gradient_crosses_a_reset(method):
    inputs, resets = as_float32(usual_inputs()), np.zeros((2, 41), bool)
    resets[:, 20] = True
    dy, dstate = np.ones_like(inputs["x"]), TrapezoidState(*map(np.zeros_like, inputs["state"]))
    dy[:, :20] = 0.0
    _, gradients = with_gradients(inputs, dy, dstate, resets, "halves", method, None)
    assert not any(np.asarray(v).any() for v in gradients["state"])
    for name in ("x", "delta", "A", "lam", "B", "theta"):
        gradient = np.asarray(gradients[name])
        assert not gradient[:, :20].any() and gradient.any(), name


@pytest.mark.parametrize("method", METHODS)
def test_nan_in_an_angle_is_not_lost(method):
    inputs = usual_inputs()
    inputs["theta"][0, 4, 0, 1] = np.nan
    y, state = run(inputs, method)
    assert np.isnan(y[0, 4:]).any() and np.isnan(state.h).any()


# --- the interface ------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["auto", "recurrence"])
def test_what_is_left_out(method):
    """No D is 0, no state is zeros, and without ``return_state`` there is only y."""
    inputs = random_inputs(2, 19, 2, 2, 2, 4, 2)
    zeros = inputs | {"D": np.zeros(2), "state": TrapezoidState.zeros(2, 2, 2, 2, 4, 2)}
    expected, _ = trapezoid_loop(**zeros)
    y = scan(**as_float32({k: inputs[k] for k in ALONG_TIME}), method=method)
    assert relative_error(y, expected) < 2e-5


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_computes_in_float32_and_returns_the_dtype_of_x(dtype):
    inputs = jax.tree.map(lambda v: jnp.asarray(v, dtype), random_inputs(1, 19, 2, 2, 2, 4, 2))
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

    assert peak(512) < 2.2 * peak(256)
    assert peak(256) < (256 * 2 * 32 * 32 * 4) / 2


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
        ({"lam": None}, TypeError, "lam must be an array"),
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
