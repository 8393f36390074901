"""The language model made of Mamba blocks, in Flax Linen.

    tokens -> embedding -> n_layer × (x + MambaBlock(RMSNorm(x))) -> RMSNorm -> logits

One call serves every use. ``model.apply({"params": params}, tokens)`` reads a whole sequence;
with a decoding state as third argument it continues from that state and returns the next one, for
any number of new tokens: a prompt, a few more tokens, or one. Source: Mamba (Gu & Dao, 2023), §3.4;
initialization and numerics as in the released code (state-spaces/mamba, ``mixer_seq_simple.py``).
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mamba.block import LayerState, MambaConfig, ResidualBlock, RMSNorm, _uniform_fan_in
from mamba.products import dot_rows

__all__ = ["Mamba"]


class Mamba(nn.Module):
    """The language model: embedding, n_layer residual blocks, a norm, a head tied to the embedding.

    ``model.apply({"params": params}, tokens)``: tokens (b, l) integers -> logits
    (b, l, padded_vocab_size) float32. With a decoding state (``model.initial_state(b)`` to begin),
    ``model.apply({"params": params}, tokens, state)`` -> (logits, next state), and any split of a
    sequence into calls gives the same logits. ``lengths`` (b,): true lengths of right-padded rows.
    ``resets`` (b, l) bool: True at the first token of every piece packed into a row; each piece
    then gets the logits that it gets alone.

    Raises ValueError for tokens that are not (b, l) integers with l ≥ 1 or lie outside the
    vocabulary, and for a state, lengths or resets that do not fit them. (Under ``jit`` the values
    are not known in time: an id or a length that is too large gives NaN.)
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
        _check_state(state, lengths, tokens.shape, self.config)
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


def _check_state(state, lengths, shape, config):
    b, l = shape
    if state is not None:
        expected = jax.eval_shape(lambda: (LayerState.zeros(config, b),) * config.n_layer)
        if jax.tree.map(jnp.shape, state) != jax.tree.map(jnp.shape, expected):
            raise ValueError(
                f"the state is not one of {b} rows and this model's sizes, such as "
                f"model.initial_state({b}) makes and a call with it returns"
            )
    if lengths is None:
        return
    if jnp.shape(lengths) != (b,) or not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise ValueError(
            f"lengths must be integers of shape ({b},) to fit tokens {shape}, got "
            f"{lengths.dtype} of shape {lengths.shape}"
        )
    if not isinstance(lengths, jax.core.Tracer):
        low, high = int(np.asarray(lengths).min()), int(np.asarray(lengths).max())
        if low < 0 or high > l:
            raise ValueError(f"lengths run from {low} to {high}, but tokens have length {l}")
