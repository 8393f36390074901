"""State space duality: the recurrence of Mamba-2, and the matrix that it is.

    h_t = exp(Δ_t A) h_{t−1} + Δ_t x_t ⊗ B_t,    y_t = h_t C_t + D x_t

A head has one decay for its whole state (p, n), where Mamba-1 has one for each state of each
channel. So the output is a masked product of matrices,

    y = (L ∘ C Bᵀ) (Δ x),    L_ts = exp(A (Δ_{s+1} + … + Δ_t))  for s ≤ t, else 0

and inside a chunk it is computed as one. Pure functions of arrays.

Source: Mamba-2 (Dao & Gu, 2024), §§5–6.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mamba.checks import check_axes, check_chunk, check_shapes
from mamba.chunked import pad_to_chunks
from mamba.collectives import vary_alike

__all__ = [
    "METHODS",
    "chunk_gradients",
    "decays",
    "faded",
    "scan_backward",
    "scan_chunks",
    "scan_forward",
    "ssd",
    "ssd_chunk",
    "ssd_step",
]

METHODS = ("recurrence", "quadratic", "chunked")
CHUNK = 64  # T, tokens in a chunk
FORGOTTEN = -87.0  # Δ A; nearly the least number of float32 is left, 10^-38


def ssd(
    x: Float[Array, "b l h p"],
    delta: Float[Array, "b l h"],
    A: Float[Array, " h"],
    B: Float[Array, "b l g n"],
    C: Float[Array, "b l g n"],
    D: Float[Array, " h"] | None = None,
    *,
    h0: Float[Array, "b h p n"] | None = None,
    resets: Bool[Array, "b l"] | None = None,
    method: str = "auto",
    chunk: int | None = None,
    return_state: bool = False,
):
    """Run the state space model of Mamba-2 over a sequence.

        h_t = exp(Δ_t A) h_{t−1} + Δ_t x_t ⊗ B_t,    y_t = h_t C_t + D x_t

    for each of h heads of width p. Heads share B and C by group: head i uses group i // (h / g).

    Args:
        x: (b, l, h, p) input, all ≥ 1. Every array is computed with in float32, whatever its
            floating dtype.
        delta: (b, l, h) time steps Δ > 0, bias and softplus already applied. Where Δ = 0, the state
            passes through unchanged.
        A: (h,) rates in 1/Δ, negative: one for a head.
        B: (b, l, g, n) how each token writes to the state; g divides h.
        C: (b, l, g, n) how each token reads it.
        D: (h,) weight of the direct path from x to y, or None.
        h0: (b, h, p, n) state before the first token; None means zeros.
        resets: (b, l) True where a new segment starts: the state (also h0) is discarded before that
            token, NaN and infinity included. Or None. (But for "recurrence", NaN or infinity in an
            input reaches every output of its chunk: a product of matrices multiplies it by 0.)
        method: how to compute it.
            "recurrence": one step after another.
            "quadratic": the matrix of the whole sequence; l² numbers for each head.
            "chunked": the matrix of each chunk, and one chunk after another.
            "auto": "chunked"; "recurrence" for a single token.
        chunk: T, tokens in a chunk, for "chunked"; 64 by default.
        return_state: also return the state after the last token.

    Returns:
        y: (b, l, h, p) in x's dtype; with ``return_state``, (y, h), h: (b, h, p, n) in float32.

    The memory of a backward pass grows linearly in l, but for "quadratic". Forward-mode derivatives
    (``jax.jvp``) exist for "recurrence" only.

    Raises:
        ValueError: shapes that do not fit, a size of 0, groups that do not divide the heads, an
            unknown method, or a chunk that the method does not take.
        TypeError: what is no array, no floating-point numbers, or resets that are not bool.
    """
    check_axes(x=(x, "b l h p"), B=(B, "b l g n"))
    (b, l, h, p), (g, n) = x.shape, B.shape[2:]
    shapes = {"x": x.shape, "delta": (b, l, h), "A": (h,), "B": (b, l, g, n), "C": (b, l, g, n)}
    shapes |= {"D": (h,), "h0": (b, h, p, n), "resets": (b, l)}
    check_shapes(shapes, x=x, delta=delta, A=A, B=B, C=C, D=D, h0=h0, resets=resets)
    if h % g:
        raise ValueError(f"the groups must divide the heads, got {g} groups and {h} heads")
    method, chunk = _choose(method, chunk, l)

    dtype = x.dtype
    x, delta, A, B, C = (jnp.asarray(v, jnp.float32) for v in (x, delta, A, B, C))
    state = jnp.zeros((b, h, p, n), jnp.float32) if h0 is None else jnp.asarray(h0, jnp.float32)
    x, delta, A, B, C, state, resets = vary_alike(x, delta, A, B, C, state, resets)
    u, log_a = delta[..., None] * x, delta * A  # (b, l, h, p), (b, l, h)
    if resets is not None:
        log_a = jnp.where(resets[..., None], -jnp.inf, log_a)  # a reset: a step that forgets all

    if method == "recurrence":
        steps = [jnp.moveaxis(v, 1, 0) for v in (u, log_a, B, C)]  # (l, b, …)
        # One token needs no loop, which would copy the state.
        state, y = jax.lax.scan(ssd_step, state, steps, unroll=l == 1)
        y = jnp.moveaxis(y, 0, 1)  # (b, l, h, p)
    else:
        T = min(chunk, l) if method == "chunked" else l
        heads = (g, h // g)  # heads of one group next to each other: B and C are never repeated
        u, log_a = u.reshape(b, l, *heads, p), log_a.reshape(b, l, *heads, 1)
        u, log_a, B, C = (_to_chunks(v, T) for v in (u, log_a, B, C))  # (l / T, b, g, …, T, ·)
        state, y = scan_chunks(state.reshape(b, *heads, p, n), u, log_a[..., 0], B, C)
        y = jnp.moveaxis(y, (0, -2), (1, 2)).reshape(b, -1, h, p)[:, :l]
        state = state.reshape(b, h, p, n)
    if D is not None:
        y = y + jnp.asarray(D, jnp.float32)[:, None] * x
    y = y.astype(dtype)
    return (y, state) if return_state else y


def ssd_step(state, inputs):
    """One token. state: (b, h, p, n), inputs: u (b, h, p), log_a (b, h), B and C (b, g, n)."""
    u, log_a, B, C = inputs
    a = jnp.exp(log_a)[..., None, None]  # (b, h, 1, 1)
    kept = jnp.where(log_a[..., None, None] < FORGOTTEN, 0.0, state)
    # Each head's own B and C: with the heads in groups, XLA would compute the new state twice.
    B, C = (jnp.repeat(v, u.shape[1] // v.shape[1], axis=1) for v in (B, C))  # (b, h, n)
    state = a * kept + u[..., None] * B[:, :, None]  # (b, h, p, n)
    return state, jnp.einsum("bhpn,bhn->bhp", state, C)


def ssd_chunk(state, u, log_a, B, C):
    """One chunk of T tokens, by products of matrices.

    Args:
        state: (b, g, k, p, n) before the chunk; k heads in each of g groups.
        u: (b, g, k, T, p), Δ x.
        log_a: (b, g, k, T), Δ A.
        B: (b, g, T, n).
        C: (b, g, T, n).

    Returns:
        the state after the chunk, and the two parts of y, (b, g, k, T, p) each: what the tokens of
        the chunk wrote, and what the state brought.
    """
    L, from_start, to_end = decays(log_a)
    fit = jnp.einsum("bgtn,bgsn->bgts", C, B)[:, :, None]  # (b, g, 1, T, T)
    inside = jnp.einsum("bgkts,bgksp->bgktp", L * fit, u)
    before = faded(from_start, jnp.einsum("bgkpn,bgtn->bgktp", state, C))
    write = jnp.einsum("bgktp,bgtn->bgkpn", faded(to_end, u), B)
    return faded(from_start[..., -1:], state) + write, inside, before


def decays(log_a):
    """What is left of one moment of a chunk at another.

    A decay is the exponential of a difference of running sums of Δ A. To keep small differences
    between large sums, each sum is taken in two parts: of Δ A in 64ths, which is exact in the 24
    bits of float32, and of the rest. A step that forgets all (Δ A < −87; a reset is one) is not in
    the sums: it starts a segment, and nothing is left of another segment.

    Args:
        log_a: (b, g, k, T), Δ A.

    Returns:
        L: (b, g, k, T, T) of token s at token t; 0 for s > t.
        from_start: (b, g, k, T) of the state before the chunk, at each token.
        to_end: (b, g, k, T) of each token, at the end of the chunk.
    """
    T = log_a.shape[-1]
    earlier = jnp.tril(jnp.ones((T, T), bool))  # s <= t
    # As a product: on a CPU it is several times faster than cumsum.
    running_sum = partial(jnp.einsum, "ts,bgks->bgkt", earlier * 1.0, precision="highest")
    difference = lambda v: v[..., :, None] - v[..., None, :]  # noqa: E731  (b, g, k, T, T)

    forgets = log_a < FORGOTTEN
    segment, kept = running_sum(forgets * 1.0), jnp.where(forgets, 0.0, log_a)
    parts = 2.0 ** min(6, 24 - math.ceil(math.log2(-FORGOTTEN * T)))  # 64, fewer in a long chunk
    coarse = jnp.round(parts * kept) / parts
    sums = running_sum(coarse), running_sum(kept - coarse)  # (b, g, k, T) each

    mask = earlier & (difference(segment) == 0)
    # Masked before the exponential: above the diagonal the difference is positive, and may be huge.
    L = jnp.exp(jnp.where(mask, sum(map(difference, sums)), -jnp.inf))
    return L, jnp.exp(jnp.where(segment == 0, sum(sums), -jnp.inf)), L[..., -1, :]


def faded(left, v):
    """left · v, and 0 where nothing is left, even of NaN and infinity. (…, T), (…, T, p)"""
    left = left[..., None]
    return jnp.where(left == 0, 0.0, left * v)


# --- a backward pass of its own -----------------------------------------------------------------
#
# Autodiff would keep the matrices of every chunk. Here a chunk keeps its first state and what that
# brought; the rest is computed again.


@jax.custom_vjp
def scan_chunks(state, u, log_a, B, C):
    """``ssd_chunk`` for one chunk after another: the first axis of every array but the state."""
    return scan_forward(state, u, log_a, B, C)[0]


def scan_forward(state, *inputs):
    """The forward pass -> (state, y), and what ``scan_backward`` needs."""

    def chunk(first, chunk_inputs):
        state, inside, before = ssd_chunk(first, *chunk_inputs)
        return state, (inside + before, first, before)

    state, (y, firsts, befores) = jax.lax.scan(chunk, state, inputs)
    return (state, y), (firsts, befores, inputs)


def scan_backward(saved, cotangents):
    """From the last chunk to the first -> the gradients of the arguments of ``scan_chunks``."""
    firsts, befores, inputs = saved
    dstate, dy = cotangents
    dstate, gradients = jax.lax.scan(
        lambda dstate, chunk: chunk_gradients(dstate, *chunk),
        dstate,
        (dy, firsts, befores, *inputs),
        reverse=True,
    )
    return dstate, *gradients


scan_chunks.defvjp(scan_forward, scan_backward)


def chunk_gradients(dstate, dy, state, before, u, log_a, B, C):
    """The adjoint of ``ssd_chunk``: each product again, with one factor replaced by a gradient.

    Args:
        dstate: (b, g, k, p, n) gradient of the state after the chunk.
        dy: (b, g, k, T, p) gradient of y.
        before: (b, g, k, T, p) what the state brought, from the forward pass.
        The others as in ``ssd_chunk``.

    Returns:
        the gradient of the state before the chunk, and those of u, log_a, B and C.
    """
    L, from_start, to_end = decays(log_a)
    state = jnp.where(from_start[..., :1, None] == 0, 0.0, state)  # a reset discards its NaN, too
    fit = jnp.einsum("bgtn,bgsn->bgts", C, B)[:, :, None]  # (b, g, 1, T, T)

    d_head_fit = L * jnp.einsum("bgktp,bgksp->bgkts", dy, u)  # (b, g, k, T, T)
    dfit = d_head_fit.sum(2)  # (b, g, T, T)
    dread = faded(from_start, dy)  # (b, g, k, T, p)
    du_to_end = faded(to_end, jnp.einsum("bgkpn,bgsn->bgksp", dstate, B))
    du = jnp.einsum("bgkts,bgktp->bgksp", L * fit, dy) + du_to_end
    dB = jnp.einsum("bgts,bgtn->bgsn", dfit, C)
    dB += jnp.einsum("bgksp,bgkpn->bgsn", faded(to_end, u), dstate)
    dC = jnp.einsum("bgts,bgsn->bgtn", dfit, B) + jnp.einsum("bgktp,bgkpn->bgtn", dread, state)

    # Δ A of token i is part of every decay from before i to i or after it.
    from_i = partial(jax.lax.cumsum, reverse=True)
    pairs = jnp.tril(from_i(d_head_fit * fit, axis=3), -1).sum(-1)  # s < i <= t: (b, g, k, T)
    reads = from_i((dy * before).sum(-1), axis=3)
    writes = (u * du_to_end).sum(-1)
    writes = jax.lax.cumsum(writes, axis=3) - writes  # s < i
    through = from_start[..., -1:] * (dstate * state).sum((-1, -2))[..., None]
    dlog_a = jnp.where(log_a < FORGOTTEN, 0.0, pairs + reads + writes + through)

    dstate = faded(from_start[..., -1:], dstate)
    return dstate + jnp.einsum("bgktp,bgtn->bgkpn", dread, C), (du, dlog_a, dB, dC)


def _to_chunks(v, T):
    """(b, l, …, k) -> (l / T, b, …, T, k). Zeros fill the last chunk: Δ = 0 changes no state."""
    v = pad_to_chunks(v, T)
    return jnp.moveaxis(v.reshape(v.shape[0], -1, T, *v.shape[2:]), (1, 2), (0, -2))


def _choose(method, chunk, l):
    """The method that "auto" stands for, and T."""
    if method == "auto":
        method = "recurrence" if l == 1 else "chunked"
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}: expected 'auto' or one of {sorted(METHODS)}")
    if chunk is not None and method != "chunked":
        raise ValueError(f"method {method!r} takes no chunk: only 'chunked' does")
    if chunk is None:
        return method, CHUNK
    return method, check_chunk(chunk)
