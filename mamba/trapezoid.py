"""The recurrence of Mamba-3: a two-point rule in time, a state that turns, several inputs a step.

``trapezoidal_scan`` states it; its rule is ``mamba.discretize.trapezoid_diag``. As a matrix: token
s writes with the weight γ_s at once, and with (1 − λ) Δ of the next token more before that token
fades it all. So Mamba-2's mask has both weights, but on its diagonal one:

    y = (M ∘ C̃ B̃ᵀ) x,    M_ts = α_{s+1} … α_t (γ_s + (1 − λ_{s+1}) Δ_{s+1}) for s < t,    M_tt = γ_t

Pure functions of arrays. Source: Mamba-3 (Lahoti et al., 2026, arXiv 2603.15569), §3.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mamba.checks import check_axes, check_chunk, check_shapes, choose_method
from mamba.chunked import to_chunks
from mamba.collectives import vary_alike
from mamba.rotation import PAIRS, cos_and_sin, rotate, running_angle, running_sum
from mamba.ssd import FORGOTTEN, decays, faded

__all__ = [
    "METHODS",
    "TrapezoidState",
    "outer",
    "scan_chunks",
    "trapezoid_chunk",
    "trapezoid_chunk_gradients",
    "trapezoid_step",
    "trapezoidal_scan",
    "two_point_mask",
]

METHODS = ("recurrence", "chunked")
ROWS = 32  # rows of a chunk's matrix: r for each token
# (b, T, h, r, ·) to (b, h, r, T, ·), as products of matrices need it, chunk by chunk in the cache.
_heads_first = partial(jnp.moveaxis, source=1, destination=-2)
_time_first = partial(jnp.moveaxis, source=-2, destination=1)


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
            pairs of B and C; 0 ≤ s ≤ n / 2. Some hundreds at most: larger ones lose their digits.
        D: (h,) weight of the direct path from x to y, or None.
        pairs: which numbers of B and C turn together: "interleaved", 2i and 2i + 1 (the released
            SISO models); "halves", i and i + n / 2 (the MIMO models).
        state: the TrapezoidState to continue from; None: before the first token.
        resets: (b, l) True where a new segment starts, or None. The state is discarded before that
            token, NaN and infinity included, and so is what the token before it would still write.
            (NaN in x, B or C, also at padding, reaches every output of its chunk.)
        method: "recurrence": one step after another; "chunked": the matrix of each chunk, and one
            chunk after another; "auto": "chunked", or "recurrence" for a single token.
        chunk: T, tokens in a chunk, for "chunked"; 32 / r by default.
        return_state: also return the state after the last token.

    Returns:
        y: (b, l, h, r, p) in x's dtype; with ``return_state``, (y, TrapezoidState).

    Where Δ = 0, there is no token. All the state passes through unchanged, so that the next token
    finds the last real one; y is 0, and no gradient comes from there. This is not the limit of
    small Δ: a token with a small Δ writes little at once, but the next token finds it. The memory
    of a backward pass grows linearly in l. Only "recurrence" has ``jax.jvp``, forward-mode.

    Raises:
        ValueError: shapes that do not fit, a size of 0 other than s, more than n / 2 angles, an
            unknown method or pairing, or a chunk that the method does not take.
        TypeError: no array, no floating-point numbers, resets not bool, no TrapezoidState.
    """
    check_axes(x=(x, "b l h r p"), B=(B, "b l h r n"), C=(C, "b l h r n"))
    check_axes(delta=(delta, "b l h"), A=(A, "b l h"), lam=(lam, "b l h"))
    (b, l, h, r, p), n = x.shape, B.shape[-1]
    s = theta.shape[-1] if getattr(theta, "shape", ()) else 0
    shapes = {"x": x.shape, "theta": (b, l, h, s), "D": (h,), "resets": (b, l)}
    shapes |= dict.fromkeys("BC", (b, l, h, r, n)) | dict.fromkeys(["delta", "A", "lam"], (b, l, h))
    inputs = {"x": x, "delta": delta, "A": A, "lam": lam, "B": B, "C": C, "theta": theta}
    check_shapes(shapes, **inputs, D=D, resets=resets)
    if s > n // 2:
        raise ValueError(f"theta has {s} angles, but B and C have {n // 2} pairs of numbers")
    if pairs not in PAIRS:
        raise ValueError(f"unknown pairs {pairs!r}: expected one of {PAIRS}")
    zeros = TrapezoidState.zeros(b, h, r, p, n, s)
    state = zeros if state is None else state
    if not isinstance(state, TrapezoidState):
        raise TypeError(f"state must be a TrapezoidState, got {type(state).__name__}")
    for name, v, zero in zip(state._fields, state, zeros, strict=True):
        check_shapes({f"state.{name}": zero.shape}, **{f"state.{name}": v})
    method = choose_method(method, METHODS, "recurrence" if l == 1 else "chunked", chunk)
    T = min(l, max(1, ROWS // r) if chunk is None else check_chunk(chunk))

    dtype, real = x.dtype, delta != 0  # (b, l, h); where it is 0, no gradient comes from there
    *arrays, resets = vary_alike(*inputs.values(), state, resets)
    x, delta, A, lam, B, C, theta, state = jax.tree.map(jnp.float32, arrays)
    delta, theta = jnp.where(real, delta, 0.0), jnp.where(real[..., None], theta, 0.0)
    log_a, before, now = delta * A, (1 - lam) * delta, lam * delta  # log α, β / α, γ
    if resets is not None:
        log_a = jnp.where(resets[..., None], -jnp.inf, log_a)  # a reset: a step that forgets all
    angle = running_angle(theta, state.angle, resets)  # (b, l, h, s)
    turn = [v[..., None, :] for v in cos_and_sin(angle)]  # (b, l, h, 1, s)

    if method == "recurrence":
        steps = [jnp.moveaxis(v, 1, 0) for v in (x, log_a, before, now, B, C, *turn, real)]
        # One token needs no loop, which would copy the state.
        last, y = jax.lax.scan(partial(trapezoid_step, pairs), state[1:], steps, unroll=l == 1)
        y = jnp.moveaxis(y, 0, 1)  # (b, l, h, r, p)
    else:
        forgets = log_a < FORGOTTEN
        # β / α of the first token from here on; none if it discards the state.
        upcoming = running_sum(jnp.where(forgets, 0.0, before), real, reverse=True)  # (b, l, h)
        write = jnp.where(real, now + jnp.pad(upcoming[:, 1:], ((0, 0), (0, 1), (0, 0))), 0.0)
        kept = [jnp.where(forgets[:, 0, :, None, None], 0.0, v) for v in state[1:]]
        h_first = kept[0] + outer(upcoming[:, 0], kept[2], kept[1])
        scalars = [v[..., None, None] for v in (log_a, write, now)]  # (b, l, h, 1, 1)
        chunks = [to_chunks(v, T) for v in (x, *scalars, B, C, *turn)]  # (l / T, b, T, h, ·, ·)
        h_last, y = scan_chunks(pairs, h_first, *chunks)
        y = y.swapaxes(0, 1).reshape(b, -1, h, r, p)[:, :l]
        last = h_last, *_last_token(state, log_a, x, B, turn, real, pairs)
    if D is not None:
        y = y + jnp.asarray(D, jnp.float32)[:, None, None] * x
    y = jnp.where(real[..., None, None], y, 0.0).astype(dtype)
    return (y, TrapezoidState(angle[:, -1], *last)) if return_state else y


def outer(weight, x, B):
    """weight Σ_r x_r ⊗ B_r. (b, h), (b, h, r, p), (b, h, r, n) -> (b, h, p, n)"""
    x = weight[..., None, None] * x  # the sum is fused into the step, an einsum would not be
    return sum(x[:, :, i, :, None] * B[:, :, i, None] for i in range(x.shape[2]))


def trapezoid_step(pairs, state, inputs):
    """One token -> the next state, and y (b, h, r, p) without D x.

    state: h (b, h, p, n), and B̃ (b, h, r, n) and x (b, h, r, p) of the token before. inputs: x; log
    α, β / α, γ (b, h) each; B, C; cos θ, sin θ (b, h, 1, s) each; whether there is a token (b, h).
    """
    x, log_a, before, now, B, C, cos, sin, real = inputs
    B, C = rotate(B, cos, sin, pairs), rotate(C, cos, sin, pairs)
    a, forgets, real = (v[..., None, None] for v in (jnp.exp(log_a), log_a < FORGOTTEN, real))
    h, last_B, last_x = (jnp.where(forgets, 0.0, v) for v in state)
    h = a * (h + outer(before, last_x, last_B)) + outer(now, x, B)
    last = jnp.where(real, B, last_B), jnp.where(real, x, last_x)
    return (h, *last), jnp.einsum("bhpn,bhrn->bhrp", h, C)


def trapezoid_chunk(pairs, state, inputs):
    """One chunk of T tokens, by products of matrices.

    state: h (b, h, p, n) before the chunk, with all that the token before will write. inputs: x
    (b, T, h, r, p); log α, the weight with which each token writes, γ (b, T, h, 1, 1) each; B, C
    (b, T, h, r, n); cos θ, sin θ (b, T, h, 1, s) each.
    -> the next state, and y (b, h, r, T, p) without D x: what the tokens of the chunk wrote, and
    what the state brought
    """
    x, log_a, write, now, B, C, cos, sin = map(_heads_first, inputs)
    B, C = rotate(B, cos, sin, pairs), rotate(C, cos, sin, pairs)
    _, M, from_start, to_end = two_point_mask(log_a, write, now)
    fit = jnp.einsum("bhrtn,bhqsn->bhrtqs", C, B)
    inside = jnp.einsum("bhrtqs,bhqsp->bhrtp", M * fit, x)
    before = faded(from_start, jnp.einsum("bhpn,bhrtn->bhrtp", state, C))
    written = jnp.einsum("bhrtp,bhrtn->bhpn", faded(to_end, write * x), B)
    return faded(from_start[..., -1], state) + written, inside + before


def two_point_mask(log_a, write, now):
    """The mask M (b, h, 1, T, 1, T), and L, from_start and to_end of ``mamba.ssd.decays``."""
    L, from_start, to_end = decays(log_a[..., 0])  # (b, h, 1, T, T), (b, h, 1, T) twice
    M = jnp.where(jnp.eye(L.shape[-1], dtype=bool), now, L * write.swapaxes(-1, -2))
    return L, M[:, :, :, :, None], from_start, to_end


# --- a backward pass of its own, as in mamba.ssd --------------------------------------------------


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def scan_chunks(pairs, state, *inputs):
    """``trapezoid_chunk`` for one chunk after another: inputs of shape (l / T, b, T, h, …)."""
    return _scan_forward(pairs, state, *inputs)[0]


def _scan_forward(pairs, state, *inputs):
    def chunk(first, chunk_inputs):
        state, y = trapezoid_chunk(pairs, first, chunk_inputs)
        return state, (_time_first(y), first)

    state, (y, firsts) = jax.lax.scan(chunk, state, inputs)
    return (state, y), (firsts, *inputs)


def _scan_backward(pairs, saved, cotangents):
    dstate, dy = cotangents
    chunk = partial(trapezoid_chunk_gradients, pairs)
    dstate, gradients = jax.lax.scan(chunk, dstate, (dy, *saved), reverse=True)
    return dstate, *gradients


scan_chunks.defvjp(_scan_forward, _scan_backward)


def trapezoid_chunk_gradients(pairs, dstate, inputs):
    """The adjoint of ``trapezoid_chunk``: each product again, one factor replaced by a gradient.

    dstate: (b, h, p, n) gradient of the state after the chunk. inputs: the gradient of y, the state
    before the chunk, and the inputs of ``trapezoid_chunk``.
    -> the gradient of the state before the chunk, and those of the inputs of ``trapezoid_chunk``
    """
    dy, state, *inputs = inputs
    dy, x, log_a, write, now, B, C, cos, sin = map(_heads_first, (dy, *inputs))
    turn = lambda B, C, *turn: (rotate(B, *turn, pairs), rotate(C, *turn, pairs))  # noqa: E731
    (B, C), turn_back = jax.vjp(turn, B, C, cos, sin)
    L, M, from_start, to_end = two_point_mask(log_a, write, now)
    state = jnp.where(from_start[..., :1] == 0, 0.0, state)  # a reset discards its NaN, too
    fit = jnp.einsum("bhrtn,bhqsn->bhrtqs", C, B)

    d_masked = jnp.einsum("bhrtp,bhqsp->bhrtqs", dy, x)
    dM = (d_masked * fit).sum((2, 4))[:, :, None]  # (b, h, 1, T, T)
    dread, at_x = faded(from_start, dy), jnp.einsum("bhpn,bhrsn->bhrsp", dstate, B)
    dx = jnp.einsum("bhrtqs,bhrtp->bhqsp", M * fit, dy) + faded(to_end, write * at_x)
    dB = jnp.einsum("bhrtqs,bhrtn->bhqsn", M * d_masked, C)
    dB += jnp.einsum("bhrsp,bhpn->bhrsn", faded(to_end, write * x), dstate)
    dC_state = jnp.einsum("bhrtp,bhpn->bhrtn", dread, state)  # from what the state brought
    dC = jnp.einsum("bhrtqs,bhqsn->bhrtn", M * d_masked, B) + dC_state

    earlier = jnp.tril(jnp.ones(L.shape[-2:], L.dtype), -1)  # s < t
    dpairs = jnp.where(earlier, L * dM, 0.0)  # (b, h, 1, T, T)
    at_end = faded(to_end, x * at_x).sum((2, 4))[:, :, None]  # (b, h, 1, T)
    dwrite, weight = dpairs.sum(-2) + at_end, write[..., 0]
    # Δ A of token i is part of every decay from before i to i or after it.
    from_i = partial(jnp.einsum, "ti,bhkts->bhkis", 1 - earlier.T, precision="highest")
    pairs_over = (from_i(dpairs * weight[..., None, :]) * earlier).sum(-1)  # s < i <= t
    reads = from_i((C * dC_state).sum((2, 4))[:, :, None, :, None])[..., 0]
    writes = jnp.einsum("is,bhks->bhki", earlier, at_end * weight, precision="highest")
    through = from_start[..., -1:] * (dstate * state).sum((-1, -2))[..., None, None]
    dlog_a = jnp.where(log_a[..., 0] < FORGOTTEN, 0.0, pairs_over + reads + writes + through)

    dstate = faded(from_start[..., -1], dstate) + jnp.einsum("bhrtp,bhrtn->bhpn", dread, C)
    scalars = [v[..., None] for v in (dlog_a, dwrite, jnp.diagonal(dM, axis1=-2, axis2=-1))]
    return dstate, [_time_first(v) for v in (dx, *scalars, *turn_back((dB, dC)))]


def _last_token(state, log_a, x, B, turn, real, pairs):
    """B̃ and x of the last token: those of the state if there is none, 0 after a reset."""
    place = 2 * jnp.arange(x.shape[1])[:, None]  # (l, 1): a reset comes before its token
    event = jnp.where(real, place + 1, jnp.where(log_a < FORGOTTEN, place, -1)).max(1)  # (b, h)
    token = jnp.maximum(event // 2, 0)[:, None, :, None, None]
    B, x, *turn = (jnp.take_along_axis(v, token, axis=1)[:, 0] for v in (B, x, *turn))
    event = event[..., None, None]
    return [
        jnp.where(event < 0, old, jnp.where(event % 2 == 1, new, 0.0))
        for old, new in ((state.B, rotate(B, *turn, pairs)), (state.x, x))
    ]
