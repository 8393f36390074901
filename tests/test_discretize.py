"""The discretization rules against SciPy, against each other, and where a formula divides by 0."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
import scipy.signal

from mamba.discretize import (
    bilinear,
    bilinear_diag,
    euler,
    euler_diag,
    mixed_diag,
    trapezoid_diag,
    zoh,
    zoh_diag,
)
from mamba_book.reference import relative_error

# Compiled: one program for each rule and shape, instead of one for each operation.
zoh, euler, bilinear = map(jax.jit, (zoh, euler, bilinear))
zoh_diag, euler_diag, bilinear_diag, mixed_diag = map(
    jax.jit, (zoh_diag, euler_diag, bilinear_diag, mixed_diag)
)
DENSE = {"zoh": zoh, "euler": euler, "bilinear": bilinear}
DIAGONAL = {"zoh": zoh_diag, "euler": euler_diag, "bilinear": bilinear_diag}
DELTAS = [1e-3, 0.1, 1.7]


def system(n, seed=0):
    """A stable, non-normal A with complex eigenvalues, and a B."""
    rng = np.random.default_rng(seed)
    A = rng.normal(size=(n, n))
    A -= (np.linalg.eigvals(A).real.max() + 0.3) * np.eye(n)
    return A, rng.normal(size=n)


def scipy_rule(A, B, delta, rule):
    n = len(B)
    A_bar, B_bar, *_ = scipy.signal.cont2discrete(
        (A, B[:, None], np.eye(n), np.zeros((n, 1))), delta, method=rule
    )
    return A_bar, B_bar[:, 0]


# --- dense A --------------------------------------------------------------------------------------


@pytest.mark.parametrize("delta", DELTAS)
@pytest.mark.parametrize("n", [1, 2, 5])
@pytest.mark.parametrize("rule", DENSE)
def test_dense_rules_agree_with_scipy(rule, n, delta, double):
    A, B = system(n, seed=n)
    A_bar, B_bar = DENSE[rule](jnp.asarray(A), jnp.asarray(B), delta)
    A_ref, B_ref = scipy_rule(A, B, delta, rule)
    assert A_bar.shape == (n, n) and B_bar.shape == (n,)
    assert relative_error(A_bar, A_ref) < 1e-12
    assert relative_error(B_bar, B_ref) < 1e-12


@pytest.mark.parametrize("delta", DELTAS)
@pytest.mark.parametrize("rule", DENSE)
def test_dense_rules_in_float32(rule, delta):
    A, B = system(5, seed=7)
    A_bar, B_bar = DENSE[rule](jnp.float32(A), jnp.float32(B), delta)
    A_ref, B_ref = scipy_rule(A, B, delta, rule)
    assert A_bar.dtype == B_bar.dtype == jnp.float32
    assert relative_error(A_bar, A_ref) < 1e-5
    assert relative_error(B_bar, B_ref) < 1e-5


def test_zoh_is_the_matrix_exponential_and_its_integral(double):
    A, B = system(5, seed=3)
    A_bar, B_bar = zoh(jnp.asarray(A), jnp.asarray(B), 0.7)
    assert relative_error(A_bar, scipy.linalg.expm(0.7 * A)) < 1e-12
    nodes, weights = np.polynomial.legendre.leggauss(20)
    integral = sum(
        0.35 * w * scipy.linalg.expm(0.35 * (node + 1) * A) @ B
        for node, w in zip(nodes, weights, strict=True)
    )
    assert relative_error(B_bar, integral) < 1e-12


def test_zoh_of_a_singular_matrix(double):
    delta = 0.3
    A_bar, B_bar = zoh(jnp.zeros((2, 2)), jnp.array([1.0, -2.0]), delta)
    np.testing.assert_allclose(A_bar, np.eye(2), atol=1e-15)
    np.testing.assert_allclose(B_bar, [delta, -2 * delta], rtol=1e-12)
    # a mass without spring or friction: position and velocity under a constant force
    A_bar, B_bar = zoh(jnp.array([[0.0, 1.0], [0.0, 0.0]]), jnp.array([0.0, 1.0]), delta)
    np.testing.assert_allclose(A_bar, [[1, delta], [0, 1]], rtol=1e-12)
    np.testing.assert_allclose(B_bar, [delta**2 / 2, delta], rtol=1e-12)


def test_two_half_steps_of_zoh_are_one_step(double):
    A, B = map(jnp.asarray, system(5, seed=5))
    whole_A, whole_B = zoh(A, B, 0.8)
    half_A, half_B = map(np.asarray, zoh(A, B, 0.4))
    assert relative_error(half_A @ half_A, whole_A) < 1e-12
    assert relative_error(half_A @ half_B + half_B, whole_B) < 1e-12


@pytest.mark.parametrize(("rule", "order"), [("euler", 1), ("bilinear", 2)])
def test_order_of_the_error_of_one_step(rule, order, double):
    A, B = map(jnp.asarray, system(5, seed=11))

    def errors(delta):
        exact, approximate = zoh(A, B, delta), DENSE[rule](A, B, delta)
        exact, approximate = jax.device_get((exact, approximate))
        return [np.abs(e - a).max() for e, a in zip(exact, approximate, strict=True)]

    for coarse, fine in zip(errors(2e-2), errors(1e-2), strict=True):
        assert abs(np.log2(coarse / fine) - (order + 1)) < 0.1  # the global order is one lower


def test_stability():
    A, B = system(5, seed=2)
    eigenvalues = np.linalg.eigvals(A)
    limit = (-2 * eigenvalues.real / np.abs(eigenvalues) ** 2).min()  # |1 + Δ λ| = 1

    def radius(rule, delta):
        A_bar = DENSE[rule](jnp.float32(A), jnp.float32(B), delta)[0]
        return np.abs(np.linalg.eigvals(np.float64(A_bar))).max()

    assert radius("euler", 0.99 * limit) < 1 < radius("euler", 1.01 * limit)
    for delta in (0.99 * limit, 10 * limit, 100 * limit):
        assert radius("zoh", delta) < 1 and radius("bilinear", delta) < 1


# --- diagonal A -----------------------------------------------------------------------------------


@pytest.mark.parametrize("delta", DELTAS)
@pytest.mark.parametrize("rule", DENSE)
def test_diagonal_rules_are_the_dense_rules_of_a_diagonal_matrix(rule, delta, double):
    rng = np.random.default_rng(1)
    A = np.append(-rng.uniform(0.1, 16, 4), 0.0)
    B = rng.normal(size=5)
    A_bar, B_bar = DIAGONAL[rule](A, B, delta)
    A_dense, B_dense = DENSE[rule](np.diag(A), B, delta)
    assert relative_error(np.diag(A_bar), A_dense) < 1e-12
    assert relative_error(B_bar, B_dense) < 1e-12


@pytest.mark.parametrize("rule", [*DIAGONAL.values(), mixed_diag])
def test_diagonal_rules_broadcast(rule):
    rng = np.random.default_rng(2)
    A = np.float32(-rng.uniform(0.1, 16, (5, 3)))  # (d, n)
    B = np.float32(rng.normal(size=(2, 7, 1, 3)))  # (b, l, 1, n)
    delta = np.float32(rng.uniform(1e-3, 0.1, (2, 7, 5, 1)))  # (b, l, d, 1)
    A_bar, B_bar = map(np.asarray, rule(A, B, delta))
    assert A_bar.shape == B_bar.shape == (2, 7, 5, 3)
    alone = rule(A[4, 1], B[1, 6, 0, 1], delta[1, 6, 4, 0])
    np.testing.assert_allclose(A_bar[1, 6, 4, 1], alone[0], rtol=1e-6)
    np.testing.assert_allclose(B_bar[1, 6, 4, 1], alone[1], rtol=1e-6)


def test_complex_diagonal(double):
    A = np.array([-0.2 + 2j, -0.2 - 2j, -1.0 + 0j])
    B = np.array([1.0, 1.0, 0.5])
    A_bar, B_bar = map(np.asarray, zoh_diag(A, B, 0.3))
    np.testing.assert_allclose(A_bar, np.exp(0.3 * A), rtol=1e-12)
    np.testing.assert_allclose(B_bar, (A_bar - 1) / A * B, rtol=1e-12)


@pytest.mark.parametrize("z", [1e-8, 1e-6, 1e-4, 1e-2, 1.0, 30.0, 200.0])
def test_zoh_diag_in_float32_is_accurate_at_every_scale(z):
    """(exp(z) − 1)/z as it is written loses all digits at 1e-8; expm1 does not."""
    _, B_bar = zoh_diag(jnp.float32(-z), jnp.float32(2.0), jnp.float32(0.5))
    z = np.float64(np.float32(0.5) * np.float32(z))
    assert relative_error(B_bar, 0.5 * 2.0 * -np.expm1(-z) / z) < 1e-6


def test_mixed_diag_is_zoh_for_A_and_euler_for_B():
    A, B, delta = jnp.float32([-1, -16, 0]), jnp.float32([3, -2, 1]), jnp.float32(0.1)
    A_bar, B_bar = mixed_diag(A, B, delta)
    np.testing.assert_allclose(A_bar, np.exp([-0.1, -1.6, 0]), rtol=1e-6)
    np.testing.assert_allclose(B_bar, [0.3, -0.2, 0.1], rtol=1e-6)


def test_sigmoid_gate():
    """Theorem 1 of the paper: A = −1, B = 1 and Δ = softplus(u) give 1 − σ(u) and σ(u)."""
    u = np.linspace(-8.0, 8.0, 33)
    A_bar, B_bar = zoh_diag(-1.0, 1.0, np.float32(np.logaddexp(0, u)))
    gate = 1 / (1 + np.exp(-np.float64(u)))
    np.testing.assert_allclose(A_bar, 1 - gate, rtol=1e-5)
    np.testing.assert_allclose(B_bar, gate, rtol=1e-5)


def global_error(rule, steps):
    """|h(2) − exact| for h′ = a h + sin(3 t) from 0, in so many steps of ``rule``."""
    a, delta = -1.5, 2.0 / steps
    A_bar, *B = map(float, rule(a, 1.0, delta))
    h = 0.0
    for t in range(1, steps + 1):
        samples = np.sin(3 * delta * np.array([t - 1, t]))[-len(B) :]
        h = A_bar * h + float(np.dot(B, samples))
    exact = (3 * np.exp(2 * a) - a * np.sin(6.0) - 3 * np.cos(6.0)) / (a**2 + 9)
    return abs(h - exact)


@pytest.mark.parametrize(
    ("rule", "order"),
    [
        (zoh_diag, 1),
        (euler_diag, 1),
        (bilinear_diag, 1),
        (mixed_diag, 1),
        (partial(trapezoid_diag, lam=1.0), 1),
        (partial(trapezoid_diag, lam=0.3), 1),
        (trapezoid_diag, 2),
    ],
)
def test_order_of_the_error_for_an_input_that_changes(rule, order, double):
    """To hold a sample costs an order, whatever the rule; the trapezoid wins it back."""
    coarse, fine = global_error(rule, 400), global_error(rule, 800)
    assert abs(np.log2(coarse / fine) - order) < 0.1


def test_the_trapezoid_with_all_weight_at_the_end_is_the_mixed_rule():
    A, B, delta = jnp.float32([-1, -16, 0]), jnp.float32([3, -2, 1]), jnp.float32(0.1)
    A_bar, B_before, B_now = trapezoid_diag(A, B, delta, 1.0)
    assert not np.asarray(B_before).any()
    assert relative_error((A_bar, B_now), mixed_diag(A, B, delta)) == 0


def test_trapezoid_diag_by_hand():
    A_bar, B_before, B_now = trapezoid_diag(-2.0, 3.0, 0.5, 0.25)
    np.testing.assert_allclose(A_bar, np.exp(-1.0), rtol=1e-6)
    np.testing.assert_allclose(B_before, 0.75 * 0.5 * np.exp(-1.0) * 3, rtol=1e-6)
    np.testing.assert_allclose(B_now, 0.25 * 0.5 * 3, rtol=1e-6)


# --- gradients ------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [*DIAGONAL.values(), mixed_diag])
def test_gradients_at_A_equal_to_zero(rule):
    """Every rule has finite gradients where ZOH's own quotient is 0/0, and ZOH's are its limits."""
    delta, B = 0.3, 2.0
    dA_bar, dB_bar = jax.jit(jax.jacrev(lambda A: rule(A, B, delta)))(0.0)
    np.testing.assert_allclose(dA_bar, delta, rtol=1e-6)
    expected = delta**2 / 2 * B if rule in (zoh_diag, bilinear_diag) else 0.0
    np.testing.assert_allclose(dB_bar, expected, rtol=1e-6, atol=1e-12)


def test_gradient_of_dense_zoh_at_a_singular_matrix(double):
    delta, B = 0.3, jnp.array([2.0])
    gradient = jax.jit(jax.grad(lambda A: zoh(A, B, delta)[1][0]))(jnp.zeros((1, 1)))
    np.testing.assert_allclose(gradient, [[delta**2 / 2 * 2.0]], rtol=1e-10)


@pytest.mark.parametrize("rule", [*DIAGONAL.values(), mixed_diag, *DENSE.values()])
def test_gradients_against_central_differences(rule, double):
    dense = rule in DENSE.values()
    A, B = system(3, seed=13) if dense else (np.array([-0.5, -3.0, -9.0]), np.ones(3))
    rng = np.random.default_rng(4)
    weights = rng.normal(size=A.shape), rng.normal(size=B.shape)

    @jax.jit
    @partial(jax.value_and_grad, argnums=(0, 1, 2))
    def loss_and_gradients(A, B, delta):
        A_bar, B_bar = rule(A, B, delta)
        return jnp.sum(weights[0] * A_bar) + jnp.sum(weights[1] * B_bar)

    arguments = [np.asarray(v) for v in (A, B, 0.2)]
    _, gradients = loss_and_gradients(*arguments)
    loss = lambda *arguments: loss_and_gradients(*arguments)[0]  # noqa: E731
    for i, gradient in enumerate(gradients):
        direction = rng.normal(size=arguments[i].shape)
        shifted = [list(arguments), list(arguments)]
        shifted[0][i] = arguments[i] + 1e-6 * direction
        shifted[1][i] = arguments[i] - 1e-6 * direction
        slope = float(loss(*shifted[0]) - loss(*shifted[1])) / 2e-6
        assert abs(slope - np.sum(gradient * direction)) < 1e-7 * max(1.0, abs(slope))


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", DENSE.values())
@pytest.mark.parametrize(
    ("A", "B"), [((2, 3), (2,)), ((3,), (3,)), ((2, 2), (3,)), ((2, 2), (2, 1)), ((2, 2), ())]
)
def test_dense_rules_refuse_wrong_shapes(rule, A, B):
    with pytest.raises(ValueError, match=r"expected A of shape \(n, n\).*_diag"):
        rule(jnp.ones(A), jnp.ones(B), 0.1)


slope_of_zoh_diag = jax.jit(jax.grad(lambda a: zoh_diag(a, 1.0, 1.0)[1]))


@pytest.mark.parametrize("z", [1e-7, 1e-5, 1e-3, 0.049, 0.051, 1.0])
def test_float32_gradient_of_zoh_diag_keeps_its_digits(z):
    """d/dA of (exp(A) − 1) / A is (A exp(A) − exp(A) + 1) / A², which float32 cannot evaluate."""
    grad = slope_of_zoh_diag(np.float32(-z))
    exact = sum((k + 1) * (-z) ** k / math.factorial(k + 2) for k in range(20))
    assert abs(float(grad) / exact - 1) < 1e-5


def test_gradient_of_zoh_diag_is_finite_for_a_huge_exponent():
    assert np.isfinite(slope_of_zoh_diag(np.float32(-1e7)))
