"""Products of a few rows, in small pieces, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mamba import products
from mamba.products import LARGEST, dot_general, dot_rows

DENSE = (((1,), (0,)), ((), ()))


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def assert_close(found, expected, tolerance=1e-6):
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


@pytest.mark.parametrize("r", [1, 2, 3, 5, 8, 9])
@pytest.mark.parametrize("k, m", [(32, 5), (16, 1), (48, 80), (17, 8), (64, LARGEST // 4)])
def test_dot_general(r, k, m):
    x, kernel = numbers(r, k), numbers(k, m, seed=1)
    expected = x.astype(np.float64) @ kernel

    @jax.jit
    def products(x, kernel):
        by_dense = dot_general(x[:, None], kernel, (((2,), (0,)), ((), ())))  # as the block does it
        return dot_general(x, kernel, DENSE), by_dense[:, 0]

    for product in products(x, kernel):
        assert_close(product, expected)


@pytest.mark.parametrize("r", [1, 2, 7, 8, 9])
@pytest.mark.parametrize("v, k", [(8, 3), (80, 32), (81, 32)])
def test_dot_rows(r, v, k):
    x, table = numbers(r, k), numbers(v, k, seed=1)
    assert_close(jax.jit(dot_rows)(x, table), x.astype(np.float64) @ table.T)


def test_bfloat16():
    x, kernel = (numbers(*shape).astype(jnp.bfloat16) for shape in ((4, 64), (64, 24)))
    expected = x.astype(np.float64) @ kernel.astype(np.float64)
    y = dot_general(jnp.asarray(x), jnp.asarray(kernel), DENSE)
    assert y.dtype == jnp.bfloat16
    assert_close(np.float64(y), expected, 2**-8)  # summed in float32, rounded once
    logits = dot_rows(jnp.asarray(x), jnp.asarray(kernel).T)
    assert logits.dtype == jnp.float32
    assert_close(logits, expected, 1e-5)


def test_gradients():
    x, kernel, weight = numbers(4, 32), numbers(32, 8, seed=1), numbers(4, 8, seed=2)
    for function, second in ((lambda x, k: dot_general(x, k, DENSE), kernel), (dot_rows, kernel.T)):
        loss = lambda x, k, f=function: (f(x, k) * weight).sum()  # noqa: E731
        dx, dk = jax.jit(jax.grad(loss, (0, 1)))(x, second)
        assert_close(dx, weight.astype(np.float64) @ kernel.T)
        expected = x.T.astype(np.float64) @ weight
        assert_close(dk, expected if second is kernel else expected.T)


def batched(function, *args):
    """Whether a product in the function is a batch of small ones."""
    products = [
        e for e in jax.make_jaxpr(function)(*args).eqns if e.primitive.name == "dot_general"
    ]
    return [bool(e.params["dimension_numbers"][1][0]) for e in products]


def test_when_in_pieces(monkeypatch):
    def dense(r, k=32, m=8):
        return batched(lambda x, k: dot_general(x, k, DENSE), numbers(r, k), numbers(k, m))

    def head():
        return batched(lambda x, table: dot_rows(x, table), numbers(4, 32), numbers(16, 32))

    assert [dense(r) for r in (1, 2, 8, 9)] == [[False], [True], [True], [False]]
    assert dense(4, k=33) == [False]
    assert dense(4, m=LARGEST // 4) == [True]
    assert dense(4, m=LARGEST // 4 + 1) == [True, True]  # two rows and two rows
    assert dense(4, m=LARGEST // 2 + 1) == [False]
    assert head() == [True]
    monkeypatch.setattr(products.jax, "default_backend", lambda: "gpu")
    assert dense(4) == [False]
    assert head() == [False]
