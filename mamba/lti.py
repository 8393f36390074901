"""The linear time-invariant state space model, seen in three ways.

    h'(t) = A h(t) + B x(t),    y(t) = C h(t) + D x(t)

A: (n, n) holds rates (1 / time), B and C: (n,), D: a scalar; one input, one output. The three views
are the exact solution in continuous time, the recurrence over samples, and the convolution with the
impulse response. They compute the same outputs by different routes, which is how each checks the
others. Inputs are held constant over intervals of length ``delta``, as in ``mamba.discretize``.
"""

import jax
import jax.numpy as jnp
from jax.scipy.linalg import expm
from jaxtyping import Array, Float

__all__ = [
    "causal_convolution",
    "convolution_kernel",
    "exact_solution",
    "impulse_response",
    "recurrence",
]


def exact_solution(
    A: Float[Array, "n n"],
    B: Float[Array, " n"],
    x: Float[Array, " l"],
    delta: float,
    t: Float[Array, " m"],
    h0: Float[Array, " n"] | None = None,
):
    """The state at any times, for an input that is constant on each interval.

        h(t) = exp(t A) h0 + Σ_k [Φ(t − kΔ) − Φ(t − (k+1)Δ)] x_k,    Φ(τ) = ∫₀^τ exp(s A) B ds

    with Φ(τ) = 0 for τ ≤ 0: x_k switches on at kΔ and off at (k+1)Δ, and the system is linear, so
    the responses to all switches add up. Φ comes from the matrix exponential of
    [[A, B], [0, 0]]; nothing is stepped, so errors do not accumulate.

    Args:
        A: (n, n) rates, in 1/Δ.
        B: (n,) how the input drives the state.
        x: (l,) the input, one value per interval; the last one switches off at l·Δ.
        delta: length of an interval, a time.
        t: (m,) times ≥ 0, in any order.
        h0: (n,) state at time 0; None means zeros.

    Returns:
        h: (m, n) the state at each time.
    """
    _check_system(A, B=B, h0=h0)
    n, l = A.shape[0], x.shape[0]
    augmented = jnp.zeros((n + 1, n + 1), A.dtype).at[:n, :n].set(A).at[:n, n].set(B)

    def propagate(tau):  # exp(tau A) and Φ(tau), from one exponential
        M = expm(tau * augmented)  # (n + 1, n + 1)
        return M[:n, :n], M[:n, n]  # (n, n), (n,)

    switches = delta * jnp.arange(l + 1)  # (l + 1,)
    elapsed = jnp.maximum(t[:, None] - switches, 0.0)  # (m, l + 1)
    _, response = jax.vmap(jax.vmap(propagate))(elapsed)  # (m, l + 1, n)
    h = jnp.einsum("mln,l->mn", response[:, :-1] - response[:, 1:], x)  # (m, n)
    if h0 is not None:
        decay, _ = jax.vmap(propagate)(t)  # (m, n, n)
        h = h + decay @ h0  # (m, n)
    return h


def impulse_response(
    A: Float[Array, "n n"], B: Float[Array, " n"], C: Float[Array, " n"], t: Float[Array, " m"]
):
    """What the output does after a unit impulse at time 0: K(t) = C exp(t A) B.

    Its timescales are −1 / Re(eigenvalues of A). By linearity y(t) = ∫ K(s) x(t − s) ds + D x(t):
    it is all there is to know about the system.

    Args:
        A: (n, n) rates, in 1/time.
        B: (n,) how the input drives the state.
        C: (n,) how the state is read.
        t: (m,) times after the impulse.

    Returns:
        K: (m,).
    """
    _check_system(A, B=B, C=C)
    return jax.vmap(lambda tau: C @ expm(tau * A) @ B)(t)  # (m,)


def recurrence(
    A_bar: Float[Array, "n n"],
    B_bar: Float[Array, " n"],
    C: Float[Array, " n"],
    D: float,
    x: Float[Array, " l"],
    h0: Float[Array, " n"] | None = None,
):
    """The recurrent view: one state, updated once per sample.

        h_t = A_bar h_{t−1} + B_bar x_t,    y_t = C h_t + D x_t

    O(l) steps, O(1) memory besides the outputs: the way to generate.

    Args:
        A_bar: (n, n) what one step keeps of the state.
        B_bar: (n,) what it adds of the input.
        C: (n,) how the state is read.
        D: weight of the direct path from x to y.
        x: (l,) the input.
        h0: (n,) state before the first sample; None means zeros.

    Returns:
        y: (l,), and h: (l, n), the state after each sample.
    """
    _check_system(A_bar, B_bar=B_bar, C=C, h0=h0)
    h0 = jnp.zeros_like(B_bar) if h0 is None else h0

    def step(h, x_t):
        h = A_bar @ h + B_bar * x_t  # (n,)
        return h, (C @ h + D * x_t, h)

    _, (y, h) = jax.lax.scan(step, h0, x)
    return y, h  # (l,), (l, n)


def convolution_kernel(
    A_bar: Float[Array, "n n"], B_bar: Float[Array, " n"], C: Float[Array, " n"], l: int
):
    """The discrete impulse response, K_k = C A_bar^k B_bar for k = 0 … l−1.

    Unrolling the recurrence from h = 0 gives y_t = Σ_k K_k x_{t−k} + D x_t: the same weights at
    every t, because nothing depends on t.

    Args:
        A_bar: (n, n) what one step keeps of the state.
        B_bar: (n,) what it adds of the input.
        C: (n,) how the state is read.
        l: number of lags.

    Returns:
        K: (l,).
    """
    _check_system(A_bar, B_bar=B_bar, C=C)

    def step(v, _):
        return A_bar @ v, C @ v

    _, K = jax.lax.scan(step, B_bar, length=l)
    return K  # (l,)


def causal_convolution(x: Float[Array, " l"], K: Float[Array, " l"], D: float):
    """The convolutional view: y_t = Σ_{k=0}^{t} K_k x_{t−k} + D x_t, by FFT.

    x: (l,), K: (l,), D: scalar -> y: (l,). Both are padded to 2l, since the FFT's convolution is
    circular and would otherwise wrap the end of the input around to its beginning. O(l log l)
    operations and parallel over time: the way to train, as long as A, B, C do not change with t.
    """
    l = x.shape[0]
    if K.shape != x.shape:
        raise ValueError(f"expected a kernel as long as the input, got {K.shape} and {x.shape}")
    spectrum = jnp.fft.rfft(x, 2 * l) * jnp.fft.rfft(K, 2 * l)  # (l + 1,)
    return jnp.fft.irfft(spectrum, 2 * l)[:l] + D * x  # (l,)


def _check_system(A, **vectors):
    """A diagonal given as (n,) would broadcast, and give wrong numbers rather than an error."""
    if A.ndim != 2 or A.shape[0] != A.shape[1]:
        raise ValueError(f"A must be a square matrix (n, n), got {A.shape}: a diagonal, as diag(A)")
    for name, v in vectors.items():
        if v is not None and v.shape != A.shape[:1]:
            raise ValueError(f"{name} must have shape {A.shape[:1]} to fit A, got {v.shape}")
