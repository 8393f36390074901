"""The Mamba block: the selective SSM and what surrounds it, in Flax Linen.

    x + MambaBlock(RMSNorm(x))

Source: Mamba (Gu & Dao, 2023), §3.4 and Figure 3; initialization and numerics as in the released
code (state-spaces/mamba, ``mamba_simple.py``).

Whatever the dtype of the weights, float32 is kept where the released code keeps it: the residual
stream, the norms, Δ, A, D and the state.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mamba.products import dot_general
from mamba.scan import selective_scan

__all__ = ["LayerState", "MambaBlock", "MambaConfig", "RMSNorm", "ResidualBlock"]


@dataclasses.dataclass(frozen=True)
class MambaConfig:
    """The sizes and choices that define a Mamba language model.

    Names follow the released configuration. ``dt_rank=None`` means ceil(d_model / 16). ``dt_min``,
    ``dt_max`` and ``dt_init_floor`` (times) shape the initialization only. ``dtype`` is that of the
    matrix products. ``selective``: which of Δ ("delta"), B and C look at the input; those left out
    are learned constants of the layer. All three is Mamba, none, (), is an LTI system (S4D-real) in
    the same block, and what lies between is the ablation of the paper's Table 7.
    Raises ValueError for sizes that make no model, and for other names in ``selective``.
    """

    d_model: int
    n_layer: int
    vocab_size: int
    d_state: int = 16
    d_conv: int = 4
    expand: int = 2
    dt_rank: int | None = None
    dt_min: float = 1e-3
    dt_max: float = 0.1
    dt_init_floor: float = 1e-4
    conv_bias: bool = True
    bias: bool = False
    norm_eps: float = 1e-5
    tie_embeddings: bool = True
    pad_vocab_size_multiple: int = 8
    dtype: Any = jnp.float32
    selective: tuple[str, ...] = ("delta", "B", "C")

    def __post_init__(self):
        sizes = "d_model n_layer vocab_size d_state d_conv expand rank pad_vocab_size_multiple"
        for name in sizes.split():
            size = getattr(self, name)
            if not isinstance(size, int | np.integer) or size < 1:
                raise ValueError(f"{name} must be a whole number, at least 1, got {size}")
        if not 0 < self.dt_min <= self.dt_max:
            raise ValueError(f"expected 0 < dt_min <= dt_max, got {self.dt_min} and {self.dt_max}")
        names = MambaConfig.selective
        if isinstance(self.selective, str) or not set(self.selective) <= set(names):
            raise ValueError(f"selective must be a tuple of names of {names}: {self.selective!r}")
        # One spelling for one model, whatever the order: configurations compare equal.
        object.__setattr__(self, "selective", tuple(k for k in names if k in self.selective))

    @property
    def d_inner(self):
        """Width inside the block, E · d_model."""
        return self.expand * self.d_model

    @property
    def rank(self):
        """Rank R of the projection that makes Δ."""
        return math.ceil(self.d_model / 16) if self.dt_rank is None else self.dt_rank

    @property
    def padded_vocab_size(self):
        """Rows of the embedding: vocab_size rounded up to a multiple that suits the hardware."""
        multiple = self.pad_vocab_size_multiple
        return -(-self.vocab_size // multiple) * multiple


class LayerState(NamedTuple):
    """All that one layer remembers of the past, in float32: the same size whatever it has read."""

    conv: jax.Array  # (b, d_conv - 1, d_inner): the convolution's last inputs
    ssm: jax.Array  # (b, d_inner, n): the state h

    @classmethod
    def zeros(cls, config, batch):
        """The state before the first token."""
        c = config
        return cls(
            conv=jnp.zeros((batch, c.d_conv - 1, c.d_inner), jnp.float32),
            ssm=jnp.zeros((batch, c.d_inner, c.d_state), jnp.float32),
        )


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · scale, over the last axis, in float32 (Zhang & Sennrich, 2019)."""

    eps: float = 1e-5

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        x = x.astype(jnp.float32)
        return x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + self.eps) * scale


def _uniform_fan_in(key, shape, dtype=jnp.float32):
    """Uniform in ±1/√fan_in, where fan_in = shape[0]: PyTorch's default for Linear and Conv1d."""
    return _uniform(shape[0] ** -0.5)(key, shape, dtype)


def _uniform(bound):
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(
        key, shape, dtype, -bound, bound
    )


def _dt_bias_init(config):
    """softplus⁻¹ of log-uniform time steps: every channel starts with a timescale of its own."""

    def init(key, shape, dtype=jnp.float32):
        low, high = math.log(config.dt_min), math.log(config.dt_max)
        dt = jnp.exp(jax.random.uniform(key, shape, dtype, low, high))
        dt = jnp.maximum(dt, config.dt_init_floor)
        return dt + jnp.log(-jnp.expm1(-dt))  # softplus⁻¹(dt), without overflow or cancellation

    return init


def _A_log_init(key, shape, dtype=jnp.float32):
    """log(1 … n) on every channel, so that A = −1 … −n: the real part of S4D's initialization."""
    return jnp.broadcast_to(jnp.log(jnp.arange(1, shape[1] + 1, dtype=dtype)), shape)


class _CausalConv(nn.Module):
    """Depthwise causal convolution as PyTorch means it: out_t = bias + Σ_k kernel_k ⊙ window_{t+k}.

    window: (b, d_conv − 1 + l, d_inner), the past first -> (b, l, d_inner). A cross-correlation:
    the last tap meets the current token. A few taps are a sum of as many shifted copies. ``piece``,
    (b, d_conv − 1 + l) integers or None, numbers the pieces packed into a row: a tap that would
    reach into another piece than its token's reads 0 there, as at the start of a sequence.
    """

    config: MambaConfig

    @nn.compact
    def __call__(self, window, piece=None):
        c = self.config
        kernel = self.param("kernel", _uniform_fan_in, (c.d_conv, c.d_inner)).astype(c.dtype)
        l = window.shape[1] - (c.d_conv - 1)
        taps = [window[:, k : k + l] for k in range(c.d_conv)]  # (b, l, d_inner) each
        if piece is not None:
            same = [piece[:, k : k + l] == piece[:, c.d_conv - 1 :] for k in range(c.d_conv)]
            taps = [jnp.where(s[..., None], tap, 0) for s, tap in zip(same, taps, strict=True)]
        out = sum(kernel[k] * taps[k] for k in range(c.d_conv))  # (b, l, d_inner)
        if c.conv_bias:
            bias = self.param("bias", _uniform(c.d_conv**-0.5), (c.d_inner,))
            out = out + bias.astype(c.dtype)
        return out


class MambaBlock(nn.Module):
    """The selective SSM and what surrounds it (the paper's Figure 3, right).

        x, z = split(in_proj(u));   x = silu(conv1d(x));   dt, B, C = split(x_proj(x))
        Δ = softplus(dt_proj(dt));  y = selective_scan(x, Δ, −exp(A_log), B, C, D) ⊙ silu(z)
        out = out_proj(y)

    What ``config.selective`` leaves out of Δ, B, C is a constant instead: Δ = softplus(dt_bias),
    one per channel, initialized as dt_proj's bias; B and C vectors (n,), shared by all channels as
    the selective ones are, ones and standard normal at the start (as S4D: Gu et al., 2022).

    Called with u: (b, l, d_model) -> (b, l, d_model). With a LayerState, it continues from there
    and returns (out, next LayerState). ``lengths`` (b,) says where right-padded rows really end: a
    padded position gets Δ = 0, which leaves h as it is, and the conv keeps the window that ends at
    the last real token. So the state is that of the row alone (outputs at pads mean nothing).
    ``resets`` (b, l) bool: True where a new piece starts. There the state and the conv's window
    begin anew, as if each piece had a row of its own. Raises ValueError for other resets.
    """

    config: MambaConfig

    @nn.compact
    def __call__(self, u, state=None, lengths=None, resets=None):
        c, l = self.config, u.shape[1]
        _check_resets(resets, u.shape[:2])

        def linear(name, features, **kwargs):
            kwargs = {"use_bias": c.bias, "kernel_init": _uniform_fan_in, "dtype": c.dtype} | kwargs
            return nn.Dense(features, name=name, dot_general=dot_general, **kwargs)

        def out_init(*args):  # n_layer branches add up in the residual stream: keep the sum's size
            return _uniform_fan_in(*args) / math.sqrt(c.n_layer)

        xz = linear("in_proj", 2 * c.d_inner)(u)  # (b, l, 2 d_inner)
        x, z = jnp.split(xz, 2, axis=-1)  # (b, l, d_inner) each

        past = LayerState.zeros(c, u.shape[0]) if state is None else state
        past_x = past.conv.astype(x.dtype)  # (b, d_conv - 1, d_inner)
        window = jnp.concatenate([past_x, x], axis=1)  # (b, d_conv - 1 + l, d_inner)
        real = None if lengths is None else jnp.arange(l) < lengths[:, None]  # (b, l)
        piece = None
        if resets is not None:
            resets = resets if real is None else resets & real  # at a pad nothing starts
            piece = jnp.pad(jnp.cumsum(resets, axis=1), ((0, 0), (c.d_conv - 1, 0)))  # as window
        x = jax.nn.silu(_CausalConv(c, name="conv1d")(window, piece))  # (b, l, d_inner)

        n = c.d_state
        sizes = {"delta": c.rank, "B": n, "C": n}
        widths = [sizes[name] for name in c.selective]
        seen = {}  # what looks at the input: (b, l, R), (b, l, n), (b, l, n) where all three do
        if c.selective:
            dt_B_C = linear("x_proj", sum(widths), use_bias=False)(x)  # (b, l, R + 2n)
            parts = jnp.split(dt_B_C, np.cumsum(widths)[:-1], axis=-1)
            seen = dict(zip(c.selective, parts, strict=True))

        def part(name, init):  # (b, l, n)
            if name in seen:
                return seen[name]
            return jnp.broadcast_to(self.param(name, init, (n,)), (*x.shape[:2], n))

        B, C = part("B", nn.initializers.ones), part("C", nn.initializers.normal(1.0))
        dt_bias_init = _dt_bias_init(c)
        if "delta" in seen:
            dt_proj = linear(
                "dt_proj", c.d_inner, use_bias=True, bias_init=dt_bias_init, dtype=jnp.float32
            )
            dt = dt_proj(seen["delta"])  # (b, l, d_inner)
        else:
            dt = jnp.broadcast_to(self.param("dt_bias", dt_bias_init, (c.d_inner,)), x.shape)
        delta = jax.nn.softplus(dt)  # (b, l, d_inner)
        if real is not None:
            delta = jnp.where(real[..., None], delta, 0.0)

        A = -jnp.exp(self.param("A_log", _A_log_init, (c.d_inner, n)))  # (d_inner, n)
        D = self.param("D", nn.initializers.ones, (c.d_inner,))
        y, h = selective_scan(
            x, delta, A, B, C, D, z=z, h0=past.ssm, resets=resets, return_state=True
        )
        out = linear("out_proj", c.d_model, kernel_init=out_init)(y)  # (b, l, d_model)
        if state is None:
            return out
        ends = jnp.full(u.shape[0], l) if lengths is None else lengths
        last = ends[:, None] + jnp.arange(c.d_conv - 1)  # (b, d_conv - 1), places in the window
        conv = jnp.take_along_axis(window, last[..., None], axis=1)  # (b, d_conv - 1, d_inner)
        if piece is not None:  # what comes next belongs to the last piece and sees no other
            of_last = jnp.take_along_axis(piece, last, axis=1) == piece[:, -1:]  # (b, d_conv - 1)
            conv = jnp.where(of_last[..., None], conv, 0)
        return out, LayerState(conv.astype(jnp.float32), h)


class ResidualBlock(nn.Module):
    """x + MambaBlock(RMSNorm(x)), the sum in float32. Arguments and results as MambaBlock's."""

    config: MambaConfig

    @nn.compact
    def __call__(self, x, state=None, lengths=None, resets=None):
        out = MambaBlock(self.config, name="mixer")(
            RMSNorm(self.config.norm_eps, name="norm")(x), state, lengths, resets
        )
        if state is None:
            return x + out  # (b, l, d_model)
        return x + out[0], out[1]


def _check_resets(resets, shape):
    if resets is not None and (resets.shape != shape or resets.dtype != bool):
        raise ValueError(
            f"resets must be bool of shape (b, l) = {shape}, True where a new piece starts, "
            f"got {resets.dtype} of shape {resets.shape}"
        )
