"""The layers: matrix products of a few rows against float64, the convolution against its parts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mamba import layers
from mamba.layers import MAX_SUMMED, CausalConv, few_rows_dot, tied_logits, zero_at_padding

DENSE = (((1,), (0,)), ((), ()))


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def assert_close(found, expected, tolerance=1e-6):
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


@pytest.mark.parametrize("r", [1, 2, 3, 5, 8, 9])
@pytest.mark.parametrize("k, m", [(32, 5), (16, 1), (48, 80), (17, 8), (64, MAX_SUMMED // 4)])
def test_few_rows_dot(r, k, m):
    x, kernel = numbers(r, k), numbers(k, m, seed=1)
    expected = x.astype(np.float64) @ kernel

    @jax.jit
    def products(x, kernel):
        in_block = few_rows_dot(x[:, None], kernel, (((2,), (0,)), ((), ())))  # x: (r, 1, k)
        return few_rows_dot(x, kernel, DENSE), in_block[:, 0]

    for product in products(x, kernel):
        assert_close(product, expected)


@pytest.mark.parametrize("r", [1, 2, 7, 8, 9])
@pytest.mark.parametrize("v, k", [(8, 3), (80, 32), (81, 32)])
def test_tied_logits(r, v, k):
    x, table = numbers(r, k), numbers(v, k, seed=1)
    assert_close(jax.jit(tied_logits)(x, table), x.astype(np.float64) @ table.T)


def test_bfloat16():
    x, kernel = (numbers(*shape).astype(jnp.bfloat16) for shape in ((4, 64), (64, 24)))
    expected = x.astype(np.float64) @ kernel.astype(np.float64)
    y = few_rows_dot(jnp.asarray(x), jnp.asarray(kernel), DENSE)
    assert y.dtype == jnp.bfloat16
    assert_close(np.float64(y), expected, 2**-8)  # summed in float32, rounded once
    logits = tied_logits(jnp.asarray(x), jnp.asarray(kernel).T)
    assert logits.dtype == jnp.float32
    assert_close(logits, expected, 1e-5)


def test_gradients():
    x, kernel, weight = numbers(4, 32), numbers(32, 8, seed=1), numbers(4, 8, seed=2)
    dense = lambda x, k: few_rows_dot(x, k, DENSE)  # noqa: E731
    for function, second in ((dense, kernel), (tied_logits, kernel.T)):
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


def test_when_the_product_is_split(monkeypatch):
    def dense(r, k=32, m=8):
        return batched(lambda x, k: few_rows_dot(x, k, DENSE), numbers(r, k), numbers(k, m))

    def head():
        return batched(lambda x, table: tied_logits(x, table), numbers(4, 32), numbers(16, 32))

    assert [dense(r) for r in (1, 2, 8, 9)] == [[False], [True], [True], [False]]
    assert dense(4, k=33) == [False]
    assert dense(4, m=MAX_SUMMED // 4) == [True]
    assert dense(4, m=MAX_SUMMED // 4 + 1) == [True, True]  # two rows and two rows
    assert dense(4, m=MAX_SUMMED // 2 + 1) == [False]
    assert head() == [True]
    monkeypatch.setattr(layers.jax, "default_backend", lambda: "gpu")
    assert dense(4) == [False]
    assert head() == [False]


# --- the convolution, which owns its cache ------------------------------------------------------


def convolution(width, use_bias=True, d=5):
    """A convolution with random parameters, compiled: (x, past, lengths, resets) -> (y, past)."""
    params = {"kernel": numbers(width, d, seed=2)}
    if use_bias:
        params["bias"] = numbers(d, seed=3)
    conv = CausalConv(width, use_bias)
    return params, jax.jit(lambda *args: conv.apply({"params": params}, *args))


@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("use_bias", [True, False])
def test_convolution_is_numpys_correlation(width, use_bias):
    params, apply = convolution(width, use_bias)
    x, past = numbers(3, 7, 5), numbers(3, width - 1, 5, seed=1)
    y, after = apply(x, past, None, None)
    window = np.concatenate([past, x], axis=1)
    expected = np.zeros_like(x, np.float64)
    for row, channel in np.ndindex(3, 5):
        taps = np.float64(params["kernel"][:, channel])
        expected[row, :, channel] = np.correlate(window[row, :, channel], taps, "valid")
    assert_close(y, expected + params.get("bias", 0.0))
    assert (np.asarray(after) == window[:, 7:]).all()


@pytest.mark.parametrize("width", [1, 2, 4])
def test_convolution_in_two_calls_is_one(width):
    _, apply = convolution(width)
    x, past = numbers(2, 9, 5), numbers(2, width - 1, 5, seed=1)
    whole, end = apply(x, past, None, None)
    for cut in (1, 2, 5):
        first, between = apply(x[:, :cut], past, None, None)
        second, after = apply(x[:, cut:], between, None, None)
        assert_close(np.concatenate([first, second], axis=1), np.asarray(whole))
        assert (np.asarray(after) == np.asarray(end)).all()


@pytest.mark.parametrize("length", [0, 1, 2, 6])
def test_the_cache_of_a_padded_row_is_that_of_the_row_alone(length):
    _, apply = convolution(4)
    x, past = numbers(1, 6, 5), numbers(1, 3, 5, seed=1)
    _, padded = apply(x, past, np.array([length]), None)
    alone = np.concatenate([past, x[:, :length]], axis=1)[:, -3:]
    assert (np.asarray(padded) == alone).all()


@pytest.mark.parametrize("start", [0, 1, 4, 8])
def test_a_segment_is_convolved_as_if_alone(start):
    _, apply = convolution(4)
    x, past = numbers(1, 9, 5), numbers(1, 3, 5, seed=1)
    resets = np.zeros((1, 9), bool)
    resets[:, start] = True
    y, after = apply(x, past, None, resets)
    expected, expected_after = apply(x[:, start:], np.zeros_like(past), None, None)
    assert_close(np.asarray(y)[:, start:], np.asarray(expected))
    assert (np.asarray(after) == np.asarray(expected_after)).all()
    before, _ = apply(x, past, None, None)
    assert (np.asarray(y)[:, :start] == np.asarray(before)[:, :start]).all()


def test_time_steps_at_padding_are_zero_and_no_others():
    delta = numbers(3, 4, 2) ** 2 + 1
    found = np.asarray(zero_at_padding(delta, np.array([0, 2, 4])))
    assert (found != 0).sum(axis=(1, 2)).tolist() == [0, 4, 8]
    assert (found[1, :2] == delta[1, :2]).all() and (found[2] == delta[2]).all()
    assert zero_at_padding(delta, None) is delta
