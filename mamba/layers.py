"""The layers that a block is made of, and how each is initialized, in Flax Linen.

Initialization is the released code's (state-spaces/mamba, ``mamba_simple.py``), whose Linear and
Conv1d keep PyTorch's defaults.
"""

import math
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mamba.checks import check_lengths, check_shapes
from mamba.collectives import inputs_before

__all__ = [
    "A_log_init",
    "CausalConv",
    "GatedMLP",
    "RMSNorm",
    "dt_bias_init",
    "ignore_resets_in_padding",
    "linear",
    "residual_init",
    "rms_normalize",
    "uniform",
    "uniform_fan_in",
    "zero_at_padding",
]


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · scale, over the last axis, in float32 (Zhang & Sennrich, 2019)."""

    eps: float = 1e-5  # added to the mean square

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        return rms_normalize(x, self.eps) * scale


def rms_normalize(x, eps):
    """x / sqrt(mean(x²) + eps), over the last axis, in float32."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + eps)


class CausalConv(nn.Module):
    """Depthwise causal convolution, as PyTorch defines it: a cross-correlation, so the last tap
    multiplies the current token.

        y_t = bias + Σ_k kernel_k ⊙ x_{t − (width − 1) + k}

    It owns its cache: the last ``width − 1`` inputs, from which a later call continues.

    Args:
        x: (b, l, d) inputs.
        cache: (b, width − 1, d) the inputs before them; zeros before the first token.
        lengths: (b,) true lengths of right-padded rows, or None. The next cache ends at the last
            real token.
        resets: (b, l) True where a new segment starts (not in the padding), or None. A tap that
            would reach into an earlier segment reads 0, as at the start of a sequence.

    Returns:
        y: (b, l, d), and the next cache: (b, width − 1, d) in float32.
    """

    width: int  # taps, d_conv
    use_bias: bool = True  # whether a bias is added
    dtype: Any = jnp.float32  # of the products
    axis: str | None = None  # of a mesh, along which devices hold stretches of the text

    @nn.compact
    def __call__(self, x, cache, lengths=None, resets=None):
        width, (b, l, d) = self.width, x.shape
        check_shapes({"cache": (b, width - 1, d), "resets": (b, l)}, cache=cache, resets=resets)
        check_lengths(lengths, (b, l))
        kernel = self.param("kernel", uniform_fan_in, (width, d)).astype(self.dtype)
        cache = inputs_before(x, cache, resets, self.axis)
        inputs = jnp.concatenate([cache.astype(x.dtype), x], axis=1)  # (b, width - 1 + l, d)
        taps = [inputs[:, k : k + l] for k in range(width)]  # (b, l, d) each
        if resets is not None:  # the number of each input's segment; the cache belongs to number 0
            segment = jnp.pad(jnp.cumsum(resets, axis=1), ((0, 0), (width - 1, 0)))
            same = [segment[:, k : k + l] == segment[:, width - 1 :] for k in range(width)]
            taps = [jnp.where(s[..., None], tap, 0) for s, tap in zip(same, taps, strict=True)]
        y = sum(kernel[k] * taps[k] for k in range(width))  # (b, l, d)
        if self.use_bias:
            y += self.param("bias", uniform(width**-0.5), (d,)).astype(self.dtype)

        ends = jnp.full(b, l) if lengths is None else lengths
        places = ends[:, None] + jnp.arange(width - 1)  # (b, width - 1) of the last inputs
        cache = jnp.take_along_axis(inputs, places[..., None], axis=1)  # (b, width - 1, d)
        if resets is not None:  # the next token continues the last segment, and sees no other
            last = jnp.take_along_axis(segment, places, axis=1) == segment[:, -1:]
            cache = jnp.where(last[..., None], cache, 0)
        return y, cache.astype(jnp.float32)


class GatedMLP(nn.Module):
    """fc2(y ⊙ silu(gate)), where y, gate = split(fc1(x)). x: (..., d_model) -> (..., d_model)."""

    width: int  # of y, and of the gate
    n_layer: int  # layers of the model: fc2 starts smaller by √n_layer
    dtype: Any = jnp.float32  # of the products

    @nn.compact
    def __call__(self, x):
        dense = partial(linear, use_bias=False, dtype=self.dtype)
        y, gate = jnp.split(dense(2 * self.width, name="fc1")(x), 2, axis=-1)  # (..., width)
        fc2 = dense(x.shape[-1], name="fc2", kernel_init=residual_init(self.n_layer))
        return fc2(y * nn.silu(gate))


def linear(features, *, name, kernel_init=None, **options):
    """``flax.linen.Dense`` with PyTorch's initialization.

        y = x · kernel + bias

    Args:
        features: columns of the kernel, the width of y.
        name: of the layer, in the parameters.
        kernel_init: initializer; None: uniform in ±1/√fan_in.
        options: as Dense takes them: ``use_bias`` (True by default), ``bias_init``, ``dtype``.
    """
    return nn.Dense(
        features,
        name=name,
        kernel_init=uniform_fan_in if kernel_init is None else kernel_init,
        **options,
    )


def zero_at_padding(delta, lengths):
    """Δ = 0 at padding, so that the state passes through it unchanged.

    delta: (b, l, ...), lengths: (b,) true lengths of right-padded rows, or None -> as delta
    """
    if lengths is None:
        return delta
    real = jnp.arange(delta.shape[1]) < lengths[:, None]  # (b, l)
    return jnp.where(real.reshape(*real.shape, *(1,) * (delta.ndim - 2)), delta, 0.0)


def ignore_resets_in_padding(resets, lengths):
    """No segment starts in the padding. resets: (b, l) bool or None, lengths: (b,) or None."""
    if resets is None or lengths is None:
        return resets
    return resets & (jnp.arange(resets.shape[1]) < lengths[:, None])  # (b, l)


# --- how parameters start -----------------------------------------------------------------------


def uniform_fan_in(key, shape, dtype=jnp.float32):
    """Uniform in ±1/√fan_in, where fan_in = shape[0]: PyTorch's default for Linear and Conv1d."""
    return uniform(shape[0] ** -0.5)(key, shape, dtype)


def residual_init(n_layer):
    """``uniform_fan_in`` ÷ √n_layer: what the layers add to the residual stream adds up."""
    return lambda *args: uniform_fan_in(*args) / math.sqrt(n_layer)


def uniform(bound):
    """An initializer: uniform in ±bound."""
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(
        key, shape, dtype, -bound, bound
    )


def dt_bias_init(dt_min, dt_max, floor):
    """An initializer: softplus⁻¹ of log-uniform time steps.

    So every channel starts with a timescale of its own, as many in one decade as in the next.

    Args:
        dt_min: the shortest time step.
        dt_max: the longest.
        floor: no time step is below it.
    """

    def init(key, shape, dtype=jnp.float32):
        dt = jnp.exp(jax.random.uniform(key, shape, dtype, math.log(dt_min), math.log(dt_max)))
        dt = jnp.maximum(dt, floor)
        return dt + jnp.log(-jnp.expm1(-dt))  # softplus⁻¹(dt), without overflow or cancellation

    return init


def A_log_init(key, shape, dtype=jnp.float32):
    """log(1 … n) on every channel, so that A = −1 … −n: the real part of S4D's initialization."""
    return jnp.broadcast_to(jnp.log(jnp.arange(1, shape[1] + 1, dtype=dtype)), shape)
