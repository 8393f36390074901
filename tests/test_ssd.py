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


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize(
    ("b", "l", "h", "p", "n", "g"),
    [(2, 1, 4, 3, 5, 2), (1, 2, 2, 1, 1, 1), (2, 63, 3, 4, 5, 3), (1, 129, 6, 2, 3, 2)],
)
def test_agrees_with_float64(method, b, l, h, p, n, g, reset):
    inputs = random_inputs(b, l, h, p, n, g, seed=l)
    resets = np.random.default_rng(0).uniform(size=(b, l)) < 0.1 if reset else None
    check(inputs, resets, method)


@pytest.mark.parametrize("l", [517, 4096])
def test_long(l):
    check(random_inputs(1, l, 2, 2, 3, 1, seed=l), None, "chunked")


@pytest.mark.parametrize("chunk", [1, 2, 7, 64, 1000])
def test_any_chunk(chunk):
    check(random_inputs(2, 21, 4, 3, 2, 4), None, "chunked", chunk)
