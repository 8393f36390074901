"""State space duality: the recurrence of Mamba-2, and the matrix that it is.

    h_t = exp(Δ_t A) h_{t−1} + Δ_t x_t ⊗ B_t,    y_t = h_t C_t + D x_t

A head has one decay for its whole state (p, n), where Mamba-1 has one for each state of each
channel. So the output is a masked product of matrices,

    y = (L ∘ C Bᵀ) (Δ x),    L_ts = exp(A (Δ_{s+1} + … + Δ_t))  for s ≤ t, else 0

and inside a chunk it is computed as one. Pure functions of arrays.

Source: Mamba-2 (Dao & Gu, 2024), §§5–6.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mamba.checks import check_axes, check_chunk, check_shapes
from mamba.chunked import pad_to_chunks

__all__ = ["METHODS", "log_decays", "masked_scores", "ssd", "ssd_chunk", "ssd_step"]

METHODS = ("recurrence", "quadratic", "chunked")
CHUNK = 32  # T, tokens in a chunk
FORGOTTEN = -87.0  # exp of less is 0 in float32


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
            token, NaN and infinity included. Or None. (NaN in x reaches every output of its chunk:
            a product of matrices multiplies it by 0.)
        method: how to compute it.
            "recurrence": one step after another.
            "quadratic": the matrix of the whole sequence; l² numbers for each head.
            "chunked": the matrix of each chunk, and one chunk after another.
            "auto": "chunked"; "recurrence" for a single token.
        chunk: T, tokens in a chunk, for "chunked"; 32 by default.
        return_state: also return the state after the last token.

    Returns:
        y: (b, l, h, p) in x's dtype; with ``return_state``, (y, h), h: (b, h, p, n) in float32.

    The memory of a backward pass grows linearly in l, but for "quadratic".

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
    # Heads of one group next to each other: (…, g, h / g, …). B and C are never repeated.
    heads = (g, h // g)
    u = (delta[..., None] * x).reshape(b, l, *heads, p)  # (b, l, g, k, p)
    log_a, state = (delta * A).reshape(b, l, *heads), state.reshape(b, *heads, p, n)

    T = {"recurrence": 1, "quadratic": l, "chunked": min(chunk or l, l)}[method]
    inputs = [pad_to_chunks(v, T) for v in (u, log_a, B, C)]  # u = 0, a = 1: no state changes
    inputs.append(None if resets is None else pad_to_chunks(resets, T))
    inputs = jax.tree.map(lambda v: v.reshape(b, -1, T, *v.shape[2:]).swapaxes(0, 1), inputs)
    # A backward pass computes a chunk's masks and scores again: they are larger than its inputs.
    step = jax.checkpoint(ssd_step if method == "recurrence" else ssd_chunk)
    state, y = jax.lax.scan(lambda state, v: step(state, *v), state, inputs)  # y: (l / T, b, T, …)

    y = y.swapaxes(0, 1).reshape(b, -1, h, p)[:, :l]  # (b, l, h, p)
    if D is not None:
        y = y + jnp.asarray(D, jnp.float32)[:, None] * jnp.asarray(x, jnp.float32)
    y = y.astype(dtype)
    return (y, state.reshape(b, h, p, n)) if return_state else y


def ssd_step(state, u, log_a, B, C, resets):
    """One token. state: (b, g, k, p, n), the others as ``ssd_chunk``'s with T = 1."""
    if resets is not None:
        state = jnp.where(resets[:, 0, None, None, None, None], 0.0, state)
    a = jnp.exp(log_a[:, 0])[..., None, None]  # (b, g, k, 1, 1)
    write = u[:, 0, ..., None] * B[:, 0, :, None, None, :]  # (b, g, k, p, n)
    state = a * state + write
    return state, jnp.einsum("bgkpn,bgn->bgkp", state, C[:, 0])[:, None]


def ssd_chunk(state, u, log_a, B, C, resets):
    """One chunk of T tokens, by matrices.

    Args:
        state: (b, g, k, p, n) before the chunk; k heads in each of g groups.
        u: (b, T, g, k, p), Δ x.
        log_a: (b, T, g, k), Δ A.
        B: (b, T, g, n).
        C: (b, T, g, n).
        resets: (b, T) bool, or None.

    Returns:
        the state after the chunk, and y: (b, T, g, k, p).
    """
    total, segment, mask = log_decays(log_a, resets)  # (b, g, k, T), (b, g, k, T, T)
    scores = masked_scores(total, mask, B, C)  # (b, g, k, T, T)
    y = jnp.einsum("bgkts,bsgkp->btgkp", scores, u)

    # From before the chunk: tokens of the segment that the state belongs to read it.
    seen = segment == 0
    from_start = jnp.where(seen, jnp.exp(jnp.where(seen, total, 0.0)), 0.0)  # (b, g, k, T)
    read = jnp.where(seen.any(-1)[..., None, None], state, 0.0)
    y += jnp.einsum("bgkt,bgkpn,btgn->btgkp", from_start, read, C)

    # To after the chunk: tokens of the last segment are still there.
    last = mask[..., -1, :]  # (b, g, k, T)
    to_end = jnp.exp(jnp.where(last, total[..., -1:] - total, -jnp.inf))  # (b, g, k, T), ≤ 1
    left = jnp.where(jnp.moveaxis(last, -1, 1)[..., None], u, 0.0)  # (b, T, g, k, p)
    write = jnp.einsum("bgkt,btgkp,btgn->bgkpn", to_end, left, B)
    kept = jnp.where(seen[..., -1, None, None], state, 0.0)  # (b, g, k, p, n)
    return from_start[..., -1, None, None] * kept + write, y


def log_decays(log_a, resets):
    """The running sum of Δ A within each segment of a chunk, and what belongs together.

    A step that forgets all (Δ A < −87, whose exponential is 0) starts a segment as a reset does. So
    the sum stays small, and the difference of two of them exact. It is taken as a product with the
    mask, not as one running sum over all segments: no gradient passes from one to another.

    Args:
        log_a: (b, T, g, k), Δ A.
        resets: (b, T) bool, or None.

    Returns:
        total: (b, g, k, T) the sum of Δ A from the segment's second token up to each token.
        segment: (b, g, k, T) the number of the token's segment; 0 continues the state.
        mask: (b, g, k, T, T) whether token s is in token t's segment, and s ≤ t.
    """
    log_a = jnp.moveaxis(log_a, 1, -1)  # (b, g, k, T)
    T = log_a.shape[-1]
    forgets = log_a < FORGOTTEN
    if resets is not None:
        forgets |= resets[:, None, None]
    segment = jnp.cumsum(forgets, -1)
    earlier = jnp.tril(jnp.ones((T, T), bool))
    mask = earlier & (segment[..., :, None] == segment[..., None, :])
    total = jnp.einsum("bgkts,bgks->bgkt", mask.astype(log_a.dtype), jnp.where(forgets, 0.0, log_a))
    return total, segment, mask


def masked_scores(total, mask, B, C):
    """L ∘ C Bᵀ: how much of token s there is in token t's output.

    total: (b, g, k, T), mask: (b, g, k, T, T), B, C: (b, T, g, n) -> (b, g, k, T, T)
    """
    # Masked before the exponential: above the diagonal the difference is positive, and may be huge.
    difference = jnp.where(mask, total[..., :, None] - total[..., None, :], -jnp.inf)
    return jnp.exp(difference) * jnp.einsum("btgn,bsgn->bgts", C, B)[:, :, None]


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
