"""The forward kernel in Pallas' Mosaic GPU language, for a JAX whose Pallas has no Triton any more.

    h_t = exp(Δ_t A) h_{t−1} + (Δ_t x_t) B_t,    y_t = (C_t h_t + D x_t) · silu(z_t)

What ``mamba.kernels`` says in Triton's terms, in those of the machine. A warpgroup is 128 threads
of one multiprocessor, and here a thread owns a channel: its n states are n numbers in registers,
and nothing is ever added up across threads. TOKENS tokens at a time come into the shared memory by
the copy engine; while the threads walk through them, the next ones are under way.

    grid (row, tile of CHANNELS channels); one warpgroup each, the tiles of tokens in order

    global memory   x, Δ, z, B, C  ──▶ two buffers of TOKENS tokens ──▶ shared memory
    registers       n states, n rates of one channel per thread
    global memory   y,  h,  every CHUNK tokens the state  ◀── registers

Mosaic GPU is for NVIDIA's Hopper and later. Few rows and channels leave most of its
multiprocessors idle: one row of 1,536 channels gives 12 of them work. The gradient has no kernel
here: XLA runs the tree of ``mamba.chunked`` from the states that the forward kernel has kept.

Source: Gu & Dao (2023), §3.3.2 and appendix D, as for ``mamba.pallas``.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from mamba.chunked import chunked_backward
from mamba.kernels import CHUNK, LOG2_E

__all__ = ["mosaic_backward", "mosaic_forward", "mosaic_program", "mosaic_step"]

CHANNELS = 128  # of a program: one for each thread of a warpgroup
TOKENS = 32  # in a buffer of shared memory, a multiple of CHUNK
LEAST_STATES = 4  # the copy engine moves 16 bytes and more
BACKWARD = 8  # chunks of the kernel in one chunk of the backward pass


def mosaic_forward(x, delta, A, B, C, D, z, keep, h0, *, save, interpret=False):
    """Run the recurrence over a sequence in one kernel.

    Args, all float32:
        x: (b, l, d), l a multiple of CHUNK and d of CHANNELS.
        delta: (b, l, d).
        A: (n, d).
        B: (b, l, n).
        C: (b, l, n).
        D: (1, d).
        z: (b, l, d) gate, or None.
        keep: (b, l, n), 0 where the state before a token is discarded; or None.
        h0: (b, n, d) state before the first token.
        save: also return the state before every CHUNK tokens.
        interpret: False, or Pallas' parameters for the interpretation of a GPU's kernels.

    Returns:
        y: (b, l, d), h: (b, n, d), and with save (b, l / CHUNK, n, d), else None.
    """
    n, missing = A.shape[0], max(LEAST_STATES - A.shape[0], 0)  # states that stay 0
    A, h0 = (jnp.pad(v, [*[(0, 0)] * (v.ndim - 2), (0, missing), (0, 0)]) for v in (A, h0))
    B, C = (jnp.pad(v, [(0, 0), (0, 0), (0, missing)]) for v in (B, C))
    keep = None if keep is None else jnp.repeat(keep[:, :, :1], LEAST_STATES, axis=2)
    given = {"x": x, "delta": delta, "B": B, "C": C, "z": z, "keep": keep}
    moved = {name: v for name, v in given.items() if v is not None}
    (b, l, d), states = x.shape, A.shape[0]
    shapes = [(b, l, d), (b, states, d), *([(b, l // CHUNK, states, d)] if save else [])]
    y, h, *starts = plgpu.kernel(
        functools.partial(mosaic_program, tuple(moved)),
        out_type=[jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes],
        grid=(b, d // CHANNELS),
        grid_names=("row", "tile"),
        compiler_params=plgpu.CompilerParams(
            unsafe_no_auto_barriers=True,  # a thread writes only what no thread reads
            lowering_semantics=plgpu.LoweringSemantics.Lane,  # the other compiles for a minute
        ),
        kernel_name="selective_scan_mosaic",
        interpret=interpret,
    )(*moved.values(), A, D, h0)
    return y, h[:, :n], starts[0][:, :, :n] if save else None


def mosaic_step(tiles, t, A, D, h):
    """Token t of the buffers in shared memory, for the channel of each thread -> y_t, h_t.

    tiles: x, delta, B, C and what there is of z and keep, by name; A: its rows, h: the states,
    n arrays (CHANNELS,) each.
    """
    x, delta = tiles["x"][t], tiles["delta"][t]  # (CHANNELS,)
    if "keep" in tiles:
        new = jax.lax.broadcast(tiles["keep"][t, 0] == 0, x.shape)
        h = [jax.lax.select(new, jnp.zeros_like(x), h_i) for h_i in h]
    exponent, u, y, after = LOG2_E * delta, delta * x, D * x, []
    for i, (rate, h_i) in enumerate(zip(A, h, strict=True)):
        h_i = jnp.exp2(exponent * rate) * h_i + tiles["B"][t, i] * u
        y = y + tiles["C"][t, i] * h_i
        after.append(h_i)
    if "z" in tiles:
        z = tiles["z"][t]
        y = y * (z / (1.0 + jnp.exp2(-LOG2_E * z)))
    return y, tuple(after)


def mosaic_program(names, *refs):
    """What one warpgroup does: its CHANNELS channels of one row, from the first token to the last.

    names: of the arrays that come by the copy engine, as in ``mosaic_forward``; refs: those arrays
    in global memory, then A, D, h0, y, h and, to be saved, the states before every CHUNK tokens.
    """
    moved, rest = refs[: len(names)], refs[len(names) :]
    A_ref, D_ref, h0_ref, y_ref, h_ref, *starts_ref = rest
    l, n = y_ref.shape[1], A_ref.shape[0]
    tokens = math.gcd(TOKENS, l)
    row, tile = jax.lax.axis_index("row"), jax.lax.axis_index("tile")
    mine = pl.ds(tile * CHANNELS, CHANNELS)
    A, D = [A_ref[i, mine] for i in range(n)], D_ref[0, mine]  # (CHANNELS,) each

    def buffer(name, ref):  # the k-th tokens of the row, and of the channels those that are mine
        width, place = (CHANNELS, tile) if name in ("x", "delta", "z") else (ref.shape[2], 0)
        return plgpu.BlockSpec((None, tokens, width), lambda k: (row, k, place))

    def walk(indices, *refs_and_h):
        *buffers, h = refs_and_h
        tiles, first = dict(zip(names, buffers, strict=True)), indices[0] * tokens

        def chunk(k, h):
            for starts in starts_ref:
                for i in range(n):
                    starts[row, first // CHUNK + k, i, mine] = h[i]
            ys = []
            for t in range(CHUNK):
                y, h = mosaic_step(tiles, k * CHUNK + t, A, D, h)
                ys.append(y)
            for t, y in enumerate(ys):
                y_ref[row, first + k * CHUNK + t, mine] = y
            return h

        h = jax.lax.fori_loop(0, tokens // CHUNK, chunk, h)
        plgpu.commit_smem()  # all threads have read the buffer: it may be filled again
        return h

    h = plgpu.emit_pipeline(
        walk,
        grid=(l // tokens,),
        in_specs=[buffer(name, ref) for name, ref in zip(names, moved, strict=True)],
        max_concurrent_steps=2,
        init_carry=tuple(h0_ref[row, i, mine] for i in range(n)),
    )(*moved)
    for i in range(n):
        h_ref[row, i, mine] = h[i]


def mosaic_backward(
    x, delta, A, B, C, D, z, keep, starts, dy, dh, *, tree, interpret=False
):  # fmt: skip
    """The gradients of ``mosaic_forward``'s y and h, by XLA, chunk after chunk from the end.

    starts: (b, l / CHUNK, n, d), what the forward kernel has saved; tree: ``mamba.scan.tree``. The
    gate needs y as it was before it: the kernel runs once more, without the gate.
    -> the gradients of x, Δ, A, B, C, D, z and h0.
    """
    dz, resets = None, None if keep is None else keep[:, :, 0] == 0
    if z is not None:
        ungated, _, _ = mosaic_forward(
            x, delta, A, B, C, D, None, keep, starts[:, 0], save=False, interpret=interpret
        )
        gate = jax.nn.sigmoid(z)
        dz = dy * ungated * gate * (1 + z * (1 - gate))
        dy = dy * z * gate
    saved = x, delta, A, B, C, resets, starts[:, ::BACKWARD]
    dx, ddelta, dA, dB, dC, dh0, _ = chunked_backward(tree, BACKWARD * CHUNK, saved, (dy, dh))
    return dx + D * dy, ddelta, dA, dB, dC, (dy * x).sum((0, 1))[None], dz, dh0
