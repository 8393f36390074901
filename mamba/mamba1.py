"""Mamba's block: the selective SSM and what surrounds it, in Flax Linen.

Whatever the dtype of the weights, float32 is kept where the released code keeps it: Δ, A, D and the
state here, the residual stream and the norms in ``mamba.model``.

Source: Mamba (Gu & Dao, 2023), §3.4 and Figure 3; initialization and numerics as in the released
code (state-spaces/mamba, ``mamba_simple.py``).
"""

import dataclasses
import math
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from mamba.config import ModelConfig
from mamba.layers import (
    A_log_init,
    CausalConv,
    dt_bias_init,
    ignore_resets_in_padding,
    linear,
    residual_init,
    rms_normalize,
    zero_at_padding,
)
from mamba.scan import selective_scan
from mamba.stretches import over_sequence

__all__ = ["LayerState", "MambaBlock", "MambaConfig"]


@dataclasses.dataclass(frozen=True)
class MambaConfig(ModelConfig):
    """The sizes and choices that define a Mamba language model, under their released names.

    Raises ValueError for sizes and choices that make no model.
    """

    d_model: int  # width of the residual stream
    n_layer: int  # residual blocks
    vocab_size: int  # tokens, before padding
    d_state: int = 16  # N, states per channel
    d_conv: int = 4  # taps of the convolution
    expand: int = 2  # E, d_inner / d_model
    dt_rank: int | None = None  # R, rank of the projection that makes Δ; None: ceil(d_model / 16)
    dt_min: float = 1e-3  # shortest time step at the start of training
    dt_max: float = 0.1  # longest time step at the start of training
    dt_init_floor: float = 1e-4  # no time step starts below it
    conv_bias: bool = True  # whether the convolution has a bias
    bias: bool = False  # whether in_proj and out_proj have one
    norm_eps: float = 1e-5  # eps of every RMSNorm with weights
    select_norm_eps: float | None = None  # Falcon-Mamba's norms of Δ's input, B, C; None: no norms
    tie_embeddings: bool = True  # whether the head is the embedding's table
    pad_vocab_size_multiple: int = 8  # the table's rows are a multiple of it
    dtype: Any = jnp.float32  # of the matrix products

    @property
    def rank(self):
        """Rank R of the projection that makes Δ."""
        return math.ceil(self.d_model / 16) if self.dt_rank is None else self.dt_rank

    def block(self, name, axis=None):
        """The block that these sizes are of; ``mamba.model`` asks for nothing else."""
        return MambaBlock(self, axis, name=name)

    def zero_state(self, batch):
        """One layer's state before the first token."""
        return LayerState.zeros(self, batch)


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


class MambaBlock(nn.Module):
    """The selective SSM and what surrounds it (the paper's Figure 3, right).

        x, z = split(in_proj(u));   x = silu(conv1d(x));   Δ, B, C = select(x)
        y = selective_scan(x, Δ, −exp(A_log), B, C, D) ⊙ silu(z);   out = out_proj(y)

    Args:
        u: (b, l, d_model) input.
        state: the LayerState to continue from; None: before the first token.
        lengths: (b,) true lengths of right-padded rows, or None. The state that is returned is that
            of the row without its padding; outputs at padding mean nothing.
        resets: (b, l) True where a new segment starts, or None. The state and the convolution begin
            anew there, as if each segment had a row of its own.

    Returns:
        out: (b, l, d_model), and the next LayerState.
    """

    config: MambaConfig  # the sizes
    axis: str | None = None  # of a mesh, along which devices hold stretches of the text

    @nn.compact
    def __call__(self, u, state=None, lengths=None, resets=None):
        c = self.config
        dense = partial(linear, use_bias=c.bias, dtype=c.dtype)
        state = LayerState.zeros(c, len(u)) if state is None else state
        resets = ignore_resets_in_padding(resets, lengths)

        x, z = jnp.split(dense(2 * c.d_inner, name="in_proj")(u), 2, axis=-1)  # (b, l, d_inner)

        conv1d = CausalConv(c.d_conv, c.conv_bias, c.dtype, self.axis, name="conv1d")
        x, cache = conv1d(x, state.conv, lengths, resets)  # (b, l, d_inner), (b, d_conv - 1, …)
        x = nn.silu(x)  # (b, l, d_inner)

        delta, B, C = self.select(x)  # (b, l, d_inner), (b, l, n), (b, l, n)
        delta = zero_at_padding(delta, lengths)  # (b, l, d_inner)

        A = -jnp.exp(self.param("A_log", A_log_init, (c.d_inner, c.d_state)))  # (d_inner, n)
        D = self.param("D", nn.initializers.ones, (c.d_inner,))  # (d_inner,)
        scan = over_sequence(selective_scan, self.axis)
        y, h = scan(  # with the gate: y ⊙ silu(z), while y is still in float32
            x, delta, A, B, C, D, z=z, h0=state.ssm, resets=resets, return_state=True
        )  # (b, l, d_inner), (b, d_inner, n)

        out_proj = dense(c.d_model, name="out_proj", kernel_init=residual_init(c.n_layer))
        return out_proj(y), LayerState(cache, h)  # (b, l, d_model)

    def select(self, x):
        """What each token chooses: its time step Δ, how it writes (B) and how it reads (C).

            dt, B, C = split(x_proj(x));   Δ = softplus(dt_proj(dt))

        Falcon-Mamba divides dt, B and C by their root mean square first.

        A large Δ forgets the state and takes the token in; Δ near 0 keeps the state as it is.

        -> Δ (b, l, d_inner), B and C (b, l, n)
        """
        c = self.config
        x_proj = linear(c.rank + 2 * c.d_state, name="x_proj", use_bias=False, dtype=c.dtype)
        dt, B, C = jnp.split(x_proj(x), [c.rank, c.rank + c.d_state], axis=-1)  # (b, l, R), n, n
        if c.select_norm_eps is not None:
            dt, B, C = (rms_normalize(v, c.select_norm_eps) for v in (dt, B, C))
        bias_init = dt_bias_init(c.dt_min, c.dt_max, c.dt_init_floor)
        dt_proj = linear(c.d_inner, name="dt_proj", bias_init=bias_init, dtype=jnp.float32)
        return nn.softplus(dt_proj(dt)), B, C  # (b, l, d_inner), (b, l, n), (b, l, n)
