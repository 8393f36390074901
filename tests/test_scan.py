"""selective_scan against a float64 loop: values, states, gradients, awkward shapes, bad input."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mamba.scan import CHUNKS, combine, selective_scan
from mamba_book.reference import relative_error, selective_scan_gradients, selective_scan_loop

METHODS = ["sequential", "chunked", "associative"]
IN_CHUNKS = list(CHUNKS)  # with a backward pass of their own
NAMES = ["x", "delta", "A", "B", "C", "D", "z", "h0"]
ALONG_TIME = {"x", "delta", "B", "C", "z"}  # the arguments with a time axis


def random_inputs(b, l, d, n, seed=0):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.normal(size=shape)  # noqa: E731
    return {
        "x": normal(b, l, d),
        "delta": np.exp(rng.uniform(np.log(1e-3), np.log(1.0), (b, l, d))),
        "A": -rng.uniform(0.1, 16, (d, n)),
        "B": normal(b, l, n),
        "C": normal(b, l, n),
        "D": normal(d),
        "z": normal(b, l, d),
        "h0": normal(b, d, n),
    }


@partial(jax.jit, static_argnames="method")
def run(inputs, method):
    return selective_scan(**inputs, method=method, return_state=True)


def as_float32(inputs):
    return {k: np.float32(v) for k, v in inputs.items()}


def random_cotangents(inputs, seed=1):
    rng = np.random.default_rng(seed)
    return rng.normal(size=inputs["x"].shape), rng.normal(size=inputs["h0"].shape)


@partial(jax.jit, static_argnames="method")
def with_gradients(inputs, dy, dh, resets=None, method="auto"):
    """-> (y, h), and the gradients of Σ dy ⊙ y + Σ dh ⊙ h in every argument, from one program."""
    f = partial(selective_scan, resets=resets, method=method, return_state=True)
    out, pull = jax.vjp(lambda v: f(**v), inputs)
    return out, pull((jnp.float32(dy), jnp.float32(dh)))[0]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("b", "l", "d", "n"),
    [(2, 1, 5, 3), (3, 2, 4, 16), (2, 15, 5, 3), (1, 16, 4, 16), (3, 17, 5, 1)],
)  # and where the gradients are tested
def test_agrees_with_float64_loop(method, b, l, d, n):
    inputs = random_inputs(b, l, d, n, seed=l)
    y, h = run(as_float32(inputs), method)
    y_ref, h_ref = selective_scan_loop(**inputs)
    assert y.shape == (b, l, d) and h.shape == (b, d, n)
    assert relative_error(y, y_ref) < 1e-5
    assert relative_error(h, h_ref) < 1e-5


@pytest.mark.parametrize("method", METHODS)
def test_optional_arguments(method):
    inputs = random_inputs(2, 21, 3, 4)
    cases = [
        {k: v for k, v in inputs.items() if k not in absent}
        for absent in (["z"], ["h0"], ["z", "h0"])
    ]
    f = jax.jit(lambda cases: [selective_scan(**given, method=method) for given in cases])
    for y, given in zip(f([as_float32(given) for given in cases]), cases, strict=True):
        assert relative_error(y, selective_scan_loop(**given)[0]) < 1e-5


@pytest.mark.parametrize("method", METHODS)
def test_long_sequence_does_not_drift(method):
    inputs = random_inputs(1, 3000, 2, 4)
    y, h = run(as_float32(inputs), method)
    y_ref, h_ref = selective_scan_loop(**inputs)
    assert relative_error(y, y_ref) < 1e-5 and relative_error(h, h_ref) < 1e-5


@pytest.mark.parametrize("method", IN_CHUNKS)
@pytest.mark.parametrize("chunk", [1, 3, 21, 100])
def test_any_length_of_a_chunk(method, chunk):
    """Values and gradients are those of the length by default; a chunk may be one token, or all."""
    inputs = as_float32(random_inputs(2, 21, 3, 4))
    cotangents = tuple(map(np.float32, random_cotangents(inputs)))

    @jax.jit
    def of(inputs):
        f = partial(selective_scan, method=method, return_state=True)
        results = []
        for run in (f, partial(f, chunk=chunk)):
            out, pull = jax.vjp(lambda v, run=run: run(**v), inputs)
            results.append((out, pull(cotangents)[0]))
        return results

    expected, found = of(inputs)
    for a, e in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert relative_error(a, e) < 1e-5


def test_the_length_of_a_chunk_says_which_states_are_kept():
    """One state (n, d) per chunk is what the backward pass gets, for the chunk that was asked."""
    l, d, n = 40, 3, 4
    inputs = as_float32(random_inputs(1, l, d, n))
    for method in IN_CHUNKS:
        for chunk in (5, 8, CHUNKS[method]):
            f = partial(selective_scan, method=method, chunk=chunk)
            pull = jax.eval_shape(lambda v, f=f: jax.vjp(lambda v: f(**v), v)[1], inputs)
            kept = -(-l // min(chunk, l))
            assert (1, kept, n, d) in {leaf.shape for leaf in jax.tree.leaves(pull)}


@pytest.mark.parametrize("method", ["associative", "pallas"])
def test_methods_without_chunks_refuse_one(method):
    with pytest.raises(ValueError, match=f"method '{method}' takes no chunk"):
        selective_scan(**as_float32(random_inputs(1, 4, 2, 2)), method=method, chunk=8)


@pytest.mark.parametrize("chunk", [0, -1, 2.0, "16"])
def test_bad_chunks(chunk):
    with pytest.raises(ValueError, match="chunk must be a number of tokens, at least 1"):
        selective_scan(**as_float32(random_inputs(1, 4, 2, 2)), method="chunked", chunk=chunk)


# --- gradients ----------------------------------------------------------------------------------


def random_resets(b, l, seed=0):
    """Segments of all lengths, from one token on; one row starts with a reset, one has none."""
    resets = np.random.default_rng(seed).uniform(size=(b, l)) < 0.2
    resets[0, 0] = True
    resets[-1] = False
    return resets


def test_reference_gradients_agree_with_differences():
    """The float64 adjoint that the methods are held against, along random directions."""
    inputs, resets = random_inputs(2, 9, 3, 4), random_resets(2, 9)
    dy, dh = random_cotangents(inputs)

    def loss(values):
        y, h = selective_scan_loop(**values, resets=resets)
        return (y * dy).sum() + (h * dh).sum()

    grads = selective_scan_gradients(dy, dh, **inputs, resets=resets)
    for name in NAMES:
        direction = np.random.default_rng(3).normal(size=inputs[name].shape)
        direction *= 0.01 if name == "delta" else 1.0
        e = 1e-5
        up, down = (loss({**inputs, name: inputs[name] + s * direction}) for s in (e, -e))
        expected = (up - down) / (2 * e)
        scale = np.linalg.norm(grads[name]) * np.linalg.norm(direction)
        assert abs((grads[name] * direction).sum() - expected) < 1e-7 * scale, name


LENGTHS = [1, 2, 3, 7, 8, 37, 64, 372, 784, 1134, 4096]
SIZES = {1: (1, 1, 1), 64: (2, 1, 4)}  # b, d, n


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("l", LENGTHS)
def test_gradients_agree_with_float64(method, l):
    """Every argument, through the outputs and the returned state, element by element."""
    b, d, n = SIZES.get(l, (2, 2, 3))
    inputs = random_inputs(b, l, d, n, seed=7 + l)
    dy, dh = random_cotangents(inputs)
    actual, grads = with_gradients(as_float32(inputs), dy, dh, method=method)
    for value, expected in zip(actual, selective_scan_loop(**inputs), strict=True):
        assert value.shape == expected.shape and relative_error(value, expected) < 1e-5
    for name, expected in selective_scan_gradients(dy, dh, **inputs).items():
        assert relative_error(grads[name], expected) < 1e-4, name


@pytest.mark.parametrize("method", IN_CHUNKS)
def test_backward_pass_keeps_no_state_per_step(method):
    """Nothing that the forward pass leaves for the backward pass has the size of all states."""
    b, l, d, n = 2, 640, 16, 16
    inputs = as_float32(random_inputs(b, l, d, n))
    scan = partial(selective_scan, method=method)
    pull = jax.eval_shape(lambda v: jax.vjp(lambda v: scan(**v), v)[1], inputs)
    assert max(leaf.size for leaf in jax.tree.leaves(pull)) == b * l * d


@pytest.mark.parametrize("method", METHODS)
def test_second_derivatives(method):
    """grad of grad, against differences of float64 gradients: float32 inside, so to 1e-3."""
    inputs = random_inputs(1, 18, 2, 3)
    dy, dh = random_cotangents(inputs)
    along = {k: np.random.default_rng(5).normal(size=v.shape) for k, v in inputs.items()}

    def slope(v):  # the derivative of the loss along one direction
        _, g = with_gradients(v, dy, dh, method=method)
        return sum((g[k] * jnp.float32(along[k])).sum() for k in NAMES)

    actual = jax.jit(jax.grad(slope))(as_float32(inputs))
    e = 1e-5
    up, down = (
        selective_scan_gradients(dy, dh, **{k: v + s * along[k] for k, v in inputs.items()})
        for s in (e, -e)
    )
    for name in NAMES:
        assert relative_error(actual[name], (up[name] - down[name]) / (2 * e)) < 1e-3, name


def test_forward_mode():
    inputs = as_float32(random_inputs(1, 5, 2, 3))
    x = inputs["x"]
    f = lambda x, method: selective_scan(**(inputs | {"x": x}), method=method)  # noqa: E731
    _, tangent = jax.jit(lambda x: jax.jvp(partial(f, method="associative"), (x,), (x,)))(x)
    linear = run(inputs, "sequential")[0] - run(inputs | {"x": 0 * x}, "sequential")[0]
    assert relative_error(tangent, linear) < 1e-5
    for method in IN_CHUNKS:
        with pytest.raises(TypeError, match="custom_vjp"):
            jax.jvp(partial(f, method=method), (x,), (x,))


# --- packed rows --------------------------------------------------------------------------------


def segments_of(row):
    """-> [(first, last + 1), ...] of the segments in one row of resets."""
    edges = sorted({0, *np.flatnonzero(row), len(row)})
    return list(zip(edges[:-1], edges[1:], strict=True))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("l", [1, 15, 70])
def test_packed_segments_are_the_segments_apart(method, l):
    """Values, the returned state and every gradient, the segments run by the float64 reference."""
    inputs, resets = random_inputs(3, l, 2, 3, seed=l), random_resets(3, l, seed=l)
    dy, dh = random_cotangents(inputs)
    (y, h), grads = with_gradients(as_float32(inputs), dy, dh, resets, method=method)
    expected = {k: np.zeros_like(v) for k, v in inputs.items()}
    for i, row in enumerate(resets):
        for first, last in segments_of(row):
            part = np.s_[i : i + 1, first:last]
            segment = {k: v[part] if k in ALONG_TIME else v for k, v in inputs.items()}
            segment["h0"] = np.zeros((1, 2, 3)) if row[first] else inputs["h0"][i : i + 1]
            y_alone, h_alone = selective_scan_loop(**segment)
            assert relative_error(y[part], y_alone) < 1e-5
            at_end = dh[i : i + 1] * (last == l)
            for k, v in selective_scan_gradients(dy[part], at_end, **segment).items():
                if k in ALONG_TIME:
                    expected[k][part] = v
                elif k != "h0":
                    expected[k] += v
                elif not row[first]:
                    expected[k][i : i + 1] = v
        assert relative_error(h[i : i + 1], h_alone) < 1e-5
    for name in NAMES:
        assert relative_error(grads[name], expected[name]) < 1e-4, name


def test_a_reset_at_a_single_token():
    """The step while generating: the state before it is discarded in the rows that say so."""
    inputs = as_float32(random_inputs(2, 1, 5, 3))
    y, h = run(inputs | {"resets": np.array([[True], [False]])}, "auto")
    kept = np.float32([0, 1])[:, None, None] * inputs["h0"]
    expected_y, expected_h = run(inputs | {"h0": kept}, "auto")
    assert relative_error(y, expected_y) < 1e-6 and relative_error(h, expected_h) < 1e-6


@pytest.mark.parametrize("method", METHODS)
def test_nothing_crosses_a_reset(method):
    """Exactly: what comes before changes nothing after it, and gets no gradient from there."""
    inputs, resets = as_float32(random_inputs(3, 70, 2, 3)), np.zeros((3, 70), bool)
    resets[:, 67] = True
    other = {"h0": 3 * inputs["h0"]}
    for k in ("x", "delta", "B", "z"):
        other[k] = np.concatenate([1.5 * inputs[k][:, :67], inputs[k][:, 67:]], axis=1)
    dy, dh = random_cotangents(inputs)
    dy[:, :67] = 0
    ((y, h), grads), ((y_other, h_other), _) = (
        with_gradients(v, dy, dh, resets, method=method) for v in (inputs, inputs | other)
    )
    assert (y[:, 67:] == y_other[:, 67:]).all() and (h == h_other).all()
    assert not grads["h0"].any()
    for name in sorted(ALONG_TIME):
        assert not grads[name][:, :67].any() and grads[name][:, 67:].any(), name


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("method", METHODS)
def test_a_reset_discards_what_is_not_finite(method, value):
    """NaN or infinity before a reset, in h0 or in a token, is gone after it; gradients too."""
    clean, resets = as_float32(random_inputs(3, 70, 2, 3)), np.zeros((3, 70), bool)
    resets[:, 67] = True
    dy, dh = random_cotangents(clean)
    dirty = {k: v.copy() for k, v in clean.items()}
    dirty["h0"][0] = dirty["x"][1, 3] = dirty["B"][2, 66] = value
    ((y, h), grads), ((y_other, h_other), grads_other) = (
        with_gradients(v, dy, dh, resets, method=method) for v in (clean, dirty)
    )
    assert not np.isfinite(y_other[:, :67]).all(axis=(1, 2)).any()  # the test can fail
    np.testing.assert_array_equal(y[:, 67:], y_other[:, 67:])
    np.testing.assert_array_equal(h, h_other)
    for name in sorted(ALONG_TIME):
        np.testing.assert_array_equal(grads[name][:, 67:], grads_other[name][:, 67:], name)


@pytest.mark.parametrize("method", METHODS)
def test_gradients_that_are_not_finite_stop_at_a_reset(method):
    inputs, resets = as_float32(random_inputs(2, 70, 2, 3)), np.zeros((2, 70), bool)
    resets[:, 67] = True
    dy, dh = random_cotangents(inputs)
    dirty = dy.copy()
    dirty[0, 68] = np.nan
    grads, grads_other = (
        with_gradients(inputs, v, dh, resets, method=method)[1] for v in (dy, dirty)
    )
    assert np.isnan(grads_other["x"][0, 67:69]).any()
    for name in sorted(ALONG_TIME):
        np.testing.assert_array_equal(grads[name][:, :67], grads_other[name][:, :67], name)
    np.testing.assert_array_equal(grads["h0"], grads_other["h0"])


def test_h0_that_is_not_finite_before_a_reset_at_the_first_token():
    for l in (1, 9):
        inputs = as_float32(random_inputs(2, l, 3, 4))
        resets = np.zeros((2, l), bool)
        resets[:, 0] = True
        dirty = inputs | {"h0": np.full_like(inputs["h0"], np.nan)}
        for method in METHODS:
            y, h = run(inputs | {"resets": resets}, method)
            y_other, h_other = run(dirty | {"resets": resets}, method)
            np.testing.assert_array_equal(y, y_other)
            np.testing.assert_array_equal(h, h_other)


# --- use ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_any_split_continues(method):
    inputs = as_float32(random_inputs(2, 40, 3, 4))
    whole, h_whole = run(inputs, method)
    for cut in (1, 20):
        first = {k: v[:, :cut] if k in ALONG_TIME else v for k, v in inputs.items()}
        rest = {k: v[:, cut:] if k in ALONG_TIME else v for k, v in inputs.items()}
        y1, h = run(first, method)
        y2, h = run(rest | {"h0": h}, method)
        assert relative_error(np.concatenate([y1, y2], 1), whole) < 1e-5
        assert relative_error(h, h_whole) < 1e-5


@pytest.mark.parametrize("method", METHODS)
def test_zero_delta_passes_the_state_through(method):
    inputs = as_float32(random_inputs(2, 20, 3, 4))
    inputs["delta"] = np.zeros_like(inputs["delta"])
    _, h = run(inputs, method)
    assert (h == inputs["h0"]).all()


@pytest.mark.parametrize("method", METHODS)
def test_dtypes(method):
    inputs = {k: v.astype(jnp.bfloat16) for k, v in as_float32(random_inputs(2, 20, 3, 4)).items()}
    y, h = run(inputs, method)
    assert y.dtype == jnp.bfloat16 and h.dtype == jnp.float32
    exact, _ = selective_scan_loop(**{k: np.asarray(v, np.float64) for k, v in inputs.items()})
    assert relative_error(y, exact) < 2**-8  # only the output was rounded
    loss = lambda v: selective_scan(**v, method=method).astype(jnp.float32).sum()  # noqa: E731
    grads = jax.eval_shape(jax.grad(loss), inputs)
    assert all(grads[k].dtype == jnp.bfloat16 for k in NAMES)


@pytest.mark.parametrize("method", METHODS)
def test_float32_inside_whatever_the_default(method, double):
    inputs = {k: jnp.asarray(v) for k, v in random_inputs(1, 5, 2, 3).items()}
    y, h = jax.eval_shape(partial(selective_scan, method=method, return_state=True), **inputs)
    grads = jax.eval_shape(jax.grad(lambda v: selective_scan(**v, method=method).sum()), inputs)
    assert y.dtype == jnp.float64 and h.dtype == jnp.float32
    assert all(grads[k].dtype == jnp.float64 for k in NAMES)


@pytest.mark.parametrize("method", METHODS)
def test_transformations(method):
    """jit, vmap, checkpoint."""
    inputs = as_float32(random_inputs(2, 18, 3, 4))
    f = jax.jit(lambda v: selective_scan(**v, method=method))
    loss = lambda v: jnp.sum(f(v) ** 2)  # noqa: E731
    stacked = {k: np.stack([v, 0.5 * v]) for k, v in inputs.items()}
    y, mapped, plain, checkpointed = jax.jit(
        lambda v, stacked: (
            *(f(v), jax.vmap(f)(stacked)),
            *(jax.grad(loss)(v), jax.grad(jax.checkpoint(loss))(v)),
        )
    )(inputs, stacked)
    assert relative_error(mapped[0], y) < 1e-6
    assert all(relative_error(checkpointed[k], plain[k]) < 1e-6 for k in NAMES)


def test_combine_is_associative_and_not_commutative():
    rng = np.random.default_rng(0)
    p, q, r = [tuple(rng.normal(size=(2, 5))) for _ in range(3)]
    left, right = combine(combine(p, q), r), combine(p, combine(q, r))
    np.testing.assert_allclose(left, right, rtol=1e-12)
    assert not np.allclose(combine(p, q), combine(q, p))
    h = rng.normal(size=5)
    step = lambda e, h: e[0] * h + e[1]  # noqa: E731
    np.testing.assert_allclose(step(combine(p, q), h), step(q, step(p, h)), rtol=1e-12)


def test_bad_input_is_named():
    good = as_float32(random_inputs(2, 5, 3, 4))
    for name in NAMES[1:]:
        cut = good[name][:-1] if name == "A" else good[name][..., :-1]
        with pytest.raises(ValueError, match=f"^{name} must have shape"):
            selective_scan(**(good | {name: cut}))
    for axis in range(3):
        empty = np.take(good["x"], [], axis=axis)
        with pytest.raises(ValueError, match=r"x must have shape \(b, l, d\), all >= 1"):
            selective_scan(**(good | {"x": empty}))
    with pytest.raises(ValueError, match=r"A must have shape \(d, n\), all >= 1"):
        selective_scan(**(good | {"A": good["A"][:, :0]}))
    with pytest.raises(ValueError, match=r"^resets must have shape \(2, 5\)"):
        selective_scan(**good, resets=np.zeros((2, 4), bool))
    with pytest.raises(TypeError, match="^resets must be bool.*int64"):
        selective_scan(**good, resets=np.zeros((2, 5), int))
    with pytest.raises(ValueError, match="unknown method 'parallel'.*associative.*sequential"):
        selective_scan(**good, method="parallel")


@pytest.mark.parametrize("dtype", [np.int32, bool, np.complex64])
def test_numbers_of_another_kind_are_refused(dtype):
    good = as_float32(random_inputs(2, 5, 3, 4))
    for name in NAMES:
        with pytest.raises(TypeError, match=f"^{name} must hold floating-point numbers"):
            selective_scan(**(good | {name: good[name].astype(dtype)}))
        with pytest.raises(TypeError, match=f"^{name} must be an array, got list"):
            selective_scan(**(good | {name: good[name].tolist()}))
