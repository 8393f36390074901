"""From a differential equation to a recurrence: four rules with one interface, and a fifth.

A linear state space model changes continuously,

    h'(t) = A h(t) + B x(t),

but tokens arrive one at a time. Every rule here assumes that the input x_t is held constant for
a time Δ (``delta``), and returns the matrices of the recurrence

    h_t = A_bar h_{t-1} + B_bar x_t,

where h_t is the state at the *end* of the interval in which x_t was held. The fifth rule,
``trapezoid_diag``, takes the input as sampled at both ends of an interval, so it has two matrices
for it.

For a dense A: (n, n), B: (n,), delta a scalar. For a diagonal A, the functions that end in
``_diag`` work elementwise on arrays of any shapes that broadcast, so one call discretizes a whole
bank of channels, each with its own time step. Δ is a time; A is a rate (1 / time).
"""

import jax.numpy as jnp
from jax.scipy.linalg import expm
from jaxtyping import Array, Float

__all__ = [
    "bilinear",
    "bilinear_diag",
    "euler",
    "euler_diag",
    "mixed_diag",
    "trapezoid_diag",
    "zoh",
    "zoh_diag",
]


def zoh(A: Float[Array, "n n"], B: Float[Array, " n"], delta: float):
    """Zero-order hold: the exact solution over one interval of constant input.

        A_bar = exp(Δ A),    B_bar = ∫₀^Δ exp(s A) ds · B

    A: (n, n), B: (n,), delta: scalar -> A_bar (n, n), B_bar (n,). A may be singular: both
    matrices are read off one exponential, exp(Δ [[A, B], [0, 0]]) = [[A_bar, B_bar], [0, 1]],
    which needs no inverse. Source: Van Loan (1978); Mamba (Gu & Dao, 2023), Eq. 4.
    """
    A, B = _check_dense(A, B)
    n = A.shape[0]
    augmented = jnp.zeros((n + 1, n + 1), jnp.result_type(A, B)).at[:n, :n].set(A).at[:n, n].set(B)
    M = expm(delta * augmented)  # (n + 1, n + 1)
    return M[:n, :n], M[:n, n]  # (n, n), (n,)


def euler(A: Float[Array, "n n"], B: Float[Array, " n"], delta: float):
    """Forward Euler: follow the slope at the start of the interval.

        A_bar = I + Δ A,    B_bar = Δ B

    A: (n, n), B: (n,), delta: scalar -> A_bar (n, n), B_bar (n,). First order in Δ; stable only
    while every eigenvalue of A satisfies |1 + Δ λ| ≤ 1.
    """
    A, B = _check_dense(A, B)
    return jnp.eye(A.shape[0], dtype=A.dtype) + delta * A, delta * B  # (n, n), (n,)


def bilinear(A: Float[Array, "n n"], B: Float[Array, " n"], delta: float):
    """Bilinear (Tustin, trapezoidal): average the slopes at both ends of the interval.

        A_bar = (I − Δ/2 A)⁻¹ (I + Δ/2 A),    B_bar = (I − Δ/2 A)⁻¹ Δ B

    A: (n, n), B: (n,), delta: scalar -> A_bar (n, n), B_bar (n,). Second order in Δ; stable for
    every Δ > 0 when A is stable. S4 (Gu et al., 2022), Eq. 3, uses this rule.
    """
    A, B = _check_dense(A, B)
    eye = jnp.eye(A.shape[0], dtype=A.dtype)
    half = delta / 2 * A
    rhs = jnp.concatenate([eye + half, delta * B[:, None]], axis=1)  # (n, n + 1)
    M = jnp.linalg.solve(eye - half, rhs)  # (n, n + 1)
    return M[:, :-1], M[:, -1]  # (n, n), (n,)


def zoh_diag(A: Float[Array, "..."], B: Float[Array, "..."], delta: Float[Array, "..."]):
    """Zero-order hold for a diagonal A, elementwise.

        A_bar = exp(Δ A),    B_bar = (exp(Δ A) − 1) / A · B

    A, B, delta: any shapes that broadcast -> A_bar, B_bar. For small Δ A
    the quotient is a series: exact in the limit A = 0, and its gradient loses no digits there.
    """
    z = delta * A
    small = jnp.abs(z) < 0.05
    # Each branch sees only what it can compute: an overflow in the other would turn into NaN.
    near, far = jnp.where(small, z, 0.0), jnp.where(small, 1.0, z)
    series = 1.0
    for k in range(9, 1, -1):
        series = 1 + near / k * series  # (exp(z) − 1) / z = 1 + z/2! + z²/3! + …
    ratio = jnp.where(small, series, jnp.expm1(far) / far)
    return jnp.exp(z), delta * ratio * B


def euler_diag(A: Float[Array, "..."], B: Float[Array, "..."], delta: Float[Array, "..."]):
    """Forward Euler for a diagonal A, elementwise: A_bar = 1 + Δ A, B_bar = Δ B."""
    return 1 + delta * A, delta * B


def bilinear_diag(A: Float[Array, "..."], B: Float[Array, "..."], delta: Float[Array, "..."]):
    """Bilinear for a diagonal A, elementwise.

    A_bar = (1 + Δ A/2) / (1 − Δ A/2),    B_bar = Δ B / (1 − Δ A/2)
    """
    half = delta * A / 2
    return (1 + half) / (1 - half), delta * B / (1 - half)


def mixed_diag(A: Float[Array, "..."], B: Float[Array, "..."], delta: Float[Array, "..."]):
    """Mamba's own mix: zero-order hold for A, Euler for B, elementwise.

        A_bar = exp(Δ A),    B_bar = Δ B

    A, B, delta: any shapes that broadcast -> A_bar, B_bar. The paper's Eq. 4 writes zero-order hold
    for both; the released code, and so every pretrained weight, uses this rule (state-spaces/mamba,
    issues 114 and 121). It is exact for the memory and first order in Δ for the input.
    """
    return jnp.exp(delta * A), delta * B


def trapezoid_diag(
    A: Float[Array, "..."],
    B: Float[Array, "..."],
    delta: Float[Array, "..."],
    lam: Float[Array, "..."] = 0.5,
):
    """Mamba-3's rule, the exponential trapezoid, elementwise.

        h_t = A_bar h_{t−1} + B_before x_{t−1} + B_now x_t
        A_bar = exp(Δ A),    B_before = (1 − λ) Δ exp(Δ A) B_{t−1},    B_now = λ Δ B_t

    The input adds ∫ exp((t − s) A) B(s) x(s) ds over one interval to the state. This rule replaces
    the integral by a weighted mean of the integrand at the two ends, times Δ. With λ = 1/2 it is
    the trapezoid rule, second order in Δ; with any other fixed λ it is first order; λ = 1 is
    ``mixed_diag``.

    Args:
        A: rate.
        B: weight of the input. B_before is for the same B; where B changes with the token, it takes
            that of the token before.
        delta: Δ, the length of the interval.
        lam: λ from 0 to 1, the share of the end of the interval.

    Returns:
        A_bar, B_before, B_now. The arguments may have any shapes that broadcast.

    Source: Mamba-3 (Lahoti et al., 2026), §3.1.
    """
    A_bar = jnp.exp(delta * A)
    return A_bar, (1 - lam) * delta * A_bar * B, lam * delta * B


def _check_dense(A, B):
    A, B = jnp.asarray(A), jnp.asarray(B)
    if A.ndim != 2 or A.shape[0] != A.shape[1] or B.shape != A.shape[:1]:
        raise ValueError(
            f"expected A of shape (n, n) and B of shape (n,), got {A.shape} and {B.shape}; "
            "for a diagonal A given by its entries, use the function that ends in _diag"
        )
    return A, B
