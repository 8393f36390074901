"""Mamba-2's block: heads that share B and C, one decay a head, a norm after the gate.

Whatever the dtype of the weights, float32 is kept where the released code keeps it: Δ, A, D, the
state and the norm.

Source: Mamba-2 (Dao & Gu, 2024), §7 and Figure 6; initialization and numerics as in the released
code (state-spaces/mamba, ``mamba2.py``).
"""

import dataclasses
import math
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mamba.config import MultiHeadConfig, check_range
from mamba.layers import (
    CausalConv,
    dt_bias_init,
    ignore_resets_in_padding,
    linear,
    residual_init,
    rms_normalize,
    zero_at_padding,
)
from mamba.ssd import ssd
from mamba.stretches import over_sequence

__all__ = ["GatedRMSNorm", "Mamba2Block", "Mamba2Config", "Mamba2State"]


@dataclasses.dataclass(frozen=True)
class Mamba2Config(MultiHeadConfig):
    """The sizes and choices that define a Mamba-2 language model."""

    d_model: int  # width of the residual stream
    n_layer: int  # residual blocks
    vocab_size: int  # tokens, before padding
    d_state: int = 128  # N, states per channel
    d_conv: int = 4  # taps of the convolution
    expand: int = 2  # E, d_inner / d_model
    head_dim: int = 64  # P, channels of a head
    n_groups: int = 1  # G, groups of heads that share B and C
    A_init_range: tuple = (1.0, 16.0)  # between which −A is drawn at the start of training
    dt_min: float = 1e-3  # shortest time step at the start of training
    dt_max: float = 0.1  # longest time step at the start of training
    dt_init_floor: float = 1e-4  # no time step starts below it
    dt_limit: tuple = (0.0, math.inf)  # between which Δ is clipped
    conv_bias: bool = True  # whether the convolution has a bias
    bias: bool = False  # whether in_proj and out_proj have one
    norm_eps: float = 1e-5  # eps of every RMSNorm
    tie_embeddings: bool = True  # whether the head is the embedding's table
    pad_vocab_size_multiple: int = 16  # the table's rows are a multiple of it
    dtype: Any = jnp.float32  # of the matrix products

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "dt_limit", check_range(self, "dt_limit"))
        object.__setattr__(self, "A_init_range", check_range(self, "A_init_range"))
        if self.A_init_range[0] == 0:
            raise ValueError(f"A_init_range must begin above 0, got {self.A_init_range}")

    @property
    def d_conv_channels(self):
        """Channels of the convolution: x, B and C together."""
        return self.d_inner + 2 * self.n_groups * self.d_state

    def block(self, name, axis=None):
        """The block that these sizes are of; ``mamba.model`` asks for nothing else."""
        return Mamba2Block(self, axis, name=name)

    def zero_state(self, batch):
        """One layer's state before the first token."""
        return Mamba2State.zeros(self, batch)


class Mamba2State(NamedTuple):
    """All that one layer remembers of the past, in float32: the same size whatever it has read."""

    conv: jax.Array  # (b, d_conv - 1, d_inner + 2 G N): the convolution's last inputs
    ssm: jax.Array  # (b, h, p, n): the state of each head

    @classmethod
    def zeros(cls, config, batch):
        """The state before the first token."""
        c = config
        return cls(
            conv=jnp.zeros((batch, c.d_conv - 1, c.d_conv_channels), jnp.float32),
            ssm=jnp.zeros((batch, c.n_heads, c.head_dim, c.d_state), jnp.float32),
        )


class GatedRMSNorm(nn.Module):
    """RMSNorm(y · silu(z)) of each group of channels by itself, in float32. y, z: (..., d)."""

    n_groups: int  # groups of d / n_groups channels
    eps: float = 1e-5  # added to the mean square

    @nn.compact
    def __call__(self, y, z):
        scale = self.param("scale", nn.initializers.ones, (y.shape[-1],))
        y = y.astype(jnp.float32) * nn.silu(z.astype(jnp.float32))
        groups = y.reshape(*y.shape[:-1], self.n_groups, -1)
        return rms_normalize(groups, self.eps).reshape(y.shape) * scale


class Mamba2Block(nn.Module):
    """State space duality and what surrounds it.

        z, xBC, dt = split(in_proj(u));   x, B, C = split(silu(conv1d(xBC)))
        y = ssd(x, softplus(dt + bias), −exp(A_log), B, C, D)
        out = out_proj(RMSNorm(y ⊙ silu(z)))

    Args:
        u: (b, l, d_model) input.
        state: the Mamba2State to continue from; None: before the first token.
        lengths: (b,) true lengths of right-padded rows, or None. The state that is returned is that
            of the row without its padding; outputs at padding mean nothing.
        resets: (b, l) True where a new segment starts, or None. The state and the convolution begin
            anew there, as if each segment had a row of its own.

    Returns:
        out: (b, l, d_model), and the next Mamba2State.
    """

    config: Mamba2Config  # the sizes
    axis: str | None = None  # of a mesh, along which devices hold stretches of the text

    @nn.compact
    def __call__(self, u, state=None, lengths=None, resets=None):
        c, (b, l, _) = self.config, u.shape
        dense = partial(linear, use_bias=c.bias, dtype=c.dtype)
        state = Mamba2State.zeros(c, b) if state is None else state
        resets = ignore_resets_in_padding(resets, lengths)

        widths = np.array([c.d_inner, c.d_conv_channels, c.n_heads])  # of z, of x B C, of dt
        z, xBC, dt = jnp.split(dense(widths.sum(), name="in_proj")(u), widths.cumsum()[:2], -1)

        conv1d = CausalConv(c.d_conv, c.conv_bias, c.dtype, self.axis, name="conv1d")
        xBC, cache = conv1d(xBC, state.conv, lengths, resets)  # (b, l, d_conv_channels)
        x, BC = jnp.split(nn.silu(xBC), [c.d_inner], axis=-1)  # (b, l, d_inner), (b, l, 2 G N)
        x = x.reshape(b, l, c.n_heads, c.head_dim)  # (b, l, h, p)
        B, C = jnp.split(BC.reshape(b, l, 2 * c.n_groups, c.d_state), 2, axis=2)  # (b, l, g, n)

        delta = zero_at_padding(self.time_steps(dt), lengths)  # (b, l, h)
        A = -jnp.exp(self.param("A_log", log_of_uniform(*c.A_init_range), (c.n_heads,)))  # (h,)
        D = self.param("D", nn.initializers.ones, (c.n_heads,))  # (h,)
        scan = over_sequence(ssd, self.axis)
        y, h = scan(x, delta, A, B, C, D, h0=state.ssm, resets=resets, return_state=True)

        y = GatedRMSNorm(c.n_groups, c.norm_eps, name="norm")(y.reshape(b, l, c.d_inner), z)
        out_proj = dense(c.d_model, name="out_proj", kernel_init=residual_init(c.n_layer))
        return out_proj(y), Mamba2State(cache, h)  # (b, l, d_model)

    def time_steps(self, dt):
        """Δ = softplus(dt + bias), clipped to dt_limit. dt: (b, l, h) -> (b, l, h) float32."""
        c = self.config
        bias_init = dt_bias_init(c.dt_min, c.dt_max, c.dt_init_floor)
        bias = self.param("dt_bias", bias_init, (c.n_heads,))  # (h,)
        return jnp.clip(nn.softplus(dt.astype(jnp.float32) + bias), *c.dt_limit)


def log_of_uniform(low, high):
    """An initializer: the logarithm of numbers that are uniform between low and high."""
    return lambda key, shape, dtype=jnp.float32: jnp.log(
        jax.random.uniform(key, shape, dtype, low, high)
    )
