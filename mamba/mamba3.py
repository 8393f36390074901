"""Mamba-3's block: a two-point rule, angles chosen by the token, one or several inputs a step.

No convolution, and no parameter for the rates: each token chooses its time step, its rate, how the
step is shared between it and the token before it, and by which angles the state turns. Whatever the
dtype of the weights, float32 is kept where the released code keeps it: Δ, A, λ, the angles, D, the
norms of B and C, the biases and the state.

Source: Mamba-3 (Lahoti et al., 2026, arXiv 2603.15569), §3 and Figure 2; initialization and
numerics as in the released code (state-spaces/mamba, ``mamba3.py``).
"""

import dataclasses
from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from mamba.config import MultiHeadConfig
from mamba.layers import (
    RMSNorm,
    dt_bias_init,
    ignore_resets_in_padding,
    linear,
    residual_init,
    zero_at_padding,
)
from mamba.stretches import over_sequence
from mamba.trapezoid import TrapezoidState, trapezoidal_scan

__all__ = ["Mamba3Block", "Mamba3Config", "heavy_tail"]


@dataclasses.dataclass(frozen=True)
class Mamba3Config(MultiHeadConfig):
    """The sizes and choices that define a Mamba-3 language model."""

    d_model: int  # width of the residual stream
    n_layer: int  # residual blocks
    vocab_size: int  # tokens, before padding
    d_intermediate: int | None = None  # width of the MLP after each block; None: there is none
    d_state: int = 128  # N, states per channel
    expand: int = 2  # E, d_inner / d_model
    head_dim: int = 64  # P, channels of a head
    n_groups: int = 1  # G, groups of heads that share B and C
    is_mimo: bool = False  # whether a step has R inputs and outputs (MIMO), not one (SISO)
    mimo_rank: int = 4  # R, if is_mimo
    rope_fraction: float | None = 0.5  # share of the states that turn; None: none does
    A_floor: float = 1e-4  # the least rate, −A
    heavy_tail: bool = True  # whether rates are heavy_tail(·), as released; else softplus(·)
    dt_min: float = 1e-3  # shortest time step at the start of training
    dt_max: float = 0.1  # longest time step at the start of training
    dt_init_floor: float = 1e-4  # no time step starts below it
    norm_eps: float = 1e-5  # eps of every RMSNorm
    tie_embeddings: bool = True  # whether the head is the embedding's table
    pad_vocab_size_multiple: int = 16  # the table's rows are a multiple of it
    dtype: Any = jnp.float32  # of the matrix products

    def __post_init__(self):
        super().__post_init__()
        if self.rope_fraction and self.rope_fraction > 1:
            raise ValueError(f"rope_fraction must be at most 1, got {self.rope_fraction}")

    @property
    def mlp_width(self):
        """Width of the MLP: d_intermediate rounded up to a multiple of 128."""
        return self.d_intermediate and -(-self.d_intermediate // 128) * 128

    @property
    def rank(self):
        """R, inputs a step: 1 for SISO."""
        return self.mimo_rank if self.is_mimo else 1

    @property
    def n_angles(self):
        """S, pairs of states that turn."""
        return int(self.d_state * (self.rope_fraction or 0)) // 2

    def block(self, name, axis=None):
        """The block that these sizes are of; ``mamba.model`` asks for nothing else."""
        return Mamba3Block(self, axis, name=name)

    def zero_state(self, batch):
        """One layer's state before the first token."""
        c = self
        return TrapezoidState.zeros(batch, c.n_heads, c.rank, c.head_dim, c.d_state, c.n_angles)


class Mamba3Block(nn.Module):
    """The exponential-trapezoidal recurrence and what surrounds it.

        z, x, B, C, dt, a, trap, angles = split(in_proj(u))
        Δ = softplus(dt + bias),   A = −max(heavy_tail(a), floor),   λ = sigmoid(trap)
        y = scan(x, Δ, A, λ, RMSNorm(B) + B_bias, RMSNorm(C) + C_bias, Δ π tanh(angles), D)
        out = out_proj(y ⊙ silu(z))

    Heads share B and C by group, as in Mamba-2, and the angles, but each multiplies these by its
    own Δ. With R inputs a step (MIMO), there are R of B and of C. x and z are R copies, each scaled
    channel by channel (mimo_x, mimo_z), and the R outputs are added up with weights (mimo_o).

    Args:
        u: (b, l, d_model) input.
        state: the TrapezoidState to continue from; None: before the first token.
        lengths: (b,) true lengths of right-padded rows, or None. The state that is returned is that
            of the row without its padding; outputs at padding mean nothing.
        resets: (b, l) True where a new segment starts, or None. The state begins anew there, as if
            each segment had a row of its own.

    Returns:
        out: (b, l, d_model), and the next TrapezoidState.
    """

    config: Mamba3Config  # the sizes
    axis: str | None = None  # of a mesh, along which devices hold stretches of the text

    @nn.compact
    def __call__(self, u, state=None, lengths=None, resets=None):
        c, (b, l, _) = self.config, u.shape
        dense = partial(linear, use_bias=False, dtype=c.dtype)
        heads, resets = (b, l, c.n_heads), ignore_resets_in_padding(resets, lengths)

        of_B = c.rank * c.n_groups * c.d_state  # width of B, and of C
        widths = np.array([c.d_inner, c.d_inner, of_B, of_B, *[c.n_heads] * 3, c.n_angles])
        parts = jnp.split(dense(widths.sum(), name="in_proj")(u), widths.cumsum()[:-1], axis=-1)
        z, x, B, C, *rest = parts
        dt, a, trap, angles = (v.astype(jnp.float32) for v in rest)  # (b, l, h) thrice, (b, l, s)

        delta = zero_at_padding(self.time_steps(dt), lengths)  # (b, l, h)
        rate = heavy_tail(a) if c.heavy_tail else nn.softplus(a)
        theta = delta[..., None] * jnp.pi * jnp.tanh(angles)[:, :, None]  # (b, l, h, s)
        B, C = self.for_heads(B, "B"), self.for_heads(C, "C")  # (b, l, h, r, n)
        D = self.param("D", nn.initializers.ones, (c.n_heads,))  # (h,)

        x, z = (v.reshape(*heads, 1, c.head_dim) for v in (x, z))  # (b, l, h, 1, p)
        if c.is_mimo:
            x, z = x * self.mix("mimo_x", 1 / c.rank), z * self.mix("mimo_z", 1)  # (b, l, h, r, p)
        scan = over_sequence(trapezoidal_scan, self.axis)
        y, state = scan(
            x, delta, -jnp.maximum(rate, c.A_floor), nn.sigmoid(trap), B, C, theta, D,
            pairs="halves" if c.is_mimo else "interleaved",
            state=state, resets=resets, return_state=True,
        )  # fmt: skip
        y = y.astype(jnp.float32) * nn.silu(z.astype(jnp.float32))  # (b, l, h, r, p)
        if c.is_mimo:
            y = y * self.mix("mimo_o", 1 / c.rank)
        y = y.sum(3).reshape(b, l, c.d_inner)  # over r

        out_proj = dense(c.d_model, name="out_proj", kernel_init=residual_init(c.n_layer))
        return out_proj(y), state  # (b, l, d_model)

    def time_steps(self, dt):
        """Δ = softplus(dt + bias), and never 0, which would mark padding. dt: (b, l, h)."""
        c = self.config
        bias_init = dt_bias_init(c.dt_min, c.dt_max, c.dt_init_floor)
        delta = nn.softplus(dt + self.param("dt_bias", bias_init, (c.n_heads,)))
        return jnp.maximum(delta, jnp.finfo(delta.dtype).tiny)  # (b, l, h)

    def for_heads(self, v, name):
        """B or C: normed, that of its group for each head, plus a bias. -> (b, l, h, r, n)

        v: (b, l, r · g · n), laid out in this order
        """
        c, (b, l, _) = self.config, v.shape
        v = v.reshape(b, l, c.rank, c.n_groups, c.d_state)
        v = RMSNorm(c.norm_eps, name=f"{name}_norm")(v)  # over n
        v = jnp.repeat(v.swapaxes(2, 3), c.n_heads // c.n_groups, axis=2)  # (b, l, h, r, n)
        return v + self.param(f"{name}_bias", nn.initializers.ones, v.shape[2:])  # (h, r, n)

    def mix(self, name, start):
        """A weight for each input or output of each channel: (h, r, p)."""
        c = self.config
        shape = (c.n_heads, c.rank, c.head_dim)
        return self.param(name, nn.initializers.constant(start), shape)


def heavy_tail(x):
    """1 + x where x ≥ 0, 1 / (1 − x) below: positive, and it falls slower than softplus."""
    return jnp.where(x >= 0, 1 + x, 1 / (1 + jnp.abs(x)))
