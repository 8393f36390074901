"""The selective scan as one kernel for accelerators, in Pallas: the state never leaves the chip.

    h_t = exp(Δ_t A) h_{t−1} + (Δ_t x_t) B_t,    y_t = (C_t h_t + D x_t) · silu(z_t)

XLA runs this recurrence as many small kernels that pass the state to each other through the main
memory. Here a program owns a tile of w channels of one row of the batch and walks through its
tokens with h (n, w) in registers (GPU) or vector memory (TPU). It reads x, Δ, z, B and C once. It
writes y, and one state per CHUNK tokens, from which the backward kernel restarts. What one program
does is in ``mamba.kernels``; here are the grid of programs, the platforms and the gradient.

    grid (i: row, j: tile of channels, k: tile of tokens)

              k = 0    k = 1    k = 2          A TPU runs k in order, on tiles that fit its
            ┌────────┬────────┬────────┐       memory; h stays on the chip from one to the next.
      j = 0 │ h ──▶ ─┼─▶ h ──▶┼─▶ ── ▶ │ ▶ h   A GPU runs its programs in no fixed order, so there
            ├────────┼────────┼────────┤       the only tile of tokens is the whole sequence.
      j = 1 │ h ──▶ ─┼─▶ h ──▶┼─▶ ── ▶ │ ▶ h   In a tile: chunk after chunk of CHUNK tokens,
            └────────┴────────┴────────┘       unrolled: read all, step, step, …, write all.

Bytes per token and channel in the main memory (float32; n = 16 in brackets):
  forward    16 (x, Δ, z, y) + 8n/d (B, C) + 4n/CHUNK [8] for the kept states, if a gradient follows
             (each tile of channels reads B and C, 8n/w; a cache can serve all but 8n/d of that)
  backward   28 (x, Δ, z, dy; dx, dΔ, dz) + 4n/CHUNK [8] + 16n/w [8 on a GPU, 0.5 on a TPU] for dB
             and dC of each tile of channels, written and read once to be added up
One pass over a (b, l, d, n) array is 4n [64]. Time cannot fall below bytes / memory bandwidth.

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

from mamba.checks import check_axes, check_shapes
from mamba.collectives import announced
from mamba.kernels import CHUNK, backward_kernel, forward_kernel

__all__ = ["GPU", "TPU", "Tiles", "pallas_scan"]

LANES = 128  # of a TPU's vector registers: the channels are padded to a multiple


class Tiles(NamedTuple):
    """What one program handles at a time, and what the compiler is told."""

    channels: int  # w
    tokens: int | None  # a multiple of CHUNK; None: the whole sequence
    params: object  # of the compiler


# One warp holds (n, 32): no sum over n or over the channels waits for another warp. Wider tiles
# would spill the CHUNK states of the backward pass; narrower ones repeat each token's work more.
GPU = Tiles(32, None, plgpu.CompilerParams(num_warps=1, num_stages=1))
# At n = 16 a backward tile takes 2.7 MB of vector memory, twice that with the next one under way.
TPU = Tiles(
    512, 128, pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary"))
)


def pallas_scan(x, delta, A, B, C, D, z, h0, resets, interpret=None):
    """Run the recurrence above over a sequence in one kernel, and its gradient in another.

    Args, all float32:
        x: (b, l, d) input, all ≥ 1.
        delta: (b, l, d) time steps.
        A: (n, d) rates, negative.
        B: (b, l, n).
        C: (b, l, n).
        D: (d,).
        z: (b, l, d) gate, or None.
        h0: (b, n, d) state before the first token.
        resets: (b, l) bool, True discards the state before that token; or None.
        interpret: True runs the kernel as ordinary JAX operations; False compiles it, for a GPU or
            a TPU only; None does what suits the platform that the program is lowered for. Inside
            ``jax.shard_map``, interpretation needs ``check_vma=False``: JAX's interpreter of
            kernels does not know which arrays vary from device to device.

    Returns:
        y: (b, l, d), and the state after the last token: (b, n, d). Differentiable in reverse mode,
        once, in every float argument and through both results.

    Raises:
        ValueError: shapes that do not fit, or a size of 0.
        TypeError: another dtype than float32, or resets that are not bool.
        NotImplementedError: a second derivative.
    """
    check_axes(x=(x, "b l d"), A=(A, "n d"))
    (b, l, d), n = x.shape, A.shape[0]
    floats = {"x": x, "delta": delta, "A": A, "B": B, "C": C, "D": D, "z": z, "h0": h0}
    shapes = {"x": (b, l, d), "delta": (b, l, d), "A": (n, d), "B": (b, l, n), "C": (b, l, n)}
    shapes |= {"D": (d,), "z": (b, l, d), "h0": (b, n, d), "resets": (b, l)}
    check_shapes(shapes, **floats, resets=resets)
    for name, value in floats.items():
        if value is not None and value.dtype != jnp.float32:
            raise TypeError(f"{name} must be float32, got {value.dtype}")

    # Whole tiles, the same on every platform. At a padded token Δ = 0: the state passes through.
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


# --- the grid: which program sees which part of which array -------------------------------------


def _call(kernel, inputs, outputs, tiles, interpret, reverse=False):
    """Run a kernel on the grid (row i, tile of channels j, tile of tokens k).

    inputs: pairs of an array's axes and the array, outputs: pairs of the axes and the shape; None
    for an array that this call does without. With reverse, k = 0 is the last tile of tokens.
    """
    like = inputs[0][1]
    outputs = [(axes, shape and announced(shape, like)) for axes, shape in outputs]
    b, l, d = like.shape
    w, tokens = math.gcd(tiles.channels, d), math.gcd(tiles.tokens or l, l)

    def spec(axes, array):
        n = array.shape[axes.index("n")] if "n" in axes else None
        size = {"b": None, "j": None, "l": tokens, "s": tokens // CHUNK, "d": w, "n": n, "1": 1}

        def index(i, j, k):  # in units of the tile; an axis of size None is dropped
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
        compiler_params=None if interpret else tiles.params,
        name="selective_scan_" + kernel.__name__,
    )(*(array for _, array in inputs))


@functools.partial(jax.jit, static_argnames=("tiles", "interpret", "save"))
def _forward(x, delta, A, B, C, D, z, keep, h0, *, tiles, interpret, save):
    """-> y, h, and with save the state before every CHUNK tokens: (b, l / CHUNK, n, d)."""
    (b, l, d), n = x.shape, A.shape[0]
    axes = ["bld", "bld", "nd", "bln", "bln", "1d", "bld", "bln", "bnd"]
    inputs = list(zip(axes, (x, delta, A, B, C, D, z, keep, h0)))
    outputs = [
        ("bld", (b, l, d)),
        ("bnd", (b, n, d)),
        ("bsnd", (b, l // CHUNK, n, d) if save else None),
    ]
    return _call(forward_kernel, inputs, outputs, tiles, interpret)


@functools.partial(jax.jit, static_argnames=("tiles", "interpret"))
def _backward(x, delta, A, B, C, D, z, keep, starts, dy, dh, *, tiles, interpret):
    """-> the gradients of x, Δ, A, B, C, D, z and h0."""
    (b, l, d), n = x.shape, A.shape[0]
    j = d // math.gcd(tiles.channels, d)
    axes = ["bld", "bld", "nd", "bln", "bln", "1d", "bld", "bln", "bsnd", "bld", "bnd"]
    inputs = list(zip(axes, (x, delta, A, B, C, D, z, keep, starts, dy, dh)))
    outputs = [
        *[("bld", (b, l, d))] * 2,  # dx, dΔ
        ("bnd", (b, n, d)),  # dA of each row
        *[("bjln", (b, j, l, n))] * 2,  # dB, dC of each tile of channels
        ("b1d", (b, 1, d)),  # dD of each row
        ("bld", None if z is None else (b, l, d)),  # dz
        ("bnd", (b, n, d)),  # dh0
    ]
    dx, ddelta, dA, dB, dC, dD, dz, dh0 = _call(
        backward_kernel, inputs, outputs, tiles, interpret, reverse=True
    )
    return dx, ddelta, dA.sum(0), dB.sum(1), dC.sum(1), dD.sum(0), dz, dh0


# --- the platform, and the gradient -------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _dispatch(function, interpret, *args):
    """The function compiled for the platform that the program is lowered for, or interpreted."""
    interpreted = functools.partial(function, tiles=TPU, interpret=True)
    if interpret:
        return interpreted(*args)
    gpu = functools.partial(function, tiles=GPU, interpret=False)
    branches = {"tpu": functools.partial(function, tiles=TPU, interpret=False)}
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
