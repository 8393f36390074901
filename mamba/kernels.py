"""What one program of the Pallas kernel does: it carries the state through a tile of tokens.

    h_t = exp(Δ_t A) h_{t−1} + (Δ_t x_t) B_t,    y_t = (C_t h_t + D x_t) · silu(z_t)

``mamba.pallas`` says which program sees which part of which array. Names that end in ``_ref`` are
parts of arrays in memory, to be read and written.
"""

import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

__all__ = ["CHUNK", "backward_kernel", "forward_kernel", "kernel_step"]

CHUNK = 8  # tokens between two kept states
LOG2_E = math.log2(math.e)


def _row(t, *refs):
    """Token t's row of each ref, (w,) or (n,); None for a ref that is None."""
    return [ref if ref is None else ref[t] for ref in refs]


def _read(k, *refs):
    """The rows of chunk k, token by token, all read before the first write.

    A compiler that cannot tell what a write may change holds back every later read. It would wait
    for the memory once per token instead of once per chunk.
    """
    return [_row(k * CHUNK + t, *refs) for t in range(CHUNK)]


def kernel_step(h, A, x, delta, B, keep):
    """h, A: (n, w), x, delta: (w,), B, keep: (n,) -> exp(Δ_t A) and h_t, both (n, w)."""
    decay = jnp.exp2((LOG2_E * delta) * A)  # hardware has 2^v; the factor costs once per channel
    return decay, decay * _kept(h, keep) + B[:, None] * (delta * x)


def _kept(h, keep):
    """h (n, w), or 0 where keep (n,) is 0: a new segment starts. None: there are no segments."""
    return h if keep is None else jnp.where(keep[:, None] == 0, 0.0, h)


def _output(h, x, C, D):
    """C_t h_t + D x_t: (w,)."""
    return jnp.sum(C[:, None] * h, axis=0) + D * x


def forward_kernel(
    x_ref, delta_ref, A_ref, B_ref, C_ref, D_ref, z_ref, keep_ref, h0_ref,
    y_ref, h_ref, starts_ref,
):  # fmt: skip
    """A tile of w channels of one row, through a tile of tokens.

    x, delta, z, y: (tokens, w), B, C, keep: (tokens, n), A, h0, h: (n, w), D: (1, w),
    starts: (tokens / CHUNK, n, w). h is one array for all k: k + 1 finds in it what k left.
    """
    A, D = A_ref[...], D_ref[0]

    def chunk(k, h):
        rows = _read(k, x_ref, delta_ref, B_ref, C_ref, z_ref, keep_ref)
        if starts_ref is not None:
            starts_ref[k] = h
        ys = []
        for x, delta, B, C, z, keep in rows:
            _, h = kernel_step(h, A, x, delta, B, keep)  # (n, w)
            y = _output(h, x, C, D)  # (w,)
            ys.append(y if z is None else y * jax.nn.silu(z))
        for t, y in enumerate(ys):
            y_ref[k * CHUNK + t] = y
        return h

    h = jnp.where(pl.program_id(2) == 0, h0_ref[...], h_ref[...])
    h_ref[...] = jax.lax.fori_loop(0, x_ref.shape[0] // CHUNK, chunk, h)


def backward_kernel(
    x_ref, delta_ref, A_ref, B_ref, C_ref, D_ref, z_ref, keep_ref, starts_ref, dy_ref, dh_ref,
    dx_ref, ddelta_ref, dA_ref, dB_ref, dC_ref, dD_ref, dz_ref, dh0_ref,
):  # fmt: skip
    """The same from the last token to the first, with g_t = ∂loss/∂h_t (k = 0 is the last tile):

        g_t = C_t ∂y_t + exp(Δ_{t+1} A) g_{t+1}

    The states of a chunk are recomputed from its first one and never written. dB and dC, (tokens,
    n), are sums over this program's channels; dA, dD and g (in dh0) are one array for all k.
    """
    A, D = A_ref[...], D_ref[0]
    chunks = x_ref.shape[0] // CHUNK

    def chunk(i, carry):
        k = chunks - 1 - i
        rows, gates = _read(k, x_ref, delta_ref, B_ref, keep_ref), _read(k, z_ref, dy_ref)
        h = [starts_ref[k]]  # h[t]: (n, w) before token t of the chunk
        for t in range(CHUNK):
            h.append(kernel_step(h[t], A, *rows[t])[1])

        g, dA, dD = carry
        for t in reversed(range(CHUNK)):
            # Read again, from the cache: kept since their first use, they would push h out of the
            # registers.
            row = k * CHUNK + t
            x, delta, B, keep, C = _row(row, x_ref, delta_ref, B_ref, keep_ref, C_ref)
            z, dy = gates[t]
            if z is not None:
                gate = jax.nn.sigmoid(z)
                y = _output(h[t + 1], x, C, D)
                dz_ref[row] = dy * y * gate * (1 + z * (1 - gate))
                dy = dy * z * gate
            g = g + C[:, None] * dy  # (n, w)
            dC_ref[row] = jnp.sum(h[t + 1] * dy, axis=1)  # (n,)
            dB_ref[row] = jnp.sum(g * (delta * x), axis=1)  # (n,)
            du = jnp.sum(g * B[:, None], axis=0)  # (w,): gradient of Δ_t x_t
            g = _kept(g, keep) * kernel_step(h[t], A, x, delta, B, keep)[0]  # of h_{t−1}
            dexponent = g * _kept(h[t], keep)  # (n, w): gradient of Δ_t A
            dx_ref[row] = du * delta + D * dy
            ddelta_ref[row] = jnp.sum(dexponent * A, axis=0) + du * x
            dA, dD = dA + dexponent * delta, dD + dy * x
        return g, dA, dD

    first = pl.program_id(2) == 0
    g = jnp.where(first, dh_ref[...], dh0_ref[...])
    dA, dD = jnp.where(first, 0.0, dA_ref[...]), jnp.where(first, 0.0, dD_ref[0])
    dh0_ref[...], dA_ref[...], dD_ref[0] = jax.lax.fori_loop(0, chunks, chunk, (g, dA, dD))
