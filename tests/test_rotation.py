"""Angles over long texts against float64, and the two ways to pair numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mamba.rotation import PAIRS, cos_and_sin, fixed_point_turns, rotate, running_angle, running_sum


def angle_error(actual, expected):
    """Radians between two angles, whatever the number of whole turns between them."""
    difference = np.float64(actual) - np.float64(expected)
    return np.abs(np.angle(np.exp(1j * difference))).max(initial=0.0)


@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize("s", [0, 1, 3])
def test_a_turn_is_a_complex_product(pairs, s):
    rng = np.random.default_rng(0)
    v, angle = rng.normal(size=(2, 5, 6)), rng.uniform(-9, 9, (2, 5, s))
    first = np.arange(s) * (2 if pairs == "interleaved" else 1)
    second = first + (1 if pairs == "interleaved" else 3)
    z = (v[..., first] + 1j * v[..., second]) * np.exp(1j * angle)
    expected = v.copy()
    expected[..., first], expected[..., second] = z.real, z.imag
    turned = rotate(*map(np.float32, (v, np.cos(angle), np.sin(angle))), pairs)
    np.testing.assert_allclose(turned, expected, atol=1e-6)


def test_cosines_and_sines_with_their_derivatives():
    angle = np.linspace(-np.pi, np.pi, 10**5, dtype=np.float32)
    one = np.ones_like(angle)
    (cos, sin), (dcos, dsin) = jax.jvp(cos_and_sin, (angle,), (one,))
    exact = np.cos(np.float64(angle)), np.sin(np.float64(angle))
    for actual, expected in ((cos, exact[0]), (sin, exact[1]), (dcos, -exact[1]), (dsin, exact[0])):
        np.testing.assert_allclose(actual, expected, atol=7e-7, rtol=0)
    assert np.isnan(cos_and_sin(np.float32(np.nan))).all()


def test_turns_are_exact_to_a_unit():
    rng = np.random.default_rng(0)
    angle = np.float32(np.concatenate([rng.uniform(-16, 16, 10**5), rng.normal(size=10**5) * 1e-3]))
    expected = np.round(np.float64(angle) / (2 * np.pi) * 2**32) % 2**32
    difference = (np.int64(fixed_point_turns(angle)) - np.int64(expected)) % 2**32
    assert np.minimum(difference, 2**32 - difference).max() <= 1


@pytest.mark.parametrize("size", [0.01, 3.0, 15.0])
def test_angles_stay_exact_over_long_texts(size):
    """65,536 tokens that turn the same way, at once and in slices."""
    rng = np.random.default_rng(0)
    theta = np.float32(size * rng.uniform(0.5, 1, (1, 65536, 1, 2)))
    start = np.float32(rng.uniform(-3, 3, (1, 1, 2)))
    exact = np.float64(start)[:, None] + np.cumsum(np.float64(theta), axis=1)
    run = jax.jit(running_angle)
    angle = run(theta, start, None)
    assert angle_error(angle, exact) < 3e-6  # 65,536 roundings to 2^-32 turns, and one to float32
    for part in np.split(theta, 64, axis=1):
        start = run(part, start, None)[:, -1]
    assert angle_error(start, exact[:, -1]) < 3e-6
    in_float32 = exact[:, :1] - theta[:, :1] + np.cumsum(theta, axis=1)
    assert angle_error(in_float32, exact) > 5e-5


def test_angles_begin_again_at_a_reset():
    rng = np.random.default_rng(1)
    theta, start = np.float32(rng.normal(size=(2, 9, 1, 2))), np.float32(rng.normal(size=(2, 1, 2)))
    resets = np.zeros((2, 9), bool)
    resets[0, 4] = resets[1, 0] = True
    angle = running_angle(theta, start, resets)
    assert angle_error(angle[0, 4:], np.cumsum(theta[0, 4:], axis=0)) < 1e-6
    assert angle_error(angle[1], np.cumsum(theta[1], axis=0)) < 1e-6
    assert angle_error(angle[0, :4], start[0] + np.cumsum(theta[0, :4], axis=0)) < 1e-6


def test_gradients_of_angles_are_sums_from_the_end():
    resets = np.array([[False, False, True, False]])
    theta, start = np.ones((1, 4, 1, 1), np.float32), np.ones((1, 1, 1), np.float32)
    weights = jnp.arange(1.0, 5.0)[None, :, None, None]
    loss = lambda theta, start: (weights * running_angle(theta, start, resets)).sum()  # noqa: E731
    dtheta, dstart = jax.grad(loss, argnums=(0, 1))(theta, start)
    assert dtheta.ravel().tolist() == [3.0, 2.0, 7.0, 4.0] and dstart.item() == 3.0


@pytest.mark.parametrize("reverse", [False, True])
def test_sums_begin_anew(reverse):
    v, starts = jnp.arange(1.0, 6.0)[None], jnp.array([[False, True, False, True, False]])
    expected = [3.0, 2.0, 7.0, 4.0, 5.0] if reverse else [1.0, 2.0, 5.0, 4.0, 9.0]
    assert running_sum(v, starts, reverse=reverse)[0].tolist() == expected


def test_an_angle_to_begin_from_may_be_any():
    """Beyond half a turn it is the same angle; NaN stays NaN until the text begins again."""
    theta, start = np.zeros((1, 3, 1, 2), np.float32), np.float32([[[7.0, -100.0]]])
    angle = np.asarray(running_angle(theta, start, None))
    assert np.abs(angle).max() <= np.pi and angle_error(angle, start[:, None]) < 1e-5
    nan, resets = np.float32([[[np.nan, 1.0]]]), np.array([[False, False, True]])
    for more in (0.0, 1.0):
        angle = running_angle(theta + np.float32(more), nan, resets)[0, :, 0]
        np.testing.assert_array_equal(np.isnan(angle), [[True, False], [True, False], [False] * 2])
