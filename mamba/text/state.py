"""A text that was read, as a value: what to keep of it to continue from its end, and on disk.

Its size is the same however long the text. So a long prompt can be read once, kept in a file, and
continued many times.
"""

from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mamba.checkpoint.files import read_tensors, write_atomically, write_tensors
from mamba.checkpoint.tensors import CheckpointError, compare_tensors

__all__ = ["TextState", "load_state", "save_state", "state_bytes"]


class TextState(NamedTuple):
    """b texts that were read, as ``read_prompt`` returns them: all that is needed to continue.

    What the texts do to what comes after them is in the decoding state alone. The logits say which
    token comes next, so that it can be drawn before anything more is read.
    """

    layers: tuple  # the decoding state: one state per layer, of (b, …) float32 arrays
    logits: jax.Array  # (b, padded_vocab_size) float32, after the last token
    seen: jax.Array  # (b, padded_vocab_size) bool, the tokens read, for the repetition penalty
    last: jax.Array  # (b,) int32, the last token read, on which the text of the next may depend

    @classmethod
    def empty(cls, model, batch):
        """Before the first token. The logits mean nothing yet, and ``last`` is −1."""
        shape = batch, model.config.padded_vocab_size
        return cls(
            layers=model.initial_state(batch),
            logits=jnp.zeros(shape, jnp.float32),
            seen=jnp.zeros(shape, bool),
            last=jnp.full(batch, -1, jnp.int32),
        )


def state_bytes(config):
    """The size of the decoding state of one text, in bytes, whatever the length of the text.

    For Mamba-1, whose layers keep d_conv − 1 inputs of the convolution and h, all float32:
    4 · n_layer · d_inner · (d_conv − 1 + n).
    """
    layer = jax.eval_shape(lambda: config.zero_state(1))
    return config.n_layer * sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(layer))


def save_state(state, path):
    """Write a TextState to a ``.safetensors`` file, which ``load_state`` reads.

    Interrupted at any moment, it leaves the file as it was, or complete.

    Raises:
        ValueError: the name of the file has another ending.
    """
    with write_atomically(_check_path(path)) as part:
        write_tensors(part, _named(state))


def load_state(path, model):
    """Read a TextState of this model that ``save_state`` wrote.

    The file is checked against the model's sizes, and for numbers that no state can hold. It does
    not say which weights made the state, and the state is of use with those only.

    Raises:
        FileNotFoundError: no such file.
        ValueError: (CheckpointError) the file is broken, or belongs to a model of other sizes. The
            message lists what does not fit.
    """
    path = _check_path(path)
    tensors = read_tensors(path)
    shape = tensors["logits"].shape if "logits" in tensors else ()
    b = shape[0] if shape else 1  # the file says how many texts, and must say so throughout
    expected = jax.eval_shape(lambda: TextState.empty(model, b))
    compare_tensors(
        path,
        {name: (leaf.shape, leaf.dtype) for name, leaf in _named(expected).items()},
        {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()},
    )
    if b == 0:
        raise CheckpointError(f"{path}: holds no text: its arrays have 0 rows")
    leaves = []
    for name in _named(expected):
        values = np.array(tensors[name].read())  # a copy: the file may change or go away
        if np.issubdtype(values.dtype, np.floating) and not np.isfinite(values).all():
            raise CheckpointError(f"{path}: {name} holds NaN or infinity, as no state does")
        leaves.append(jnp.asarray(values))
    state = jax.tree.unflatten(jax.tree.structure(expected), leaves)
    vocab = model.config.padded_vocab_size
    if not ((0 <= state.last) & (state.last < vocab)).all():
        raise CheckpointError(f"{path}: last must hold token ids in 0 … {vocab - 1}")
    return state


def _check_path(path):
    if Path(path).suffix != ".safetensors":
        raise ValueError(f"{path}: a state is kept in a file whose name ends in .safetensors")
    return Path(path)


def _named(state):
    """The arrays of a TextState by their names in a file: ``layers.0.conv``, …, ``last``."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
