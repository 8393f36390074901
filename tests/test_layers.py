"""The layers: the convolution against its parts, Δ = 0 at padding."""

import jax
import numpy as np
import pytest

from mamba.layers import CausalConv, zero_at_padding


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def assert_close(found, expected, tolerance=1e-6):
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


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


def test_what_the_convolution_refuses():
    _, apply = convolution(4)
    x, cache = numbers(3, 7, 5), numbers(3, 3, 5)
    for wrong in (numbers(3, 4, 5), numbers(2, 3, 5), numbers(3, 3, 1)):
        with pytest.raises(ValueError, match=r"cache must have shape \(3, 3, 5\)"):
            apply(x, wrong, None, None)
    with pytest.raises(ValueError, match=r"lengths must be integers of shape \(3,\)"):
        apply(x, cache, np.array([7, 7]), None)
    with pytest.raises(ValueError, match=r"resets must have shape \(3, 7\)"):
        apply(x, cache, None, np.zeros((3, 6), bool))
