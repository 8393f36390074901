"""The recurrence of the selective scan, chunk by chunk, with a backward pass of its own.

    states      h_t = a_t h_{t−1} + B_t ⊗ u_t        forwards in time, u_t = Δ_t x_t
    gradients   g_t = a_{t+1} g_{t+1} + C_t ⊗ ∂y_t   backwards, g_t = ∂loss/∂h_t

Both have one form: an outer product is added to what is left of the last one. The forward pass
keeps one state per chunk of T tokens; the backward pass recomputes the states of a chunk from it.
Inside a chunk, the steps run one after another, or all at once as a tree.

Channels are the last axis, (b, n, d): they lie next to each other in memory, so that one vector
instruction serves many of them, and the sum over n is a contraction.
Source: the recomputation is that of Mamba (Gu & Dao, 2023), §3.3.2 and appendix D.
"""

from functools import partial

import jax
import jax.numpy as jnp

from mamba.collectives import vary_alike

__all__ = [
    "chunked_backward",
    "chunked_forward",
    "chunked_scan",
    "decay",
    "discard",
    "forward_by_loop",
    "forward_by_tree",
    "gradients_by_loop",
    "gradients_by_tree",
    "outer",
    "pad_to_chunks",
    "states_by_loop",
    "states_by_tree",
    "to_chunks",
]

CACHED_CHANNELS = 1024  # channels whose arrays of one chunk fit a CPU core's cache together


def decay(delta, A):
    """exp(Δ A): how much of the last state a step keeps.

    delta: (..., d), A: (n, d) -> (..., n, d)
    """
    return jnp.exp(delta[..., None, :] * A)


def discard(h, resets):
    """The state h, or 0 where a new segment starts, even if h is NaN or infinite.

    h: (..., n, d), resets: (...) bool, or None -> (..., n, d)
    """
    return h if resets is None else jnp.where(resets[..., None, None], 0.0, h)


def outer(B, u):
    """B ⊗ u over the last axes: (..., n), (..., d) -> (..., n, d)."""
    return B[..., None] * u[..., None, :]


# --- the states inside one chunk ----------------------------------------------------------------
#
# One row of the batch, T steps: a: (T, n, d), B and C: (T, n), u and dy = ∂y: (T, d), resets: (T,)
# or None. h: (n, d) is the state before the chunk. g: (n, d) is the gradient that comes from after
# the chunk, a_{t+1} included. `out` is an array to overwrite: to clear a new one for every chunk
# costs as much as the loop.


def states_by_loop(a, B, u, resets, h, out):
    """The T states of a chunk, one after another -> (T, n, d)."""

    def step(t, carry):
        h, out = carry
        h = a[t] * discard(h, _at(resets, t)) + outer(B[t], u[t])  # (n, d)
        return h, out.at[t].set(h)

    return jax.lax.fori_loop(0, len(a), step, (h, out))[1]


def gradients_by_loop(a, C, dy, resets, g, out):
    """The T gradients of a chunk (T, n, d), and what goes on to the chunk before it (n, d)."""

    def put(t, g, out):
        g = g + outer(C[t], dy[t])  # (n, d)
        return g, out.at[t].set(g)

    def step(i, carry):
        t = len(a) - 2 - i
        g, out = carry
        g = a[t + 1] * discard(g, _at(resets, t + 1))  # (n, d)
        return put(t, g, out)  # writes one array a step: `out` already holds g

    g, out = jax.lax.fori_loop(0, len(a) - 1, step, put(len(a) - 1, g, out))
    return out, a[0] * discard(g, _at(resets, 0))


def states_by_tree(tree, a, B, u, resets, h):
    """As ``states_by_loop``, all steps at once."""
    first = a[0] * discard(h, _at(resets, 0))  # (n, d)
    return tree(a, outer(B, u).at[0].add(first), resets)  # (T, n, d)


def gradients_by_tree(tree, a, C, dy, resets, g):
    """As ``gradients_by_loop``, all steps at once: the same tree, read from the end."""
    a_next = jnp.concatenate([a[1:], jnp.ones_like(a[:1])])  # (T, n, d); g has its a already
    resets_next = None if resets is None else jnp.append(resets[1:], False)  # (T,)
    gs = tree(a_next, outer(C, dy).at[-1].add(g), resets_next, reverse=True)  # (T, n, d)
    return gs, a[0] * discard(gs[0], _at(resets, 0))


# --- chunk after chunk --------------------------------------------------------------------------


def pad_to_chunks(v, T):
    """(b, l, ...) -> the same with zeros after it, to whole chunks: Δ = 0 changes no state."""
    return jnp.pad(v, ((0, 0), (0, -v.shape[1] % T), *((0, 0) for _ in v.shape[2:])))


def to_chunks(v, T):
    """(b, l, …) -> (l / T, b, T, …)."""
    v = pad_to_chunks(v, T)
    return v.reshape(v.shape[0], v.shape[1] // T, T, *v.shape[2:]).swapaxes(0, 1)


def forward_by_loop(T, x, delta, A, B, C, h0, resets):
    """-> y: (b, l, d), the last state: (b, n, d), and every chunk's first: (b, l / T, n, d).

    Step by step for all rows at once: only those states are written to memory.
    """
    inputs = jax.tree.map(lambda v: pad_to_chunks(v, T), (x, delta, B, C, resets))

    def step(h, t):
        x_t, delta_t, B_t, C_t, resets_t = jax.tree.map(
            lambda v: jax.lax.dynamic_index_in_dim(v, t, axis=1, keepdims=False), inputs
        )  # read in place: lax.scan wants time as the first axis, and would copy
        h = decay(delta_t, A) * discard(h, resets_t) + outer(B_t, delta_t * x_t)  # (b, n, d)
        return h, jnp.einsum("bnd,bn->bd", h, C_t)

    def chunk(h, start):
        h_next, y = jax.lax.scan(step, h, start + jnp.arange(T))
        return h_next, (y, h)

    l = x.shape[1]
    h, (y, starts) = jax.lax.scan(chunk, h0, jnp.arange(0, l, T))  # y: (l / T, T, b, d)
    return _from_chunks(jnp.moveaxis(y, 2, 0), l), h, starts.swapaxes(0, 1)


def forward_by_tree(tree, T, x, delta, A, B, C, h0, resets):
    """As ``forward_by_loop``, a chunk at a time."""

    def chunk(h, inputs):
        x_c, delta_c, B_c, C_c, resets_c = inputs
        hs = states_by_tree(tree, decay(delta_c, A), B_c, delta_c * x_c, resets_c, h)  # (T, n, d)
        return hs[-1], (jnp.einsum("tnd,tn->td", hs, C_c), h)

    chunks = jax.tree.map(lambda v: _to_chunks(v, T), (x, delta, B, C, resets))
    h, (y, starts) = jax.vmap(partial(jax.lax.scan, chunk))(h0, chunks)
    return _from_chunks(y, x.shape[1]), h, starts


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def chunked_scan(tree, T, x, delta, A, B, C, h0, resets):
    """y_t = h_t C_t for a whole sequence; for a backward pass it keeps one state per chunk.

    Args:
        tree: ``mamba.scan.tree``, to run the steps of a chunk at once; None: one after another.
        T: tokens in a chunk.
        x: (b, l, d) input, float32 as all arrays here.
        delta: (b, l, d) time steps.
        A: (n, d) rates.
        B: (b, l, n).
        C: (b, l, n).
        h0: (b, n, d) state before the first token.
        resets: (b, l) bool, or None.

    Returns:
        y: (b, l, d), and the state after the last token: (b, n, d).
    """
    return chunked_forward(tree, T, x, delta, A, B, C, h0, resets)[0]


def chunked_forward(tree, T, x, delta, A, B, C, h0, resets):
    """The forward pass -> (y, h), and what ``chunked_backward`` needs."""
    forward = forward_by_loop if tree is None else partial(forward_by_tree, tree)
    y, h, starts = forward(min(T, x.shape[1]), x, delta, A, B, C, h0, resets)
    return (y, h), (x, delta, A, B, C, resets, starts)


def chunked_backward(tree, T, saved, cotangents):
    """The adjoint recurrence runs backwards in time: with g_t = ∂loss/∂h_t,

        g_t = C_t ⊗ ∂y_t + exp(Δ_{t+1} A) ⊙ g_{t+1}

    and every gradient is a contraction of g_t with what the step used. Chunk by chunk from the end:
    the states inside the chunk are recomputed from its first, then g passes through it in reverse.
    """
    x, delta, A, B, C, resets, starts = saved
    T = min(T, x.shape[1])
    dy, g_last = cotangents  # (b, l, d), (b, n, d)

    def chunk(carry, inputs):
        g, dA, h, gs = carry
        (x_c, delta_c, B_c, C_c, dy_c, resets_c), start = inputs
        u = delta_c * x_c  # (T, d)
        a = decay(delta_c, A)  # (T, n, d)
        if tree is None:
            h = states_by_loop(a, B_c, u, resets_c, start, h)  # (T, n, d)
            gs, g = gradients_by_loop(a, C_c, dy_c, resets_c, g, gs)  # (T, n, d), (n, d)
        else:
            h = states_by_tree(tree, a, B_c, u, resets_c, start)  # (T, n, d)
            gs, g = gradients_by_tree(tree, a, C_c, dy_c, resets_c, g)  # (T, n, d), (n, d)
        dB, dC = jnp.einsum("tnd,td->tn", gs, u), jnp.einsum("tnd,td->tn", h, dy_c)  # (T, n)
        du = jnp.einsum("tnd,tn->td", gs, B_c)  # (T, d)
        # The gradient of the exponent Δ_t A is g_t a_t h_{t−1} = g_t (h_t − B_t ⊗ u_t). Its sums
        # over n and over t are written out: XLA's own are several times slower on a CPU.
        ddelta = du * x_c + sum(
            gs[:, i] * (h[:, i] - B_c[:, i, None] * u) * A[i] for i in range(len(A))
        )  # (T, d)
        dA = jax.lax.fori_loop(
            0, T, lambda t, s: s + gs[t] * (h[t] - outer(B_c[t], u[t])) * delta_c[t], dA
        )  # (n, d)
        return (g, dA, h, gs), (du * delta_c, ddelta, dB, dC)

    def row(inputs):
        chunks, starts, g = inputs
        empty = jnp.zeros((T, *A.shape), A.dtype)
        carry = vary_alike(g, jnp.zeros_like(A), empty, empty)
        (g, dA, _, _), grads = jax.lax.scan(chunk, carry, (chunks, starts), reverse=True)
        return g, dA, grads

    chunks = jax.tree.map(lambda v: _to_chunks(v, T), (x, delta, B, C, dy, resets))
    # Loops take so few rows at a time that their chunks stay in a CPU's cache; a tree takes all.
    rows = len(x) if tree else min(len(x), CACHED_CHANNELS // x.shape[2])
    dh0, dA, grads = jax.lax.map(
        row, (chunks, starts, g_last), batch_size=rows if rows > 1 else None
    )
    dx, ddelta, dB, dC = (_from_chunks(v, x.shape[1]) for v in grads)
    return dx, ddelta, dA.sum(0), dB, dC, dh0, None


chunked_scan.defvjp(chunked_forward, chunked_backward)


def _at(resets, t):
    """Step t's reset, a bool; None if there are none."""
    return None if resets is None else resets[t]


def _to_chunks(v, T):
    """(b, l, ...) -> (b, l / T, T, ...), padded."""
    return pad_to_chunks(v, T).reshape(len(v), -1, T, *v.shape[2:])


def _from_chunks(v, l):
    """(b, l / T, T, k) -> (b, l, k), the inverse of ``_to_chunks``."""
    return v.reshape(v.shape[0], -1, v.shape[3])[:, :l]
