"""The recurrence of Mamba-3: a two-point rule in time, a state that turns, several inputs a step.

    h_t = α_t h_{t−1} + β_t Σ_r x_{t−1,r} ⊗ B̃_{t−1,r} + γ_t Σ_r x_{t,r} ⊗ B̃_{t,r}
    y_{t,r} = h_t C̃_{t,r} + D x_{t,r}
    α = exp(Δ A),    β = (1 − λ) Δ α,    γ = λ Δ

B̃ and C̃ are B and C, turned by an angle that adds up over the tokens: what a state with complex
eigenvalues does, in real numbers. The rule is ``mamba.discretize.trapezoid_diag``.

As a matrix: token s writes with the weight γ_s at once, and with (1 − λ) Δ of the next token more
before that token fades it all. So the mask of Mamba-2 has these two weights in one, but on its
diagonal only the first:

    y = (M ∘ C̃ B̃ᵀ) x,    M_ts = α_{s+1} … α_t (γ_s + (1 − λ_{s+1}) Δ_{s+1}) for s < t,    M_tt = γ_t

Pure functions of arrays. Source: Mamba-3 (Lahoti et al., 2026, arXiv 2603.15569), §3.
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mamba.checks import check_axes, check_chunk, check_shapes
from mamba.chunked import pad_to_chunks
from mamba.ssd import FORGOTTEN, decays, faded

__all__ = [
    "METHODS",
    "PAIRS",
    "TrapezoidState",
    "fixed_point_turns",
    "rotate",
    "running_angle",
    "running_sum",
    "trapezoid_chunk",
    "trapezoid_step",
    "trapezoidal_scan",
]

METHODS = ("recurrence", "quadratic", "chunked")
PAIRS = ("interleaved", "halves")
ROWS = 64  # rows of a chunk's matrix: r for each token


class TrapezoidState(NamedTuple):
    """All that the recurrence remembers of the past, in float32."""

    angle: Float[Array, "b h s"]  # θ in radians, from −π to π
    h: Float[Array, "b h p n"]  # the state of each head
    B: Float[Array, "b h r n"]  # B̃ of the last token
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

    for each of h heads, where α = exp(Δ A), β = (1 − λ) Δ α, γ = λ Δ. B̃_t and C̃_t are B_t and C_t
    turned by θ_t = θ_{t−1} + theta_t. Before the first token, B̃ and x are 0.

    Args:
        x: (b, l, h, r, p) the r inputs of each token, all ≥ 1. r = 1 is called SISO, r > 1 MIMO.
            Every array is computed with in float32, whatever its floating dtype.
        delta: (b, l, h) time steps Δ > 0. Δ = 0 marks padding: see below.
        A: (b, l, h) rates in 1/Δ, negative.
        lam: (b, l, h) λ from 0 to 1: the share of a step's weight that its own token has. The token
            before it has the rest.
        B: (b, l, h, r, n) how each token writes to the state, not yet turned.
        C: (b, l, h, r, n) how each token reads it, not yet turned.
        theta: (b, l, h, s) the angles that each token adds, in radians, one for each of the first s
            pairs of B and C; 0 ≤ s ≤ n / 2.
        D: (h,) weight of the direct path from x to y, or None.
        pairs: which numbers of B and C turn together: "interleaved", 2i and 2i + 1 (the released
            SISO models); "halves", i and i + n / 2 (the MIMO models).
        state: the TrapezoidState to continue from; None: before the first token.
        resets: (b, l) True where a new segment starts, or None. The state is discarded before that
            token, NaN and infinity included, and so is what the token before it would still write.
            (NaN in x, B or C reaches every output of its chunk.)
        method: how to compute it.
            "recurrence": one step after another.
            "quadratic": the matrix of the whole sequence; (l r)² numbers for each head.
            "chunked": the matrix of each chunk, and one chunk after another.
            "auto": "chunked"; "recurrence" for a single token.
        chunk: T, tokens in a chunk, for "chunked"; 64 / r by default.
        return_state: also return the state after the last token.

    Returns:
        y: (b, l, h, r, p) in x's dtype; with ``return_state``, (y, TrapezoidState).

    Where Δ = 0, there is no token. The state passes through unchanged, also its angle and its last B̃
    and x, so that the next token finds the last real one; y is 0, and no gradient comes from there.
    This is not the limit of small Δ: a token with a small Δ writes little at once, but the next
    token finds it.

    The memory of a backward pass grows linearly in l, except for "quadratic".

    Raises:
        ValueError: shapes that do not fit, a size of 0 other than s, more than n / 2 angles, an
            unknown method or pairing, or a chunk that the method does not take.
        TypeError: what is no array, no floating-point numbers, resets that are not bool, or a state
            that is no TrapezoidState.
    """
    check_axes(x=(x, "b l h r p"), B=(B, "b l h r n"))
    (b, l, h, r, p), n = x.shape, B.shape[-1]
    s = theta.shape[-1] if getattr(theta, "shape", ()) else 0
    shapes = {"x": x.shape, "B": B.shape, "C": (b, l, h, r, n), "theta": (b, l, h, s), "D": (h,)}
    shapes |= {name: (b, l, h) for name in ("delta", "A", "lam")} | {"resets": (b, l)}
    inputs = {"x": x, "delta": delta, "A": A, "lam": lam, "B": B, "C": C, "theta": theta}
    check_shapes(shapes | {"B": (b, l, h, r, n)}, **inputs, D=D, resets=resets)
    if s > n // 2:
        raise ValueError(f"theta has {s} angles, but B and C have {n // 2} pairs of numbers")
    if pairs not in PAIRS:
        raise ValueError(f"unknown pairs {pairs!r}: expected one of {PAIRS}")
    state = _check_state(state, TrapezoidState.zeros(b, h, r, p, n, s))
    method, T = _choose(method, chunk, l, r)

    dtype, real = x.dtype, delta != 0  # (b, l, h)
    x, delta, A, lam, B, C, theta = (jnp.asarray(v, jnp.float32) for v in inputs.values())
    delta = jnp.where(real, delta, 0.0)  # as it is, but without a gradient at padding
    log_a, before, now = delta * A, (1 - lam) * delta, lam * delta  # log α, β / α, γ
    if resets is not None:
        log_a = jnp.where(resets[..., None], -jnp.inf, log_a)  # a reset: a step that forgets all
    angle = running_angle(jnp.where(real[..., None], theta, 0.0), state.angle, resets)

    if method == "recurrence":
        steps = [jnp.moveaxis(v, 1, 0) for v in (x, log_a, before, now, B, C, angle, real)]
        # One token needs no loop, which would copy the state.
        step = partial(trapezoid_step, pairs)
        last, y = jax.lax.scan(step, state[1:], steps, unroll=l == 1)
        y = jnp.moveaxis(y, 0, 1)  # (b, l, h, r, p)
    else:
        upcoming = running_sum(before, real, reverse=True)  # β / α of the first token from here on
        write = jnp.where(real, now + jnp.pad(upcoming[:, 1:], ((0, 0), (0, 1), (0, 0))), 0.0)
        first = state.h + outer(upcoming[:, 0], state.x, state.B)
        chunks = [_to_chunks(v, T) for v in (x, log_a, write, now, B, C, angle)]
        body = jax.checkpoint(partial(trapezoid_chunk, pairs), prevent_cse=False)
        h_last, y = jax.lax.scan(body, first, chunks)
        y = jnp.moveaxis(y, 0, 1).reshape(b, -1, h, r, p)[:, :l]
        last = h_last, *_last(state, x, B, angle, real, resets, pairs)
    if D is not None:
        y = y + jnp.asarray(D, jnp.float32)[:, None, None] * x
    y = jnp.where(real[..., None, None], y, 0.0).astype(dtype)
    return (y, TrapezoidState(angle[:, -1], *last)) if return_state else y


def outer(weight, x, B):
    """weight Σ_r x_r ⊗ B_r. (b, h), (b, h, r, p), (b, h, r, n) -> (b, h, p, n)"""
    return jnp.einsum("bhrp,bhrn->bhpn", weight[..., None, None] * x, B)


def trapezoid_step(pairs, state, inputs):
    """One token.

    Args:
        pairs: as in ``trapezoidal_scan``.
        state: h (b, h, p, n), and B̃ (b, h, r, n) and x (b, h, r, p) of the token before.
        inputs: x (b, h, r, p); log α, β / α, γ (b, h) each; B, C (b, h, r, n); θ (b, h, s);
            whether there is a token, (b, h).

    Returns:
        the next state, and y (b, h, r, p) without D x.
    """
    h, last_B, last_x = state
    x, log_a, before, now, B, C, angle, real = inputs
    B, C = rotate(B, angle, pairs), rotate(C, angle, pairs)
    a, forgets, real = (v[..., None, None] for v in (jnp.exp(log_a), log_a < FORGOTTEN, real))
    h = a * jnp.where(forgets, 0.0, h + outer(before, last_x, last_B)) + outer(now, x, B)
    last_B, last_x = (jnp.where(forgets, 0.0, v) for v in (last_B, last_x))
    last = jnp.where(real, B, last_B), jnp.where(real, x, last_x)
    return (h, *last), jnp.einsum("bhpn,bhrn->bhrp", h, C)


def trapezoid_chunk(pairs, state, inputs):
    """One chunk of T tokens, by products of matrices.

    Args:
        pairs: as in ``trapezoidal_scan``.
        state: h (b, h, p, n) before the chunk, with all that its last token will write.
        inputs: x (b, T, h, r, p); log α, the weight with which each token writes, γ (b, T, h) each;
            B, C (b, T, h, r, n); θ (b, T, h, s).

    Returns:
        the next state, and y (b, T, h, r, p) without D x.
    """
    x, log_a, write, now, B, C, angle = inputs
    B, C = rotate(B, angle, pairs), rotate(C, angle, pairs)
    L, from_start, to_end = (v[:, :, 0] for v in decays(log_a.swapaxes(1, 2)[:, :, None]))
    from_start, to_end = (v.swapaxes(1, 2)[..., None] for v in (from_start, to_end))
    now, to_write = (v.swapaxes(1, 2)[:, :, None] for v in (now, write))  # (b, h, 1, T)
    M = jnp.where(jnp.eye(L.shape[-1], dtype=bool), now, L * to_write)  # (b, h, T, T)
    fit = jnp.einsum("bthrn,bshqn->bhrtqs", C, B)
    y = jnp.einsum("bhrtqs,bshqp->bthrp", M[:, :, None, :, None] * fit, x)
    y += faded(from_start, jnp.einsum("bhpn,bthrn->bthrp", state, C))
    written = jnp.einsum("bshqp,bshqn->bhpn", faded(to_end * write[..., None], x), B)
    return faded(from_start[:, -1], state) + written, y


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
    """θ_t = θ_{t−1} + theta_t, modulo 2π: as exact after a million tokens as after one.

    theta: (b, l, h, s), start: (b, h, s) before the first token, resets: (b, l), where θ begins
    again at 0, or None -> (b, l, h, s), from −π to π

    A sum of many angles in float32 loses the last digits of each, and 2π in float32 is not exact,
    which every whole turn would add. So the sums are those of whole numbers of 2^-32 turns: exact,
    and int32 drops whole turns by itself.
    """
    turns = _from_start(fixed_point_turns(theta), fixed_point_turns(start), resets)
    angle = turns * jnp.float32(2 * math.pi / 2**32)
    return jnp.where(jnp.isfinite(theta), angle, jnp.nan)  # a whole number cannot be NaN


@running_angle.defjvp
def _running_angle_jvp(primals, tangents):
    return running_angle(*primals), _from_start(*tangents[:2], primals[2])


def _from_start(v, start, resets):
    """Sums over time of v (b, l, h, s): from start (b, h, s), and from 0 at each reset."""
    if resets is None:
        return running_sum(v.at[:, 0].add(start))
    resets = resets[..., None, None]
    return running_sum(
        v.at[:, 0].add(jnp.where(resets[:, 0], jnp.zeros_like(start), start)), resets
    )


def running_sum(v, starts=None, *, reverse=False):
    """Sums along axis 1, begun anew wherever ``starts``, if given; ``reverse``: from the end."""
    if starts is None:
        return jax.lax.associative_scan(jnp.add, v, axis=1, reverse=reverse)

    def add(left, right):
        (total, started), (more, start) = left, right
        return jnp.where(start, more, total + more), started | start

    return jax.lax.associative_scan(add, (v, starts), axis=1, reverse=reverse)[0]


def fixed_point_turns(angle):
    """angle / 2π in units of 2^-32 turns, modulo one turn: int32, right to a unit for |angle| < 16.

    A number of float32 has 24 bits, and the result needs 32. So the product is taken in two parts.
    The first is that of two numbers of 12 bits, which is exact.
    """
    coarse = jnp.round(256 * angle) / 256
    per_radian = round(2**14 / (2 * math.pi)) / 2**14
    turns = coarse * per_radian
    turns = (turns - jnp.round(turns)) * 2**22
    rest = coarse * (1 / (2 * math.pi) - per_radian) + (angle - coarse) / (2 * math.pi)
    return (turns.astype(jnp.int32) << 10) + jnp.round(rest * 2.0**32).astype(jnp.int32)


# --- what surrounds the methods -----------------------------------------------------------------


def _last(state, x, B, angle, real, resets, pairs):
    """B̃ and x of the last token -> (b, h, r, n), (b, h, r, p): a reset after it discards them."""
    place = jnp.arange(x.shape[1])[:, None]  # (l, 1)
    token = jnp.where(real, place, -1).max(1)  # (b, h); −1: there is none
    last = lambda v: jnp.take_along_axis(  # noqa: E731
        v, jnp.maximum(token, 0).reshape(token.shape[0], 1, -1, *[1] * (v.ndim - 3)), axis=1
    )[:, 0]
    new = rotate(last(B), last(angle), pairs), last(x)
    none = (token < 0)[..., None, None]
    kept = [jnp.where(none, old, v) for v, old in zip(new, state[2:], strict=True)]
    if resets is None:
        return kept
    discarded = token < jnp.where(resets, place[:, 0], -1).max(1)[:, None]
    return [jnp.where(discarded[..., None, None], 0.0, v) for v in kept]


def _to_chunks(v, T):
    """(b, l, …) -> (l / T, b, T, …). Zeros fill the last chunk: Δ = 0 changes no state."""
    v = pad_to_chunks(v, T)
    return jnp.moveaxis(v.reshape(v.shape[0], -1, T, *v.shape[2:]), 1, 0)


def _check_state(state, zeros):
    """The state in float32; zeros for None."""
    if state is None:
        return zeros
    if not isinstance(state, TrapezoidState):
        raise TypeError(f"state must be a TrapezoidState, got {type(state).__name__}")
    names = [f"state.{name}" for name in state._fields]
    shapes = {name: v.shape for name, v in zip(names, zeros, strict=True)}
    check_shapes(shapes, **dict(zip(names, state, strict=True)))
    return TrapezoidState(*(jnp.asarray(v, jnp.float32) for v in state))


def _choose(method, chunk, l, r):
    """The method that "auto" stands for, and T."""
    if method == "auto":
        method = "recurrence" if l == 1 else "chunked"
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}: expected 'auto' or one of {sorted(METHODS)}")
    if method == "chunked":
        return method, min(l, max(1, ROWS // r) if chunk is None else check_chunk(chunk))
    if chunk is not None:
        raise ValueError(f"method {method!r} takes no chunk: only 'chunked' does")
    return method, l
