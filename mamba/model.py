"""The language model made of blocks, in Flax Linen.

    tokens -> embedding -> n_layer × (x + block(RMSNorm(x))) -> RMSNorm -> logits

The type of the configuration says which block; Mamba-3's may have an MLP after each. Source: Mamba
(Gu & Dao, 2023), §3.4; initialization and numerics as in the released code (state-spaces/mamba,
``mixer_seq_simple.py``).
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from mamba.checkpoint.load import load_checkpoint
from mamba.checkpoint.save import save_checkpoint
from mamba.checks import check_lengths, check_resets, check_state, check_tokens
from mamba.layers import GatedMLP, RMSNorm, uniform_fan_in

__all__ = ["Mamba", "ResidualBlock"]


class ResidualBlock(nn.Module):
    """x + block(RMSNorm(x)), and for a model with MLPs x + mlp(RMSNorm(x)) after it.

    The sums are in float32. Arguments and results as ``MambaBlock``'s.
    """

    config: Any  # MambaConfig, or another generation's
    axis: str | None = None  # of a mesh, along which devices hold stretches of the text

    @nn.compact
    def __call__(self, x, state=None, lengths=None, resets=None):
        c = self.config
        u = RMSNorm(c.norm_eps, name="norm")(x)  # (b, l, d_model)
        out, state = c.block("mixer", self.axis)(u, state, lengths, resets)
        x = x + out
        if c.mlp_width:
            u = RMSNorm(c.norm_eps, name="norm2")(x)
            x = x + GatedMLP(c.mlp_width, c.n_layer, c.dtype, name="mlp")(u)
        return x, state  # (b, l, d_model), the next state


class Mamba(nn.Module):
    """The language model: embedding, n_layer residual blocks, a norm, a head tied to the embedding.

    One call serves every use: a whole sequence, the continuation of one, a single token. Any split
    of a sequence into calls gives the same logits.

        logits = model.apply({"params": params}, tokens)
        logits, state = model.apply({"params": params}, tokens, state)

    Args:
        tokens: (b, l) integers, b and l ≥ 1.
        state: to continue from; ``initial_state(b)`` to begin. None: begin, and return no state.
        lengths: (b,) true lengths of right-padded rows, or None. Logits at padding mean nothing.
        resets: (b, l) True at the first token of each segment packed into a row, or None. A segment
            gets the logits that it gets alone.

    Returns:
        logits: (b, l, padded_vocab_size) float32; with a state, (logits, next state).

    Raises:
        ValueError: tokens that are not integers of that shape or lie outside the vocabulary; a
            state, lengths or resets that do not fit them. Under ``jit`` values are not known in
            time: an id outside the vocabulary or a length that is too large gives NaN. (Where
            matrices do the work, in Mamba-2 and 3, it reaches the segments beside its own, too.)
        TypeError: what is no array, or resets that are not bool.
    """

    config: Any  # MambaConfig, or another generation's
    axis: str | None = None  # of a mesh, along which devices hold stretches: ``mamba.parallel``
    remat: bool = False  # compute each layer anew in the backward pass, for less memory

    def setup(self):
        c = self.config
        self.embedding = nn.Embed(
            c.padded_vocab_size, c.d_model, embedding_init=nn.initializers.normal(0.02)
        )
        layer = nn.remat(ResidualBlock) if self.remat else ResidualBlock
        self.layers = [layer(c, self.axis) for _ in range(c.n_layer)]
        self.norm_f = RMSNorm(c.norm_eps)
        if not c.tie_embeddings:
            self.lm_head = _Head(c)

    def __call__(self, tokens, state=None, lengths=None, resets=None):
        x, next_state = self.features(tokens, state, lengths, resets)  # (b, l, d_model)
        logits = self.logits(x)  # (b, l, padded_vocab_size)
        return logits if state is None else (logits, next_state)

    def last_logits(self, tokens, state, lengths=None, resets=None):
        """As a call with a state, with the logits of each row's last real token only.

        It is there to read a prompt: only the last position says what comes next, and the head is
        the largest matrix product of a small model. Logits of a row of length 0 mean nothing.
        -> logits (b, padded_vocab_size), next state
        """
        x, state = self.features(tokens, state, lengths, resets)  # (b, l, d_model)
        last = -1 if lengths is None else lengths - 1
        return self.logits(x[jnp.arange(x.shape[0]), last]), state

    def features(self, tokens, state=None, lengths=None, resets=None):
        """All but the head -> (b, l, d_model) float32, next state."""
        check_tokens(tokens, self.config.padded_vocab_size)
        check_state(state, self.initial_state, tokens.shape[0])
        check_lengths(lengths, tokens.shape)
        check_resets(resets, tokens.shape)
        tokens = jnp.where(tokens < 0, self.config.padded_vocab_size, tokens)  # NaN, no wrapping
        if lengths is not None:  # any id may stand at padding
            real = jnp.arange(tokens.shape[1]) < lengths[:, None]  # (b, l)
            tokens = jnp.where(real, tokens, 0)
        x = self.embedding(tokens).astype(jnp.float32)  # (b, l, d_model)
        next_state = []
        for layer, layer_state in zip(self.layers, state or [None] * len(self.layers), strict=True):
            x, layer_state = layer(x, layer_state, lengths, resets)
            next_state.append(layer_state)
        return self.norm_f(x), tuple(next_state)

    def logits(self, x):
        """The head. x: (..., d_model) -> (..., padded_vocab_size) float32."""
        tied, dtype = self.config.tie_embeddings, self.config.dtype
        kernel = self.embedding.embedding.T if tied else self.lm_head()  # (d_model, vocab)
        return jnp.dot(x.astype(dtype), kernel.astype(dtype), preferred_element_type=jnp.float32)

    def initial_state(self, batch):
        """The state before the first token: n_layer states of one layer each, all zeros."""
        return tuple(self.config.zero_state(batch) for _ in range(self.config.n_layer))

    @classmethod
    def from_pretrained(
        cls, name, *, revision=None, dtype=jnp.float32, cache_dir=None, shardings=None
    ):
        """Load a published model, or a saved one -> (model, params).

        Args:
            name: a local folder, or a repository of the Hugging Face Hub such as
                "state-spaces/mamba-370m". Files from there are kept in its cache, and found there
                again without a network.
            revision: a branch, tag or commit of the repository.
            dtype: float32, bfloat16 or float16: of the matrices and of the products with them.
                Norms, A_log, D, the biases of Δ, B and C, and MIMO's weights stay float32.
            cache_dir: folder to use instead of the hub's own cache.
            shardings: how the parameters lie on several devices, a function of their shapes such as
                ``partial(parameter_shardings, mesh=mesh)`` (``mamba.parallel``). Each process then
                reads only what its own devices hold. None: all of it, on JAX's default device.

        NaN or infinity in the weights is loaded, with a warning that names the tensor.

        Raises:
            FileNotFoundError: no such folder, repository or file.
            ConnectionError: no network.
            PermissionError: a gated repository.
            ValueError: (CheckpointError) a file that is broken, or holds another model than ours.
        """
        config, params = load_checkpoint(name, revision, dtype, cache_dir, shardings)
        return cls(config), params

    def save_pretrained(self, params, folder, *, naming=None):
        """Write ``config.json`` and ``model.safetensors``, which ``from_pretrained`` reads again.

        A tied head is not written. Every parameter is written in its own dtype, bit for bit. What
        comes back is in the dtype that ``from_pretrained`` is given: the matrices of a float32 tree
        (``init`` makes one whatever ``config.dtype``) are rounded by ``dtype=jnp.bfloat16``.
        Interrupted at any moment, it leaves the folder as it was, complete, or without a
        ``config.json``: never one that loads as something else.

        Args:
            params: this model's parameters.
            folder: where to write; made if it is not there.
            naming: "original", or "transformers" for a folder that transformers loads. None: the
                original one, for Falcon-Mamba transformers'. transformers has no Mamba-3.

        Raises:
            TypeError: ``params`` is no dict.
            ValueError: ``params`` is another model's, or this naming does not have the model.
            FileExistsError: the folder holds weights in another form, which would contradict these.
        """
        save_checkpoint(self.config, params, folder, naming)


class _Head(nn.Module):
    """The kernel of an untied head, (d_model, padded_vocab_size)."""

    config: Any

    @nn.compact
    def __call__(self):
        c = self.config
        return self.param("kernel", uniform_fan_in, (c.d_model, c.padded_vocab_size))
