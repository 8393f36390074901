"""selective_scan against a float64 loop: values, states, gradients, awkward shapes, bad input."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mamba.scan import combine, selective_scan
from tests.reference import relative_error, selective_scan_loop

METHODS = ["sequential", "associative"]
NAMES = ["x", "delta", "A", "B", "C", "D", "z", "h0"]


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
    return {k: jnp.asarray(v, jnp.float32) for k, v in inputs.items()}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("b", "l", "d", "n"),
    [
        (1, 1, 1, 1),
        (2, 1, 5, 3),
        (3, 2, 4, 16),
        (2, 15, 5, 3),
        (1, 16, 4, 16),
        (3, 17, 5, 1),
        (2, 64, 1, 4),
    ],
)
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
    for absent in (["z"], ["h0"], ["z", "h0"]):
        given = {k: v for k, v in inputs.items() if k not in absent}
        y = selective_scan(**as_float32(given), method=method)
        assert relative_error(y, selective_scan_loop(**given)[0]) < 1e-5


@pytest.mark.parametrize("method", METHODS)
def test_long_sequence_does_not_drift(method):
    inputs = random_inputs(1, 3000, 2, 4)
    y, h = run(as_float32(inputs), method)
    y_ref, h_ref = selective_scan_loop(**inputs)
    assert relative_error(y, y_ref) < 1e-5 and relative_error(h, h_ref) < 1e-5


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("l", [1, 2, 19])
def test_gradients_agree_with_float64_finite_differences(method, l):
    """Along random directions, for every argument, through outputs and returned state."""
    inputs = random_inputs(2, l, 3, 4, seed=7 + l)
    rng = np.random.default_rng(1)
    weight_y, weight_h = rng.normal(size=(2, l, 3)), rng.normal(size=(2, 3, 4))

    def loss_loop(values):
        y, h = selective_scan_loop(**values)
        return (y * weight_y).sum() + (h * weight_h).sum()

    def loss(values):
        y, h = selective_scan(**values, method=method, return_state=True)
        return (y * weight_y).sum() + (h * weight_h).sum()

    grads = jax.jit(jax.grad(loss))(as_float32(inputs))
    for name in NAMES:
        for seed in range(3):
            direction = np.random.default_rng(seed).normal(size=inputs[name].shape)
            direction *= 0.01 if name == "delta" else 1.0
            step = 1e-5
            plus = loss_loop({**inputs, name: inputs[name] + step * direction})
            minus = loss_loop({**inputs, name: inputs[name] - step * direction})
            expected = (plus - minus) / (2 * step)
            grad = np.asarray(grads[name], np.float64)
            scale = np.linalg.norm(grad) * np.linalg.norm(direction) + 1e-12
            assert abs((grad * direction).sum() - expected) / scale < 1e-4, name


@pytest.mark.parametrize("l", [1, 16, 37])
def test_own_backward_pass_agrees_with_autodiff(l):
    """The hand-written gradient of "sequential" against JAX's through "associative"."""
    inputs = as_float32(random_inputs(3, l, 8, 5, seed=l))

    def grads(method):
        def loss(values):
            y, h = selective_scan(**values, method=method, return_state=True)
            return jnp.sum(jnp.sin(y)) + jnp.sum(h**2)

        return jax.jit(jax.grad(loss))(inputs)

    ours, autodiff = grads("sequential"), grads("associative")
    for name in NAMES:
        assert relative_error(ours[name], autodiff[name]) < 1e-4, name


@pytest.mark.parametrize("method", METHODS)
def test_any_split_continues(method):
    inputs = as_float32(random_inputs(2, 40, 3, 4))
    whole, h_whole = run(inputs, method)
    for cut in (1, 16, 23):
        first = {k: v[:, :cut] if k in "x delta B C z".split() else v for k, v in inputs.items()}
        rest = {k: v[:, cut:] if k in "x delta B C z".split() else v for k, v in inputs.items()}
        y1, h = run(first, method)
        y2, h = run(rest | {"h0": h}, method)
        assert relative_error(jnp.concatenate([y1, y2], 1), whole) < 1e-5
        assert relative_error(h, h_whole) < 1e-5


@pytest.mark.parametrize("method", METHODS)
def test_zero_delta_passes_the_state_through(method):
    inputs = as_float32(random_inputs(2, 20, 3, 4))
    inputs["delta"] = jnp.zeros_like(inputs["delta"])
    _, h = selective_scan(**inputs, method=method, return_state=True)
    assert (h == inputs["h0"]).all()


@pytest.mark.parametrize("method", METHODS)
def test_dtypes(method):
    inputs = {k: v.astype(jnp.bfloat16) for k, v in as_float32(random_inputs(2, 20, 3, 4)).items()}
    y, h = selective_scan(**inputs, method=method, return_state=True)
    assert y.dtype == jnp.bfloat16 and h.dtype == jnp.float32
    exact, _ = selective_scan_loop(**{k: np.asarray(v, np.float64) for k, v in inputs.items()})
    assert relative_error(y, exact) < 2**-8  # only the output was rounded
    grads = jax.grad(lambda v: selective_scan(**v, method=method).astype(jnp.float32).sum())(inputs)
    assert all(grads[k].dtype == jnp.bfloat16 for k in NAMES)


@pytest.mark.parametrize("method", METHODS)
def test_transformations(method):
    """jit, vmap, checkpoint."""
    inputs = as_float32(random_inputs(2, 18, 3, 4))
    f = jax.jit(lambda v: selective_scan(**v, method=method))
    y = f(inputs)
    stacked = jax.tree.map(lambda v: jnp.stack([v, 0.5 * v]), inputs)
    assert relative_error(jax.vmap(f)(stacked)[0], y) < 1e-6
    loss = lambda v: jnp.sum(f(v) ** 2)  # noqa: E731
    plain, checkpointed = jax.grad(loss)(inputs), jax.grad(jax.checkpoint(loss))(inputs)
    assert all(relative_error(checkpointed[k], plain[k]) < 1e-6 for k in NAMES)


def test_methods_agree_on_second_derivatives():
    inputs = as_float32(random_inputs(1, 18, 2, 3))

    def second(method):
        loss = lambda v: jnp.sum(selective_scan(**v, method=method) ** 2)  # noqa: E731
        return jax.jit(jax.grad(lambda v: sum(jnp.sum(g**2) for g in jax.grad(loss)(v).values())))(
            inputs
        )

    ours, autodiff = second("sequential"), second("associative")
    assert all(relative_error(ours[k], autodiff[k]) < 1e-3 for k in NAMES)


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
    with pytest.raises(ValueError, match="l >= 1"):
        selective_scan(**(good | {"x": good["x"][:, :0]}))
    with pytest.raises(ValueError, match="unknown method 'parallel'.*associative.*sequential"):
        selective_scan(**good, method="parallel")
