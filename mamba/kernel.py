"""The selective scan as one kernel for accelerators, in Pallas: the state never leaves the chip.

    h_t = exp(Δ_t A) h_{t−1} + (Δ_t x_t) B_t,    y_t = (C_t h_t + D x_t) · silu(z_t)

XLA runs this recurrence as many small kernels that hand the state to each other through the main
memory. Here a program owns w channels of one row of the batch and walks through its tokens with
h (n, w) in registers (GPU) or vector memory (TPU). It reads x, Δ, z, B and C once and writes y, and
one state per CHUNK tokens: what the backward kernel restarts from.

    grid (i: row, j: block of channels, k: block of tokens)

              k = 0    k = 1    k = 2          A TPU runs k in order, on blocks that fit its
            ┌────────┬────────┬────────┐       memory; h stays on the chip from one to the next.
      j = 0 │ h ──▶ ─┼─▶ h ──▶┼─▶ ── ▶ │ ▶ h   A GPU runs all programs at once, so there the only
            ├────────┼────────┼────────┤       block of tokens is the whole sequence.
      j = 1 │ h ──▶ ─┼─▶ h ──▶┼─▶ ── ▶ │ ▶ h   In a block: chunk after chunk of CHUNK tokens,
            └────────┴────────┴────────┘       unrolled: read all, step, step, …, write all.

Bytes per token and channel in the main memory (float32; n = 16 in brackets):
  forward    16 (x, Δ, z, y) + 8n/d (B, C) + 4n/CHUNK [8] for the kept states, if a gradient follows
             (each block of channels reads B and C, 8n/w; but for 8n/d that is work for a cache)
  backward   28 (x, Δ, z, dy; dx, dΔ, dz) + 4n/CHUNK [8] + 16n/w [8 on a GPU, 0.5 on a TPU] for dB
             and dC of each block of channels, written and read once to be added up
One pass over a (b, l, d, n) array is 4n [64]. Time cannot fall below bytes / memory bandwidth.

Correct by interpretation, and lowered for CUDA and TPU; not run or measured on either.
Source: Gu & Dao (2023), §3.3.2 and appendix D, for the fusion and the recomputation.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import triton as plgpu

__all__ = ["pallas_scan"]

CHUNK = 8  # tokens between two kept states
LANES = 128  # of a TPU's vector registers: the channels are padded to a multiple
LOG2_E = math.log2(math.e)


class Blocks(NamedTuple):
    """What one program handles at a time, and what the compiler is told."""

    channels: int
    tokens: int | None  # None: the whole sequence
    params: object


# One warp holds (n, 32): no sum over n or over the channels waits for another warp. Wider blocks
# would spill the CHUNK states of the backward pass, narrower ones repeat each token's work more.
GPU = Blocks(32, None, plgpu.CompilerParams(num_warps=1, num_stages=1))
# At n = 16 a backward block takes 2.7 MB of vector memory, twice that with the next one under way.
TPU = Blocks(
    512, 128, pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary"))
)


def pallas_scan(x, delta, A, B, C, D, z, h0, resets, interpret=None):
    """Run the recurrence above over a sequence in one kernel, and its gradient in another.

    Arguments, float32: x, delta, z: (b, l, d), z None for no gate.   A: (n, d), negative.   B, C:
    (b, l, n).   D: (d,).   h0: (b, n, d) state before the first token.   resets: (b, l) bool, or
    None; True discards the state before that token.   interpret: True runs the kernel as ordinary
    JAX operations, False compiles it for a GPU or a TPU and does not lower for anything else; None
    does what fits the platform that the program is lowered for.

    Returns y: (b, l, d) and the state after the last token: (b, n, d). Differentiable in reverse
    mode, once, in every float argument and through both results.
    Raises ValueError for shapes that do not fit and for an empty sequence, TypeError for another
    dtype, NotImplementedError for a second derivative.
    """
    _check(x, delta, A, B, C, D, z, h0, resets)
    (_, l, d), n = x.shape, A.shape[0]

    # Whole blocks, on every platform the same. On a padded token Δ = 0: the state passes through.
    # A padded channel, or a padded state of a channel, is 0 and stays 0.
    tokens = -l % (TPU.tokens if l > TPU.tokens else CHUNK)
    channels, states = -d % LANES, pl.next_power_of_2(n) - n

    def pad(v, *after):
        return v if v is None else jnp.pad(v, [(0, extra) for extra in after])

    x, delta, z = (pad(v, 0, tokens, channels) for v in (x, delta, z))
    B, C = (pad(v, 0, tokens, states) for v in (B, C))
    A, D, h0 = pad(A, states, channels), pad(D[None], 0, channels), pad(h0, 0, states, channels)
    keep = None
    if resets is not None:  # 0 where the state is discarded: one more (b, l, n) input, like B
        keep = 1.0 - pad(resets, 0, tokens).astype(jnp.float32)  # (b, l)
        keep = jnp.broadcast_to(keep[..., None], B.shape)

    y, h = _scan(interpret, x, delta, A, B, C, D, z, keep, h0)
    return y[:, :l, :d], h[:, :n, :d]


# --- the kernels: what one program does ---------------------------------------------------------


def _row(t, *refs):
    """Token t's row of each ref, (w,) or (n,); None for a ref that is None."""
    return [ref if ref is None else ref[t] for ref in refs]


def _read(k, *refs):
    """The rows of chunk k, token by token.

    All before the first write: a compiler that cannot tell what a write may change holds back every
    later read, and would wait for the memory once per token instead of once per chunk.
    """
    return [_row(k * CHUNK + t, *refs) for t in range(CHUNK)]


def _step(h, A, x, delta, B, keep):
    """h, A: (n, w), x, delta: (w,), B, keep: (n,) -> exp(Δ_t A) and h_t, both (n, w)."""
    decay = jnp.exp2((LOG2_E * delta) * A)  # hardware has 2^v; the factor costs once per channel
    if keep is not None:
        decay = decay * keep[:, None]
    return decay, decay * h + B[:, None] * (delta * x)


def _output(h, x, C, D):
    """C_t h_t + D x_t: (w,)."""
    return jnp.sum(C[:, None] * h, axis=0) + D * x


def _forward_kernel(
    x_ref, delta_ref, A_ref, B_ref, C_ref, D_ref, z_ref, keep_ref, h0_ref,
    y_ref, h_ref, starts_ref,
):  # fmt: skip
    """w channels of one row through a block of tokens.

    x, delta, z, y: (tokens, w), B, C, keep: (tokens, n), A, h0, h: (n, w), D: (1, w),
    starts: (tokens / CHUNK, n, w). h is one block for all k: what k leaves in it, k + 1 finds.
    """
    A, D = A_ref[...], D_ref[0]

    def chunk(k, h):
        rows = _read(k, x_ref, delta_ref, B_ref, C_ref, z_ref, keep_ref)
        if starts_ref is not None:
            starts_ref[k] = h
        ys = []
        for x, delta, B, C, z, keep in rows:
            _, h = _step(h, A, x, delta, B, keep)  # (n, w)
            y = _output(h, x, C, D)  # (w,)
            ys.append(y if z is None else y * jax.nn.silu(z))
        for t, y in enumerate(ys):
            y_ref[k * CHUNK + t] = y
        return h

    h = jnp.where(pl.program_id(2) == 0, h0_ref[...], h_ref[...])
    h_ref[...] = jax.lax.fori_loop(0, x_ref.shape[0] // CHUNK, chunk, h)


def _backward_kernel(
    x_ref, delta_ref, A_ref, B_ref, C_ref, D_ref, z_ref, keep_ref, starts_ref, dy_ref, dh_ref,
    dx_ref, ddelta_ref, dA_ref, dB_ref, dC_ref, dD_ref, dz_ref, dh0_ref,
):  # fmt: skip
    """The same from the last token to the first, with g_t = ∂loss/∂h_t (k = 0 is the last block):

        g_t = C_t ∂y_t + exp(Δ_{t+1} A) g_{t+1}

    The states of a chunk are recomputed from its first one and never written. dB and dC, (tokens,
    n), are sums over this program's channels; dA, dD and g (in dh0) are one block for all k.
    """
    A, D = A_ref[...], D_ref[0]
    chunks = x_ref.shape[0] // CHUNK

    def chunk(i, carry):
        k = chunks - 1 - i
        rows, gates = _read(k, x_ref, delta_ref, B_ref, keep_ref), _read(k, z_ref, dy_ref)
        h = [starts_ref[k]]  # h[t]: (n, w) before token t of the chunk
        for t in range(CHUNK):
            h.append(_step(h[t], A, *rows[t])[1])

        g, dA, dD = carry
        for t in reversed(range(CHUNK)):
            # From the cache: kept since their first use, they would push h out of the registers.
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
            g = g * _step(h[t], A, x, delta, B, keep)[0]  # of h_{t−1}
            dexponent = g * h[t]  # (n, w): gradient of Δ_t A
            dx_ref[row] = du * delta + D * dy
            ddelta_ref[row] = jnp.sum(dexponent * A, axis=0) + du * x
            dA, dD = dA + dexponent * delta, dD + dy * x
        return g, dA, dD

    first = pl.program_id(2) == 0
    g = jnp.where(first, dh_ref[...], dh0_ref[...])
    dA, dD = jnp.where(first, 0.0, dA_ref[...]), jnp.where(first, 0.0, dD_ref[0])
    dh0_ref[...], dA_ref[...], dD_ref[0] = jax.lax.fori_loop(0, chunks, chunk, (g, dA, dD))


# --- the grid: which program sees which part of which array -------------------------------------


def _call(kernel, inputs, outputs, blocks, interpret, reverse=False):
    """Run a kernel on the grid (row i, block of channels j, block of tokens k).

    inputs: pairs of an array's axes and the array, outputs: of the axes and the shape; None for
    what this call does without. With reverse, k = 0 is the last block of tokens.
    """
    b, l, d = inputs[0][1].shape
    w, tokens = math.gcd(blocks.channels, d), math.gcd(blocks.tokens or l, l)

    def spec(axes, array):
        n = array.shape[axes.index("n")] if "n" in axes else None
        size = {"b": None, "j": None, "l": tokens, "s": tokens // CHUNK, "d": w, "n": n, "1": 1}

        def index(i, j, k):  # in units of the block; an axis of size None is dropped
            k = l // tokens - 1 - k if reverse else k
            place = {"b": i, "j": j, "l": k, "s": k, "d": j, "n": 0, "1": 0}
            return tuple(place[axis] for axis in axes)

        return pl.BlockSpec(tuple(size[axis] for axis in axes), index)

    def specs(pairs):
        return [None if array is None else spec(axes, array) for axes, array in pairs]

    return pl.pallas_call(
        kernel,
        grid=(b, d // w, l // tokens),
        in_specs=specs(inputs),
        out_specs=specs(outputs),
        out_shape=[shape for _, shape in outputs],
        interpret=interpret,
        compiler_params=None if interpret else blocks.params,
        name="selective_scan" + kernel.__name__,
    )(*(array for _, array in inputs))


def _float32(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


@functools.partial(jax.jit, static_argnames=("blocks", "interpret", "save"))
def _forward(x, delta, A, B, C, D, z, keep, h0, *, blocks, interpret, save):
    """-> y, h, and with save the state before every CHUNK tokens: (b, l / CHUNK, n, d)."""
    (b, l, d), n = x.shape, A.shape[0]
    axes = ["bld", "bld", "nd", "bln", "bln", "1d", "bld", "bln", "bnd"]
    inputs = list(zip(axes, (x, delta, A, B, C, D, z, keep, h0)))
    outputs = [
        ("bld", _float32(b, l, d)),
        ("bnd", _float32(b, n, d)),
        ("bsnd", _float32(b, l // CHUNK, n, d) if save else None),
    ]
    return _call(_forward_kernel, inputs, outputs, blocks, interpret)


@functools.partial(jax.jit, static_argnames=("blocks", "interpret"))
def _backward(x, delta, A, B, C, D, z, keep, starts, dy, dh, *, blocks, interpret):
    """-> the gradients of x, Δ, A, B, C, D, z and h0."""
    (b, l, d), n = x.shape, A.shape[0]
    j = d // math.gcd(blocks.channels, d)
    axes = ["bld", "bld", "nd", "bln", "bln", "1d", "bld", "bln", "bsnd", "bld", "bnd"]
    inputs = list(zip(axes, (x, delta, A, B, C, D, z, keep, starts, dy, dh)))
    outputs = [
        *[("bld", _float32(b, l, d))] * 2,  # dx, dΔ
        ("bnd", _float32(b, n, d)),  # dA of each row
        *[("bjln", _float32(b, j, l, n))] * 2,  # dB, dC of each block of channels
        ("b1d", _float32(b, 1, d)),  # dD of each row
        ("bld", None if z is None else _float32(b, l, d)),  # dz
        ("bnd", _float32(b, n, d)),  # dh0
    ]
    dx, ddelta, dA, dB, dC, dD, dz, dh0 = _call(
        _backward_kernel, inputs, outputs, blocks, interpret, reverse=True
    )
    return dx, ddelta, dA.sum(0), dB.sum(1), dC.sum(1), dD.sum(0), dz, dh0


# --- the platform, and the gradient -------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _dispatch(function, interpret, *args):
    """The function compiled for the platform that the program is lowered for, or interpreted."""
    interpreted = functools.partial(function, blocks=TPU, interpret=True)
    if interpret:
        return interpreted(*args)
    gpu = functools.partial(function, blocks=GPU, interpret=False)
    branches = {"tpu": functools.partial(function, blocks=TPU, interpret=False)}
    branches |= {"cuda": gpu, "rocm": gpu}
    if interpret is None:
        branches["default"] = interpreted
    return jax.lax.platform_dependent(*args, **branches)


def _no_gradient(*_):  # reached only by the derivative of a derivative
    raise NotImplementedError(
        "the Pallas kernel can be differentiated once: for more, use method='associative'"
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(interpret, *args):
    return _dispatch(functools.partial(_forward, save=False), interpret, *args)[:2]


def _scan_forward(interpret, *args):
    y, h, starts = _dispatch(functools.partial(_forward, save=True), interpret, *args)
    return (y, h), (*args[:-1], starts)


def _scan_backward(interpret, saved, cotangents):
    *grads, dh0 = _dispatch(_backward, interpret, *saved, *cotangents)
    return (*grads, None, dh0)  # None: `keep` has no gradient


_dispatch.defvjp(_no_gradient, _no_gradient)
_scan.defvjp(_scan_forward, _scan_backward)


def _check(x, delta, A, B, C, D, z, h0, resets):
    if x.ndim != 3 or x.shape[1] < 1:
        raise ValueError(f"x must have shape (b, l, d) with l >= 1, got {x.shape}")
    if A.ndim != 2:
        raise ValueError(f"A must have shape (n, d), got {A.shape}")
    (b, l, d), n = x.shape, A.shape[0]
    names = ("x", "delta", "A", "B", "C", "D", "z", "h0", "resets")
    values = (x, delta, A, B, C, D, z, h0, resets)
    bln, bld = (b, l, n), (b, l, d)
    shapes = (bld, bld, (n, d), bln, bln, (d,), bld, (b, n, d), (b, l))
    for name, value, shape in zip(names, values, shapes):
        if value is None and name in ("z", "resets"):
            continue
        if value.shape != shape:
            raise ValueError(f"{name} must have shape {shape}, got {value.shape}")
        dtype = jnp.bool_ if name == "resets" else jnp.float32
        if value.dtype != dtype:
            raise TypeError(f"{name} must be {jnp.dtype(dtype)}, got {value.dtype}")
