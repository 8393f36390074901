"""The three views of a linear time-invariant system against SciPy, and against each other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.linalg
import scipy.signal

from mamba.discretize import zoh
from mamba.lti import (
    causal_convolution,
    convolution_kernel,
    exact_solution,
    impulse_response,
    recurrence,
)
from mamba_book.reference import relative_error

# Compiled: one program for each function and shape, instead of one for each operation.
zoh, exact_solution, impulse_response, recurrence, causal_convolution = map(
    jax.jit, (zoh, exact_solution, impulse_response, recurrence, causal_convolution)
)
convolution_kernel = jax.jit(convolution_kernel, static_argnums=3)


def system(n, seed=0):
    """A stable, non-normal A with complex eigenvalues; B, C, D and an initial state."""
    rng = np.random.default_rng(seed)
    A = rng.normal(size=(n, n))
    A -= (np.linalg.eigvals(A).real.max() + 0.3) * np.eye(n)
    return A, rng.normal(size=n), rng.normal(size=n), rng.normal(), rng.normal(size=n)


def tokens(l, seed=0):
    return np.random.default_rng(100 + seed).normal(size=l)


def as_jax(*values):
    return [jnp.asarray(value) for value in values]


def numpy_loop(A_bar, B_bar, C, D, x, h0=None):
    h = np.zeros(len(B_bar)) if h0 is None else np.array(h0, np.float64)
    ys, hs = [], []
    for x_t in x:
        h = A_bar @ h + B_bar * x_t
        hs.append(h)
        ys.append(C @ h + D * x_t)
    return np.array(ys), np.array(hs)


# --- the exact solution ---------------------------------------------------------------------------


def integrate(A, B, x, delta, t, h0):
    """One initial value problem per interval, since a solver must not step across a jump."""
    h, states = np.array(h0), {0.0: np.array(h0)}
    for k in range(len(x) + 2):  # two intervals more, with the input off
        x_k = x[k] if k < len(x) else 0.0
        inside = [s for s in t if k * delta < s <= (k + 1) * delta]
        solution = scipy.integrate.solve_ivp(
            lambda _, h, x_k=x_k: A @ h + B * x_k,
            (k * delta, (k + 1) * delta),
            h,
            method="DOP853",
            t_eval=sorted({*inside, (k + 1) * delta}),
            rtol=1e-12,
            atol=1e-14,
        )
        states.update(zip(solution.t, solution.y.T, strict=True))
        h = solution.y[:, -1]
    return np.array([states[s] for s in t])


@pytest.mark.parametrize(("n", "l"), [(1, 1), (4, 3)])
def test_exact_solution_agrees_with_an_ode_solver(n, l, double):
    A, B, _, _, h0 = system(n, seed=n)
    x, delta = tokens(l), 0.6
    t = np.array([0.35, 0.0, 0.61, 0.05, (l + 1.5) * delta, (l - 0.25) * delta])  # any order
    h = exact_solution(*as_jax(A, B, x, delta, t, h0))
    assert h.shape == (len(t), n)
    assert relative_error(h, integrate(A, B, x, delta, t, h0)) < 1e-10


def test_exact_solution_of_a_singular_system(double):
    """A mass without spring or friction, pushed for one second, then left alone."""
    A, B = jnp.array([[0.0, 1.0], [0.0, 0.0]]), jnp.array([0.0, 1.0])
    h = exact_solution(A, B, jnp.array([2.0]), 1.0, jnp.array([0.0, 0.5, 1.0, 3.0]))
    np.testing.assert_allclose(h, [[0, 0], [0.25, 1], [1, 2], [5, 2]], atol=1e-12)


def test_exact_solution_starts_at_h0_or_at_zero():
    A, B, _, _, h0 = map(np.float32, system(3))
    x, t = np.float32(tokens(2)), np.zeros(1, np.float32)
    at_start = np.asarray(exact_solution(A, B, x, 0.5, t, h0))
    np.testing.assert_allclose(at_start[0], h0, rtol=1e-6)
    assert (np.asarray(exact_solution(A, B, x, 0.5, t)) == 0).all()


def test_exact_solution_in_float32():
    A, B, _, _, h0 = system(4, seed=6)
    x, delta = tokens(9), 0.4
    t = delta * np.arange(1, 10)
    h = exact_solution(*(jnp.float32(v) for v in (A, B, x, delta, t, h0)))
    A_bar, B_bar = scipy_zoh(A, B, delta)
    assert relative_error(h, numpy_loop(A_bar, B_bar, B, 0.0, x, h0)[1]) < 1e-5


# --- the impulse response -------------------------------------------------------------------------


def test_impulse_response_agrees_with_scipy(double):
    A, B, C, _, _ = system(4, seed=8)
    t = np.linspace(0, 5, 41)
    K = impulse_response(*as_jax(A, B, C, t))
    expected = np.array([C @ scipy.linalg.expm(s * A) @ B for s in t])
    _, simulated = scipy.signal.impulse((A, B[:, None], C[None], 0.0), T=t)
    assert K.shape == (41,)
    assert relative_error(K, expected) < 1e-12
    assert relative_error(K, simulated) < 1e-10


def test_zoh_kernel_integrates_the_impulse_response_over_each_interval(double):
    A, B, C, _, _ = system(3, seed=9)
    delta, l = 0.4, 12
    K = convolution_kernel(*zoh(A, B, delta), C, l)
    nodes, weights = np.polynomial.legendre.leggauss(16)
    t = delta * (np.arange(l)[:, None] + (nodes + 1) / 2)  # (l, 16)
    values = np.asarray(impulse_response(A, B, C, t.ravel())).reshape(l, 16)
    assert relative_error(K, delta / 2 * values @ weights) < 1e-11


# --- recurrence and convolution -------------------------------------------------------------------


def scipy_zoh(A, B, delta):
    n = len(B)
    A_bar, B_bar, *_ = scipy.signal.cont2discrete(
        (A, B[:, None], np.eye(n), np.zeros((n, 1))), delta, method="zoh"
    )
    return A_bar, B_bar[:, 0]


@pytest.mark.parametrize("with_h0", [False, True])
@pytest.mark.parametrize(("n", "l"), [(1, 1), (3, 1), (1, 7), (4, 2), (5, 33)])
def test_recurrence_agrees_with_a_loop(n, l, with_h0):
    A, B, C, D, h0 = system(n, seed=n)
    A_bar, B_bar = scipy_zoh(A, B, 0.5)
    x, h0 = tokens(l), h0 if with_h0 else None
    y, h = recurrence(
        *(jnp.float32(v) for v in (A_bar, B_bar, C, D, x)),
        h0=None if h0 is None else jnp.float32(h0),
    )
    y_ref, h_ref = numpy_loop(A_bar, B_bar, C, D, x, h0)
    assert y.shape == (l,) and h.shape == (l, n)
    assert relative_error(y, y_ref) < 1e-5
    assert relative_error(h, h_ref) < 1e-5


@pytest.mark.parametrize("l", [1, 2, 7, 16, 33])
def test_convolution_agrees_with_the_recurrence(l):
    A, B, C, D, _ = system(4, seed=l)
    A_bar, B_bar = scipy_zoh(A, B, 0.5)
    x = tokens(l)
    K = convolution_kernel(*(jnp.float32(v) for v in (A_bar, B_bar, C)), l)
    y = causal_convolution(jnp.float32(x), K, jnp.float32(D))
    assert K.shape == y.shape == (l,)
    assert relative_error(y, numpy_loop(A_bar, B_bar, C, D, x)[0]) < 1e-5


def test_kernel_is_the_response_to_one_impulse():
    A, B, C, _, _ = system(4, seed=3)
    A_bar, B_bar = scipy_zoh(A, B, 0.5)
    l = 20
    K = convolution_kernel(*(jnp.float32(v) for v in (A_bar, B_bar, C)), l)
    powers = np.array([C @ np.linalg.matrix_power(A_bar, k) @ B_bar for k in range(l)])
    response, _ = numpy_loop(A_bar, B_bar, C, 0.0, np.eye(l)[0])
    assert relative_error(K, powers) < 1e-5
    assert relative_error(K, response) < 1e-5


@pytest.mark.parametrize("l", [1, 2, 5, 8, 31])
def test_causal_convolution_agrees_with_numpy(l):
    x, K, D = tokens(l, seed=1), tokens(l, seed=2), 0.7
    y = causal_convolution(jnp.float32(x), jnp.float32(K), D)
    assert relative_error(y, np.convolve(x, K)[:l] + D * x) < 1e-5


def test_convolution_never_looks_ahead():
    """The last input meets the longest lag of a circular convolution, and must not wrap around."""
    l = 9
    K = np.float32(1 + np.arange(l))
    y = np.asarray(causal_convolution(np.eye(l, dtype=np.float32)[-1], K, 0.0))
    np.testing.assert_allclose(y[:-1], 0, atol=1e-5)
    np.testing.assert_allclose(y[-1], K[0], rtol=1e-5)


@pytest.mark.parametrize(("x", "K"), [(5, 4), (4, 5), (1, 3)])
def test_causal_convolution_refuses_a_kernel_of_another_length(x, K):
    with pytest.raises(ValueError, match="as long as the input"):
        causal_convolution(jnp.ones(x), jnp.ones(K), 0.0)


# --- the chain: exact solution -> recurrence -> convolution ---------------------------------------


def through_exact_solution(A, B, C, D, x, delta):
    t = delta * jnp.arange(1, x.shape[0] + 1)  # the ends of the intervals
    return exact_solution(A, B, x, delta, t) @ C + D * x


def through_recurrence(A, B, C, D, x, delta):
    return recurrence(*zoh(A, B, delta), C, D, x)[0]


def through_convolution(A, B, C, D, x, delta):
    return causal_convolution(x, convolution_kernel(*zoh(A, B, delta), C, x.shape[0]), D)


@pytest.mark.parametrize(("n", "l"), [(1, 1), (3, 7)])
def test_views_agree_forward_and_in_every_gradient(n, l, double):
    A, B, C, D, _ = system(n, seed=10 * n + l)
    arguments = as_jax(A, B, C, D, tokens(l), 0.45)
    weights = jnp.asarray(tokens(l, seed=5))

    def output_and_gradients(view):
        def loss(*arguments):
            y = view(*arguments)
            return jnp.sum(weights * y), y

        gradients, y = jax.jit(jax.grad(loss, argnums=range(6), has_aux=True))(*arguments)
        return y, dict(zip(["A", "B", "C", "D", "x", "delta"], gradients, strict=True))

    y_exact, exact = output_and_gradients(through_exact_solution)
    for view in (through_recurrence, through_convolution):
        y, gradients = output_and_gradients(view)
        assert relative_error(y, y_exact) < 1e-11
        for name in exact:
            assert relative_error(gradients[name], exact[name]) < 1e-9, name


def test_recurrence_continues_from_its_state(double):
    A, B, C, D, h0 = system(3, seed=4)
    A_bar, B_bar = zoh(A, B, 0.3)
    run = lambda x, h0: map(np.asarray, recurrence(A_bar, B_bar, C, D, x, h0))  # noqa: E731
    x = tokens(11)
    y, h = run(x, h0)
    y1, h1 = run(x[:4], h0)
    y2, h2 = run(x[4:], h1[-1])
    assert relative_error(np.concatenate([y1, y2]), y) < 1e-12
    assert relative_error(h2[-1], h[-1]) < 1e-12


def test_gradient_of_the_recurrence_in_h0(double):
    A, B, C, D, h0 = system(3, seed=4)
    A_bar, B_bar = map(np.asarray, zoh(A, B, 0.3))
    last = lambda h0: recurrence(A_bar, B_bar, C, D, tokens(6), h0)[0][-1]  # noqa: E731
    gradient = jax.jit(jax.grad(last))(h0)
    assert relative_error(gradient, C @ np.linalg.matrix_power(A_bar, 6)) < 1e-11


def test_systems_that_do_not_fit_are_refused_by_name():
    A, B, C, x, t = jnp.eye(3), jnp.ones(3), jnp.ones(3), jnp.ones(5), jnp.ones(2)
    two = jnp.ones(2)
    for call in (
        lambda A, B: exact_solution(A, B, x, 0.1, t),
        lambda A, B: impulse_response(A, B, C, t),
        lambda A, B: recurrence(A, B, C, 0.0, x),
        lambda A, B: convolution_kernel(A, B, C, 5),
    ):
        call(A, B)
        with pytest.raises(ValueError, match=r"square matrix \(n, n\), got \(3,\)"):
            call(B, B)  # a diagonal
        with pytest.raises(ValueError, match=r"B\w* must have shape \(3,\) to fit A, got \(2,\)"):
            call(A, two)
    with pytest.raises(ValueError, match="C must have shape"):
        recurrence(A, B, two, 0.0, x)
    with pytest.raises(ValueError, match="h0 must have shape"):
        exact_solution(A, B, x, 0.1, t, h0=two)
