"""The selective scan as one kernel for accelerators, written in Pallas: the state never leaves the chip.

    h_t = exp(Δ_t A) h_{t−1} + (Δ_t x_t) B_t,    y_t = (C_t h_t + D x_t) · silu(z_t)

`mamba.scan` writes the same recurrence for XLA, which puts (b, l, d, n) or at least a state per step
through the main memory. Here a program owns a block of channels of one row of the batch and walks
through its tokens with h (n, d) in registers (GPU) or vector memory (TPU). It reads x, Δ, z, B and C
once, and writes y and one state per CHUNK tokens: what the backward kernel restarts from.

    grid (row, block of channels, block of tokens)          CHUNK tokens: unrolled
      tokens ─────────────────────────────────▶             between two kept states
      ┌────────┬────────┬────────┐  channels 0 … w − 1:     h ● step step … step ● step …
      │ k = 0  │ k = 1  │ k = 2  │  one program on a GPU,
      ├────────┼────────┼────────┤  which has k = 0 only; on a TPU k runs in order and
      │        │        │        │  h waits on the chip between two blocks of tokens
      └────────┴────────┴────────┘

Bytes per token and channel (float32): forward 16 (x, Δ, z, y), and with a gradient to come
4n/CHUNK more for the kept states; B and C, shared by all channels, add 8n/d (and reach each program
through the cache, 8n/w). Backward 28 (x, Δ, z, dy; dx, dΔ, dz), 4n/CHUNK, and 16n/w for the partial
sums of dB and dC, written once and read once. A (b, l, d, n) array costs 4n for each time it is
written or read.

Checked by interpretation on a CPU and lowered for CUDA and for TPU; run and measured on neither.
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

LANES = 128  # of a TPU's vector registers; a GPU does with less
CHUNK = 8  # tokens between two kept states; the loop over them is unrolled


class Blocks(NamedTuple):
    """What one program handles, and how the compiler is to treat the grid."""

    channels: int  # a multiple of it is made by padding
    tokens: int | None  # None: the whole sequence
    params: object


# A warp spreads (16, 16) over 32 threads, 8 states each, so that the CHUNK states of the backward
# pass fit in registers; more channels a program would mean fewer programs, and a GPU wants hundreds.
GPU = Blocks(16, None, plgpu.CompilerParams(num_warps=1, num_stages=1))
# The last axis of a block is a multiple of the 128 lanes, the one before of the 8 sublanes.
TPU = Blocks(
    512, 128, pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary"))
)


def pallas_scan(x, delta, A, B, C, D, z, h0, resets, interpret=None):
    """Run the recurrence above over a sequence in one kernel, forward and backward.

    Arguments, float32: x, delta, z: (b, l, d), z None for no gate.   A: (n, d), negative.   B, C:
    (b, l, n).   D: (d,).   h0: (b, n, d) state before the first token.   resets: (b, l) bool, or
    None; True discards the state before that token.   interpret: True runs the kernel as ordinary
    JAX operations, False compiles it for a GPU or a TPU, None does the one on a CPU and the other
    elsewhere.

    Returns y: (b, l, d), the state after the last token: (b, n, d). Differentiable once, in reverse
    mode, in every float argument and through both results.
    Raises ValueError for shapes that do not fit and for an empty sequence, TypeError for a dtype
    other than float32, NotImplementedError for a second derivative.
    """
    _check(x, delta, A, B, C, D, z, h0, resets)
    (b, l, d), n = x.shape, A.shape[0]

    # Whole blocks on every platform. A padded token has Δ = 0 and no reset: the state passes through.
    # A padded channel or state is 0 and stays 0.
    tokens = -l % (TPU.tokens if l > TPU.tokens else CHUNK)
    channels, states = -d % LANES, pl.next_power_of_2(n) - n
    x, delta = (jnp.pad(v, ((0, 0), (0, tokens), (0, channels))) for v in (x, delta))
    z = z if z is None else jnp.pad(z, ((0, 0), (0, tokens), (0, channels)))
    B, C = (jnp.pad(v, ((0, 0), (0, tokens), (0, states))) for v in (B, C))
    A, h0 = (
        jnp.pad(A, ((0, states), (0, channels))),
        jnp.pad(h0, ((0, 0), (0, states), (0, channels))),
    )
    D = jnp.pad(D[None], ((0, 0), (0, channels)))
    keep = None
    if resets is not None:  # 0 where the state is discarded: one more (b, l, n) input, like B
        keep = 1.0 - jnp.pad(resets, ((0, 0), (0, tokens))).astype(jnp.float32)  # (b, l)
        keep = jnp.broadcast_to(keep[..., None], B.shape)

    y, h = _scan(interpret, x, delta, A, B, C, D, z, keep, h0)
    return y[:, :l, :d], h[:, :n, :d]


# --- the kernels: what one program does -----------------------------------------------------------


def _step(t, h, A, x_ref, delta_ref, B_ref, keep_ref):
    """Token t's step of the recurrence -> the decay exp(Δ_t A) and h_t, both (n, w)."""
    x, delta = x_ref[pl.ds(t, 1)], delta_ref[pl.ds(t, 1)]  # (1, w)
    decay = jnp.exp(delta * A)  # (n, w)
    if keep_ref is not None:
        decay = decay * keep_ref[t][:, None]
    return decay, decay * h + B_ref[t][:, None] * (delta * x)


def _forward_kernel(
    x_ref, delta_ref, A_ref, B_ref, C_ref, D_ref, z_ref, keep_ref, h0_ref, y_ref, h_ref, starts_ref
):
    """w channels of one row through a block of tokens.

    x, delta, z, y: (tokens, w), B, C, keep: (tokens, n), A, h0, h: (n, w), D: (1, w),
    starts: (tokens / CHUNK, n, w). The block of h is the same for all blocks of tokens: it stays.
    """
    A, D = A_ref[...], D_ref[...]

    @pl.when(pl.program_id(2) == 0)
    def _():
        h_ref[...] = h0_ref[...]

    def chunk(k, h):
        if starts_ref is not None:
            starts_ref[k] = h
        for t in range(CHUNK):
            t = k * CHUNK + t
            _, h = _step(t, h, A, x_ref, delta_ref, B_ref, keep_ref)  # (n, w)
            y = _output(t, h, D, x_ref, C_ref)  # (1, w)
            if z_ref is not None:
                y = y * jax.nn.silu(z_ref[pl.ds(t, 1)])
            y_ref[pl.ds(t, 1)] = y
        return h

    h_ref[...] = jax.lax.fori_loop(0, x_ref.shape[0] // CHUNK, chunk, h_ref[...])


def _output(t, h, D, x_ref, C_ref):
    """C_t h_t + D x_t: (1, w)."""
    return jnp.sum(C_ref[t][:, None] * h, axis=0, keepdims=True) + D * x_ref[pl.ds(t, 1)]


def _backward_kernel(
    x_ref, delta_ref, A_ref, B_ref, C_ref, D_ref, z_ref, keep_ref, starts_ref, dy_ref, dh_ref,
    dx_ref, ddelta_ref, dA_ref, dB_ref, dC_ref, dD_ref, dz_ref, dh0_ref,
):  # fmt: skip
    """The same, from the last token to the first, with g_t = ∂loss/∂h_t:

        g_t = C_t ∂y_t + exp(Δ_{t+1} A) g_{t+1}

    A chunk's states are recomputed from its first and held in registers. dB and dC are sums over
    this program's channels only; dA, dD and g (in dh0) stay on the chip over all blocks of tokens.
    """
    A, D = A_ref[...], D_ref[...]

    @pl.when(pl.program_id(2) == 0)
    def _():
        dh0_ref[...] = dh_ref[...]
        dA_ref[...] = jnp.zeros_like(A)
        dD_ref[...] = jnp.zeros_like(D)

    chunks = x_ref.shape[0] // CHUNK

    def chunk(k, carry):
        g, dA, dD = carry
        start = (chunks - 1 - k) * CHUNK
        h = [starts_ref[chunks - 1 - k]]  # h[t] is the state before token t of the chunk
        for t in range(CHUNK):
            h.append(_step(start + t, h[t], A, x_ref, delta_ref, B_ref, keep_ref)[1])
        for t in reversed(range(CHUNK)):
            row = pl.ds(start + t, 1)
            x, delta, dy = x_ref[row], delta_ref[row], dy_ref[row]  # (1, w)
            B, C = B_ref[start + t][:, None], C_ref[start + t][:, None]  # (n, 1)
            if z_ref is not None:
                z = z_ref[row]
                gate = jax.nn.sigmoid(z)
                y = _output(start + t, h[t + 1], D, x_ref, C_ref)
                dz_ref[row] = dy * y * gate * (1 + z * (1 - gate))
                dy = dy * z * gate
            g = g + C * dy  # (n, w)
            dC_ref[start + t] = jnp.sum(h[t + 1] * dy, axis=1)  # (n,)
            dB_ref[start + t] = jnp.sum(g * (delta * x), axis=1)  # (n,)
            du = jnp.sum(g * B, axis=0, keepdims=True)  # (1, w): gradient of Δ_t x_t
            decay, _ = _step(start + t, h[t], A, x_ref, delta_ref, B_ref, keep_ref)
            g = g * decay
            dexponent = g * h[t]  # (n, w): gradient of Δ_t A
            ddelta_ref[row] = jnp.sum(dexponent * A, axis=0, keepdims=True) + du * x
            dx_ref[row] = du * delta + D * dy
            dA = dA + dexponent * delta
            dD = dD + dy * x
        return g, dA, dD

    carry = dh0_ref[...], dA_ref[...], dD_ref[...]
    dh0_ref[...], dA_ref[...], dD_ref[...] = jax.lax.fori_loop(0, chunks, chunk, carry)


# --- the grid: which program sees which part of which array ---------------------------------------


def _run(kernel, inputs, outputs, blocks, interpret, reverse=False):
    """Call a kernel on the grid (row i, block of channels j, block of tokens k).

    inputs, outputs: (axes, array or shape) each, None for an array that this call does without.
    With reverse, k = 0 is the last block of tokens.
    """
    b, l, d = inputs[0][1].shape
    w, tokens = math.gcd(blocks.channels, d), math.gcd(blocks.tokens or l, l)
    steps = l // tokens

    def time(k):
        return steps - 1 - k if reverse else k

    def spec(axes, value):  # a block per axis (None: one index of it), and which one it is
        n = value.shape[axes.index("n")] if "n" in axes else None
        size = {"b": None, "j": None, "l": tokens, "s": tokens // CHUNK, "n": n, "1": 1, "d": w}

        def index_map(i, j, k):
            index = {"b": i, "j": j, "l": time(k), "s": time(k), "n": 0, "1": 0, "d": j}
            return tuple(index[axis] for axis in axes)

        return pl.BlockSpec(tuple(size[axis] for axis in axes), index_map)

    def specs(values):
        return [None if value is None else spec(axes, value) for axes, value in values]

    return pl.pallas_call(
        kernel,
        grid=(b, d // w, steps),
        in_specs=specs(inputs),
        out_specs=specs(outputs),
        out_shape=[shape for _, shape in outputs],
        interpret=interpret,
        compiler_params=None if interpret else blocks.params,
        name=kernel.__name__.strip("_"),
    )(*(value for _, value in inputs))


def _float32(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


@functools.partial(jax.jit, static_argnames=("blocks", "interpret", "save"))
def _forward(x, delta, A, B, C, D, z, keep, h0, *, blocks, interpret, save):
    """-> y, h, and with save the state before every CHUNK tokens: (b, l / CHUNK, n, d)."""
    (b, l, d), n = x.shape, A.shape[0]
    inputs = [
        *(("bld", x), ("bld", delta), ("nd", A), ("bln", B), ("bln", C), ("1d", D)),
        *(("bld", z), ("bln", keep), ("bnd", h0)),
    ]
    outputs = [
        ("bld", _float32(b, l, d)),
        ("bnd", _float32(b, n, d)),
        ("bsnd", _float32(b, l // CHUNK, n, d) if save else None),
    ]
    return _run(_forward_kernel, inputs, outputs, blocks, interpret)


@functools.partial(jax.jit, static_argnames=("blocks", "interpret"))
def _backward(x, delta, A, B, C, D, z, keep, starts, dy, dh, *, blocks, interpret):
    """-> the gradients of x, Δ, A, B, C, D, z and h0."""
    (b, l, d), n = x.shape, A.shape[0]
    parts = d // math.gcd(blocks.channels, d)
    inputs = [
        *(("bld", x), ("bld", delta), ("nd", A), ("bln", B), ("bln", C), ("1d", D)),
        *(("bld", z), ("bln", keep), ("bsnd", starts), ("bld", dy), ("bnd", dh)),
    ]
    outputs = [
        ("bld", _float32(b, l, d)),  # dx
        ("bld", _float32(b, l, d)),  # dΔ
        ("bnd", _float32(b, n, d)),  # dA of each row
        ("bjln", _float32(b, parts, l, n)),  # dB of each block of channels
        ("bjln", _float32(b, parts, l, n)),  # dC
        ("b1d", _float32(b, 1, d)),  # dD of each row
        ("bld", None if z is None else _float32(b, l, d)),  # dz
        ("bnd", _float32(b, n, d)),  # dh0
    ]
    dx, ddelta, dA, dB, dC, dD, dz, dh0 = _run(
        _backward_kernel, inputs, outputs, blocks, interpret, reverse=True
    )
    return dx, ddelta, dA.sum(0), dB.sum(1), dC.sum(1), dD.sum(0), dz, dh0


# --- the function and its gradient ----------------------------------------------------------------


def _dispatch(function, interpret, *args, **options):
    """Compiled for the platform that the program is lowered for, interpreted on the others."""

    def with_(blocks, interpret):
        return functools.partial(function, blocks=blocks, interpret=interpret, **options)

    if interpret:
        return with_(TPU, True)(*args)
    compiled = {"tpu": with_(TPU, False), "cuda": with_(GPU, False), "rocm": with_(GPU, False)}
    default = {"default": with_(TPU, True)} if interpret is None else {}
    return jax.lax.platform_dependent(*args, **compiled, **default)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(interpret, *args):
    y, h, _ = _dispatch(_forward, interpret, *args, save=False)
    return y, h


def _scan_forward(interpret, *args):
    y, h, starts = _dispatch(_forward, interpret, *args, save=True)
    return (y, h), (*args[:-1], starts)


def _scan_backward(interpret, saved, cotangents):
    *grads, dh0 = _gradients(interpret, *saved, *cotangents)
    return (*grads, None, dh0)  # None: `keep` has no gradient


_scan.defvjp(_scan_forward, _scan_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gradients(interpret, *args):
    return _dispatch(_backward, interpret, *args)


def _no_second_derivative(*_):
    raise NotImplementedError(
        "the Pallas kernel has no second derivative: differentiate method='associative' twice instead"
    )


_gradients.defvjp(_no_second_derivative, _no_second_derivative)


# --- shapes ---------------------------------------------------------------------------------------


def _check(x, delta, A, B, C, D, z, h0, resets):
    if x.ndim != 3 or x.shape[1] < 1:
        raise ValueError(f"x must have shape (b, l, d) with l >= 1, got {x.shape}")
    if A.ndim != 2:
        raise ValueError(f"A must have shape (n, d), got {A.shape}")
    (b, l, d), n = x.shape, A.shape[0]
    expected = {
        "x": (x, (b, l, d)),
        "delta": (delta, (b, l, d)),
        "A": (A, (n, d)),
        "B": (B, (b, l, n)),
        "C": (C, (b, l, n)),
        "D": (D, (d,)),
        "z": (z, (b, l, d)),
        "h0": (h0, (b, n, d)),
        "resets": (resets, (b, l)),
    }
    for name, (value, shape) in expected.items():
        if value is None and name in ("z", "resets"):
            continue
        if value.shape != shape:
            raise ValueError(
                f"{name} must have shape {shape} to fit x {x.shape}, got {value.shape}"
            )
        dtype = jnp.bool_ if name == "resets" else jnp.float32
        if value.dtype != dtype:
            raise TypeError(f"{name} must be {dtype.__name__}, got {value.dtype}")
