"""The recurrence of Mamba-3: a two-point rule in time, a state that turns, several inputs a step.

    h_t = α_t h_{t−1} + β_t Σ_r x_{t−1,r} ⊗ B̃_{t−1,r} + γ_t Σ_r x_{t,r} ⊗ B̃_{t,r}
    y_{t,r} = h_t C̃_{t,r} + D x_{t,r}
    α = exp(Δ A),    β = (1 − λ) Δ α,    γ = λ Δ

B̃ and C̃ are B and C, turned by an angle that adds up over the tokens: what a state with complex
eigenvalues does, in real numbers. The rule is ``mamba.discretize.trapezoid_diag``.

In parallel: token t − 1 writes with the weight γ_{t−1} at once, and with (1 − λ_t) Δ_t more before
token t fades it all by α_t. So

    y_t = G_t C̃_t + γ_t (C̃_t · B̃_t) x_t + D x_t
    G_t = α_t (G_{t−1} + (γ_{t−1} + (1 − λ_t) Δ_t) x_{t−1} ⊗ B̃_{t−1}),    h_t = G_t + γ_t x_t ⊗ B̃_t

G is the recurrence of Mamba-2, one token late, and its chunks and their backward pass serve here.
Pure functions of arrays.

Source: Mamba-3 (Lahoti et al., 2026, arXiv 2603.15569), §3.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mamba.checks import check_axes, check_chunk, check_shapes
from mamba.chunked import pad_to_chunks
from mamba.ssd import FORGOTTEN, scan_chunks

__all__ = [
    "METHODS",
    "PAIRS",
    "TrapezoidState",
    "fixed_point_turns",
    "rotate",
    "running_angle",
    "sums_of_segments",
    "trapezoid_chunks",
    "trapezoid_step",
    "trapezoidal_scan",
]

METHODS = ("recurrence", "quadratic", "chunked")
PAIRS = ("interleaved", "halves")
ROWS = 64  # rows of a chunk's matrix: r for each token


class TrapezoidState(NamedTuple):
    """All that the recurrence remembers of the past, in float32."""

    angle: Float[Array, "b h s"]  # θ, in radians, from −π to π
    h: Float[Array, "b h p n"]  # the state of each head
    B: Float[Array, "b h r n"]  # B̃ of the last token, as it was turned then
    x: Float[Array, "b h r p"]  # x of the last token

    @classmethod
    def zeros(cls, b, h, r, p, n, s):
        """The state before the first token."""
        shapes = (b, h, s), (b, h, p, n), (b, h, r, n), (b, h, r, p)
        return cls(*(jnp.zeros(shape, jnp.float32) for shape in shapes))


def trapezoidal_scan(
    x: Float[Array, "b l h r p"],
    delta: Float[Array, "b l h"],
    A: Float[Array, "b l h"],
    lam: Float[Array, "b l h"],
    B: Float[Array, "b l h r n"],
    C: Float[Array, "b l h r n"],
    theta: Float[Array, "b l h s"],
    D: Float[Array, " h"] | None = None,
    *,
    pairs: str = "interleaved",
    state: TrapezoidState | None = None,
    resets: Bool[Array, "b l"] | None = None,
    method: str = "auto",
    chunk: int | None = None,
    return_state: bool = False,
):
    """Run the state space model of Mamba-3 over a sequence.

        h_t = α_t h_{t−1} + β_t Σ_r x_{t−1,r} ⊗ B̃_{t−1,r} + γ_t Σ_r x_{t,r} ⊗ B̃_{t,r}
        y_{t,r} = h_t C̃_{t,r} + D x_{t,r}
        α = exp(Δ A),    β = (1 − λ) Δ α,    γ = λ Δ

    for each of h heads. B̃_t and C̃_t are B_t and C_t turned by θ_t = θ_{t−1} + theta_t. Before the
    first token, B̃ and x are 0.

    Args:
        x: (b, l, h, r, p) the r inputs of a token, of width p; all ≥ 1. r = 1 is called SISO, r > 1
            MIMO. Every array is computed with in float32, whatever its floating dtype.
        delta: (b, l, h) time steps Δ > 0. Δ = 0 marks padding: see below.
        A: (b, l, h) rates in 1/Δ, negative.
        lam: (b, l, h) λ from 0 to 1: how the weight of a step is divided between the token before
            it (0) and its own (1).
        B: (b, l, h, r, n) how each token writes to the state, not turned yet.
        C: (b, l, h, r, n) how each token reads it, not turned yet.
        theta: (b, l, h, s) the angles in radians that each token adds, one for each of the first s
            pairs; 0 ≤ s ≤ n / 2.
        D: (h,) weight of the direct path from x to y, or None.
        pairs: which numbers of B and C turn together. "interleaved": 2i and 2i + 1 (the released
            SISO models); "halves": i and i + n/2 (the MIMO models).
        state: the TrapezoidState to continue from; None: before the first token.
        resets: (b, l) True where a new segment starts: the state is discarded before that token,
            NaN and infinity included, and so is what the token before it would still write. Or
            None. (NaN in x reaches every output of its chunk: a product of matrices multiplies it
            by 0.)
        method: how to compute it.
            "recurrence": one step after another.
            "quadratic": the matrix of the whole sequence; (l r)² numbers for each head.
            "chunked": the matrix of each chunk, and one chunk after another.
            "auto": "chunked"; "recurrence" for a single token.
        chunk: T, tokens in a chunk, for "chunked"; 64 / r by default.
        return_state: also return the state after the last token.

    Returns:
        y: (b, l, h, r, p) in x's dtype; with ``return_state``, (y, TrapezoidState).

    Where Δ = 0, there is no token: the state passes through unchanged, the angle and the last B̃
    and x included, so that the next token finds the last real one before it; y is 0, and no
    gradient comes from there. It is not the limit of small Δ, where the token, although it writes
    nothing at once, is still the one that the next token finds.

    The memory of a backward pass grows linearly in l, but for "quadratic". Forward-mode derivatives
    (``jax.jvp``) exist for "recurrence" only.

    Raises:
        ValueError: shapes that do not fit, a size of 0 (but s), more than n / 2 angles, an unknown
            method or pairing, or a chunk that the method does not take.
        TypeError: what is no array, no floating-point numbers, resets that are not bool, or a state
            that is no TrapezoidState.
    """
    check_axes(x=(x, "b l h r p"), B=(B, "b l h r n"))
    (b, l, h, r, p), n = x.shape, B.shape[-1]
    s = theta.shape[-1] if getattr(theta, "ndim", 0) else 0
    shapes = {"x": x.shape, "B": (b, l, h, r, n), "C": (b, l, h, r, n), "theta": (b, l, h, s)}
    shapes |= {name: (b, l, h) for name in ("delta", "A", "lam")} | {"D": (h,), "resets": (b, l)}
    arrays = {"x": x, "delta": delta, "A": A, "lam": lam, "B": B, "C": C, "theta": theta}
    check_shapes(shapes, **arrays, D=D, resets=resets)
    if s > n // 2:
        raise ValueError(f"theta has {s} angles, but {n} numbers have only {n // 2} pairs")
    if pairs not in PAIRS:
        raise ValueError(f"unknown pairs {pairs!r}: expected one of {PAIRS}")
    state = _check_state(state, TrapezoidState.zeros, b, h, r, p, n, s)
    method, chunk = _choose(method, chunk, l, r)

    dtype, real = x.dtype, delta != 0  # (b, l, h)
    x, delta, A, lam, B, C, theta = (jnp.asarray(v, jnp.float32) for v in arrays.values())
    delta = jnp.where(real, delta, 0.0)  # also stops the gradient
    theta = jnp.where(real[..., None], theta, 0.0)
    log_a, before, now = delta * A, (1 - lam) * delta, lam * delta  # log α, β / α, γ
    if resets is not None:
        log_a = jnp.where(resets[..., None], -jnp.inf, log_a)  # a reset: a step that forgets all
    angle = running_angle(theta, state.angle, resets)  # (b, l, h, s)
    B, C = rotate(B, angle, pairs), rotate(C, angle, pairs)

    inputs = x, log_a, before, now, B, C, real
    if method == "recurrence":
        steps = [jnp.moveaxis(v, 1, 0) for v in inputs]  # (l, b, …)
        # One token needs no loop, which would copy the state.
        last, y = jax.lax.scan(trapezoid_step, state[1:], steps, unroll=l == 1)
        y = jnp.moveaxis(y, 0, 1)  # (b, l, h, r, p)
    else:
        y, last = trapezoid_chunks(state[1:], *inputs, min(chunk, l) if chunk else l)
    if D is not None:
        y = y + jnp.asarray(D, jnp.float32)[:, None, None] * x
    y = jnp.where(real[..., None, None], y, 0.0).astype(dtype)
    return (y, TrapezoidState(angle[:, -1], *last)) if return_state else y


def trapezoid_step(state, inputs):
    """One token.

    Args:
        state: h (b, h, p, n), and B̃ (b, h, r, n) and x (b, h, r, p) of the token before.
        inputs: x (b, h, r, p); log α, β / α, γ (b, h) each; B̃, C̃ (b, h, r, n); real (b, h).

    Returns:
        the next state, and y (b, h, r, p) without D x.
    """
    h, last_B, last_x = state
    x, log_a, before, now, B, C, real = inputs
    write = lambda weight, x, B: jnp.einsum("bhrp,bhrn->bhpn", weight[..., None, None] * x, B)  # noqa: E731
    a, forgets = (v[..., None, None] for v in (jnp.exp(log_a), log_a < FORGOTTEN))
    h = a * jnp.where(forgets, 0.0, h + write(before, last_x, last_B)) + write(now, x, B)
    last = [
        jnp.where(real[..., None, None], new, jnp.where(forgets, 0.0, old))
        for new, old in ((B, last_B), (x, last_x))
    ]
    return (h, *last), jnp.einsum("bhpn,bhrn->bhrp", h, C)


def trapezoid_chunks(state, x, log_a, before, now, B, C, real, T):
    """All tokens, in chunks of T: the arguments of ``trapezoid_step``, (b, l, …) each.

    Returns:
        y (b, l, h, r, p) without D x, and the state after the last token.
    """
    (b, l, h, r, p), (h0, *last) = x.shape, state
    forgets = (log_a < FORGOTTEN)[..., None, None]
    # What stands one place late: the weight, B̃ and x of the token before.
    was_real = _one_late(real, jnp.ones_like(real[:, 0]))
    following = sums_of_segments(jnp.where(real, before, 0.0), real, reverse=True)  # of next token
    weight = jnp.where(was_real, _one_late(now, jnp.zeros_like(now[:, 0])) + following, 0.0)
    weight = (jnp.exp(log_a) * weight)[..., None, None]  # (b, l, h, 1, 1)
    late_B, late_x = (
        jnp.where(forgets, 0.0, _one_late(*pair)) for pair in zip((B, x), last, strict=True)
    )
    u = weight * late_x  # (b, l, h, r, p)

    # The r inputs of a token are r rows of the matrix; the first of them fades the state.
    row_log_a = jnp.pad(log_a[..., None, None], ((0, 0),) * 3 + ((0, r - 1), (0, 0)))
    u_rows, a_rows, B_rows, C_rows = (_to_chunks(v, T) for v in (u, row_log_a, late_B, C))
    G, y = scan_chunks(
        h0[:, :, None], u_rows[:, :, :, None], a_rows[..., 0][:, :, :, None], B_rows, C_rows
    )
    y = y.reshape(-1, b, h, T, r, p).transpose(1, 0, 3, 2, 4, 5).reshape(b, -1, h, r, p)[:, :l]
    # A row sees the rows above it, but a read of token t sees all writes of t − 1, and its own.
    own = jnp.einsum("blhrn,blhqn->blhrq", C, B)
    y += jnp.einsum("blhrq,blhqp->blhrp", own, now[..., None, None] * x)
    if r > 1:
        below = jnp.triu(jnp.einsum("blhrn,blhqn->blhrq", C, late_B), 1)
        y += jnp.einsum("blhrq,blhqp->blhrp", below, u)

    h_last = G[:, :, 0] + jnp.einsum(
        "bhrp,bhrn->bhpn", now[:, -1, :, None, None] * x[:, -1], B[:, -1]
    )
    token = jnp.where(real, jnp.arange(l)[:, None], -1).max(1)[..., None, None]  # the last, or −1
    reset = jnp.where(log_a < FORGOTTEN, jnp.arange(l)[:, None], -1).max(1)[..., None, None]
    last = [
        jnp.where(
            token < reset,
            0.0,
            jnp.where(
                token < 0, old, jnp.take_along_axis(v, jnp.maximum(token, 0)[:, None], 1)[:, 0]
            ),
        )
        for v, old in zip((B, x), last, strict=True)
    ]
    return y, (h_last, *last)


# --- angles -------------------------------------------------------------------------------------


def rotate(v, angle, pairs):
    """Turn the first s pairs of the last axis of v (…, r, n) by angle (…, s)."""
    s, n = angle.shape[-1], v.shape[-1]
    cos, sin = jnp.cos(angle)[..., None, :], jnp.sin(angle)[..., None, :]  # (…, 1, s)
    if pairs == "interleaved":
        a, b = v[..., : 2 * s : 2], v[..., 1 : 2 * s : 2]  # (…, r, s) each
        turned = jnp.stack([a * cos - b * sin, a * sin + b * cos], axis=-1)
        return jnp.concatenate([turned.reshape(*v.shape[:-1], 2 * s), v[..., 2 * s :]], axis=-1)
    half = n // 2
    a, b = v[..., :s], v[..., half : half + s]
    turned = a * cos - b * sin, a * sin + b * cos
    return jnp.concatenate([turned[0], v[..., s:half], turned[1], v[..., half + s :]], axis=-1)


@jax.custom_jvp
def running_angle(theta, start, resets):
    """θ_t = θ_{t−1} + theta_t modulo 2π, as exact after a million tokens as after one.

    theta: (b, l, h, s), start: (b, h, s) before the first token, resets: (b, l) or None: θ begins
    again at 0 -> (b, l, h, s), from −π to π

    In float32, a sum of many angles loses the last digits of each, and 2π itself has an error, which
    each turn adds. As whole numbers of 2^-32 turns the sums are exact, and int32 drops whole turns.
    """
    turns = _running_sum(fixed_point_turns(theta), fixed_point_turns(start), resets)
    angle = turns * jnp.float32(2 * math.pi / 2**32)
    return jnp.where(jnp.isfinite(theta), angle, jnp.nan)  # whole numbers know no NaN


@running_angle.defjvp
def _running_angle_jvp(primals, tangents):
    theta, start, resets = primals
    return running_angle(*primals), _running_sum(tangents[0], tangents[1], resets)


def fixed_point_turns(angle):
    """angle / 2π in units of 2^-32 turns, modulo one turn: int32, right to a unit for |angle| < 16.

    float32 has 24 bits and this takes 32, so the product is taken in two parts: the first is that
    of two numbers of 12 bits, and exact.
    """
    coarse = jnp.round(256 * angle) / 256
    per_radian = round(2**14 / (2 * math.pi)) / 2**14
    turns = coarse * per_radian
    turns = (turns - jnp.round(turns)) * 2**22  # whole turns dropped
    rest = coarse * (1 / (2 * math.pi) - per_radian) + (angle - coarse) / (2 * math.pi)
    return (turns.astype(jnp.int32) << 10) + jnp.round(rest * 2.0**32).astype(jnp.int32)


def _running_sum(v, start, resets):
    """Sums over time of v (b, l, h, s), from start (b, h, s), from 0 at each reset."""
    if resets is None:
        return jnp.cumsum(v.at[:, 0].add(start), axis=1)
    resets = resets[..., None, None]
    first = jnp.where(resets[:, 0], jnp.zeros_like(start), start)
    return sums_of_segments(v.at[:, 0].add(first), resets)


def sums_of_segments(v, starts, *, reverse=False):
    """Running sums along axis 1, begun anew wherever ``starts``; ``reverse``: from the end."""

    def add(left, right):
        (total, started), (more, start) = left, right
        return jnp.where(start, more, total + more), started | start

    return jax.lax.associative_scan(add, (v, starts), axis=1, reverse=reverse)[0]


def _one_late(v, first):
    """(b, l, …) -> the same, one token later, after ``first`` (b, …)."""
    return jnp.concatenate([first[:, None], v[:, :-1]], axis=1)


def _to_chunks(v, T):
    """(b, l, h, r, k) -> (l / T, b, h, T r, k). Zeros fill the last chunk and change no state."""
    v = pad_to_chunks(v, T)
    b, _, h, r, k = v.shape
    return v.reshape(b, -1, T, h, r, k).transpose(1, 0, 3, 2, 4, 5).reshape(-1, b, h, T * r, k)


def _check_state(state, zeros, *sizes):
    """The state in float32, of zeros for None."""
    if state is None:
        return zeros(*sizes)
    if not isinstance(state, TrapezoidState):
        raise TypeError(f"state must be a TrapezoidState, got {type(state).__name__}")
    shapes = jax.eval_shape(lambda: zeros(*sizes))
    names = [f"state.{name}" for name in TrapezoidState._fields]
    check_shapes({k: v.shape for k, v in zip(names, shapes)}, **dict(zip(names, state)))
    return TrapezoidState(*(jnp.asarray(v, jnp.float32) for v in state))


def _choose(method, chunk, l, r):
    """The method that "auto" stands for, and T."""
    if method == "auto":
        method = "recurrence" if l == 1 else "chunked"
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}: expected 'auto' or one of {sorted(METHODS)}")
    if method != "chunked":
        if chunk is not None:
            raise ValueError(f"method {method!r} takes no chunk: only 'chunked' does")
        return method, l
    return method, max(1, ROWS // r) if chunk is None else check_chunk(chunk)
