"""The Mamba block and the language model made of it, in Flax Linen.

    tokens -> embedding -> n_layer × (x + MambaBlock(RMSNorm(x))) -> RMSNorm -> logits

One call serves every use. ``model.apply({"params": params}, tokens)`` reads a whole sequence;
with a decoding state as third argument it continues from that state and returns the next one, for
any number of new tokens: a prompt, a few more tokens, or one. Source: Mamba (Gu & Dao, 2023), §3.4
and Figure 3; initialization and numerics as in the released code (state-spaces/mamba,
``mamba_simple.py`` and ``mixer_seq_simple.py``).

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

from mamba.products import dot_general, dot_rows
from mamba.scan import selective_scan

__all__ = ["LayerState", "Mamba", "MambaBlock", "MambaConfig", "RMSNorm", "ResidualBlock"]


@dataclasses.dataclass(frozen=True)
class MambaConfig:
    """The sizes and choices that define a Mamba language model.

    Names follow the released configuration. ``dt_rank=None`` means ceil(d_model / 16). ``dt_min``,
    ``dt_max`` and ``dt_init_floor`` (times) shape the initialization only. ``dtype`` is that of the
    matrix products.
    Raises ValueError for sizes that make no model.
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

    def __post_init__(self):
        sizes = "d_model n_layer vocab_size d_state d_conv expand rank pad_vocab_size_multiple"
        for name in sizes.split():
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.dt_min <= self.dt_max:
            raise ValueError(f"expected 0 < dt_min <= dt_max, got {self.dt_min} and {self.dt_max}")

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

        R, n = c.rank, c.d_state
        dt_B_C = linear("x_proj", R + 2 * n, use_bias=False)(x)  # (b, l, R + 2n)
        dt, B, C = jnp.split(dt_B_C, [R, R + n], axis=-1)  # (b, l, R), (b, l, n), (b, l, n)
        dt_proj = linear(
            "dt_proj", c.d_inner, use_bias=True, bias_init=_dt_bias_init(c), dtype=jnp.float32
        )
        delta = jax.nn.softplus(dt_proj(dt))  # (b, l, d_inner)
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


class Mamba(nn.Module):
    """The language model: embedding, n_layer residual blocks, a norm, a head tied to the embedding.

    ``model.apply({"params": params}, tokens)``: tokens (b, l) integers -> logits
    (b, l, padded_vocab_size) float32. With a decoding state (``model.initial_state(b)`` to begin),
    ``model.apply({"params": params}, tokens, state)`` -> (logits, next state), and any split of a
    sequence into calls gives the same logits. ``lengths`` (b,): true lengths of right-padded rows.
    ``resets`` (b, l) bool: True at the first token of every piece packed into a row; each piece
    then gets the logits that it gets alone.

    Raises ValueError for tokens that are not (b, l) integers with l ≥ 1 or lie outside the
    vocabulary, and for resets that do not fit them. (Under ``jit`` the values are not known in
    time: an id that is too large gives NaN.)
    """

    config: MambaConfig

    def setup(self):
        c = self.config
        self.embedding = nn.Embed(
            c.padded_vocab_size, c.d_model, embedding_init=nn.initializers.normal(0.02)
        )
        self.layers = [ResidualBlock(c) for _ in range(c.n_layer)]
        self.norm_f = RMSNorm(c.norm_eps)
        if not c.tie_embeddings:
            self.lm_head = _Head(c)

    def __call__(self, tokens, state=None, lengths=None, resets=None):
        x, new_state = self._features(tokens, state, lengths, resets)
        logits = self._logits(x)  # (b, l, padded_vocab)
        return logits if state is None else (logits, new_state)

    def last_logits(self, tokens, state, lengths=None, resets=None):
        """As a call with a state, but with logits for each row's last real token only.

        -> (logits (b, padded_vocab_size), next state)

        To read a prompt: the head is the largest matrix product of a small model, and of all its
        rows only the last one says what comes next.
        """
        x, state = self._features(tokens, state, lengths, resets)  # (b, l, d_model)
        last = -1 if lengths is None else lengths - 1
        return self._logits(x[jnp.arange(x.shape[0]), last]), state

    def initial_state(self, batch):
        """The state before the first token: a tuple of n_layer LayerStates of zeros."""
        return tuple(LayerState.zeros(self.config, batch) for _ in range(self.config.n_layer))

    def _features(self, tokens, state, lengths, resets):
        _check_tokens(tokens, self.config)
        x = self.embedding(tokens).astype(jnp.float32)  # (b, l, d_model)
        if state is None:
            for layer in self.layers:
                x = layer(x, resets=resets)
            return self.norm_f(x), None
        new_state = []
        for layer, layer_state in zip(self.layers, state, strict=True):
            x, layer_state = layer(x, layer_state, lengths, resets)
            new_state.append(layer_state)
        return self.norm_f(x), tuple(new_state)

    def _logits(self, x):
        dtype = self.config.dtype
        x, f32 = x.astype(dtype), jnp.float32
        if not self.config.tie_embeddings:
            return jnp.dot(x, self.lm_head().astype(dtype), preferred_element_type=f32)
        table = self.embedding.embedding.astype(dtype)  # (padded_vocab, d_model)
        if x.ndim == 2:
            return dot_rows(x, table)  # (b, padded_vocab)
        return jnp.dot(x, table.T, preferred_element_type=f32)  # (b, l, padded_vocab)


class _Head(nn.Module):
    """The kernel of an untied head, (d_model, padded_vocab_size)."""

    config: MambaConfig

    @nn.compact
    def __call__(self):
        c = self.config
        return self.param("kernel", _uniform_fan_in, (c.d_model, c.padded_vocab_size))


def _check_tokens(tokens, config):
    if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(
            f"tokens must be integers of shape (b, l), got {tokens.dtype} of shape {tokens.shape}"
        )
    if tokens.shape[1] == 0:
        raise ValueError("tokens has length 0: the model needs at least one token to start from")
    if not isinstance(tokens, jax.core.Tracer) and tokens.size:
        values = np.asarray(tokens)  # NumPy: inside jit, even a constant's minimum is traced
        low, high = int(values.min()), int(values.max())
        if low < 0 or high >= config.padded_vocab_size:
            raise ValueError(
                f"token ids run from {low} to {high}, but this model's vocabulary is "
                f"0 … {config.padded_vocab_size - 1}: was it another model's tokenizer?"
            )


def _check_resets(resets, shape):
    if resets is not None and (resets.shape != shape or resets.dtype != bool):
        raise ValueError(
            f"resets must be bool of shape (b, l) = {shape}, True where a new piece starts, "
            f"got {resets.dtype} of shape {resets.shape}"
        )
