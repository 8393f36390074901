"""A text that was read, as a value: what to keep of it to go on from its end, and on disk.

However long the text, its size is the same. So a long prompt can be read once, kept in a file, and
continued many times.
"""

import os
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from mamba.block import LayerState
from mamba.checkpoint import CheckpointError, read_tensors

__all__ = ["TextState", "load_state", "save_state", "state_bytes"]


class TextState(NamedTuple):
    """b texts that were read, as ``read_prompt`` returns them: all that going on needs.

    The decoding state alone says what the texts do to what comes after; the logits say which token
    comes next, so that it can be drawn with nothing more to read.
    """

    layers: tuple[LayerState, ...]  # the decoding state: (b, …) each, float32
    logits: jax.Array  # (b, padded_vocab_size) float32: after the last token
    seen: jax.Array  # (b, padded_vocab_size) bool: the tokens read, for the repetition penalty
    last: jax.Array  # (b,) int32: the last token read; the text of the next one may depend on it

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

    4 · n_layer · d_inner · (d_conv − 1 + n): per layer the convolution's last inputs and h, float32
    """
    layer = jax.eval_shape(lambda: LayerState.zeros(config, 1))
    return config.n_layer * sum(leaf.size * leaf.dtype.itemsize for leaf in layer)


def save_state(state, path):
    """Write a TextState to a ``.safetensors`` file, which ``load_state`` reads.

    Interrupted at any moment, it leaves the file as it was, or complete. Raises ValueError for
    another ending of the name.
    """
    path = _check_path(path)
    arrays = {name: np.asarray(leaf, order="C") for name, leaf in _named(state).items()}
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            file.write(safetensors.numpy.save(arrays))
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def load_state(path, model):
    """Read a TextState that ``save_state`` wrote, for this model.

    The file is checked against the model's sizes, and its numbers for what no state can hold.
    Which weights made it cannot be seen: a state means something to those only.
    Raises FileNotFoundError for an absent file, and ValueError (CheckpointError) for one that is
    broken or belongs to a model of other sizes; the message lists what does not fit.
    """
    path = _check_path(path)
    tensors = read_tensors(path)
    shape = tensors["logits"].shape if "logits" in tensors else ()
    b = shape[0] if shape else 1  # the file says how many texts, and must say so throughout
    expected = jax.eval_shape(lambda: TextState.empty(model, 1))
    _check_tensors(path, _named(expected), tensors, b)
    leaves = []
    for name in _named(expected):
        values = np.array(tensors[name].read())  # a copy: the file may change or go away
        if np.issubdtype(values.dtype, np.floating) and not np.isfinite(values).all():
            raise CheckpointError(f"{path}: {name} holds NaN or infinity: no state to go on from")
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
    """A TextState's arrays by the name that each has in the file, in the order of its leaves."""
    names = [
        f"layers.{i}.{field}" for i in range(len(state.layers)) for field in LayerState._fields
    ]
    return dict(zip([*names, "logits", "seen", "last"], jax.tree.leaves(state), strict=True))


def _check_tensors(path, expected, found, b):
    """Compare names, shapes and dtypes, before a number is read; the error lists all misfits."""
    wrong = [f"missing: {name}" for name in expected if name not in found]
    for name, tensor in found.items():
        if name not in expected:
            wrong.append(f"unexpected: {name[:100]}")
            continue
        shape, dtype = (b, *expected[name].shape[1:]), expected[name].dtype
        if (tensor.shape, tensor.dtype) != (shape, dtype):
            wrong.append(f"{name}: expected {dtype} {shape}, found {tensor.dtype} {tensor.shape}")
    if wrong or b < 1:
        lines = "\n  ".join(wrong or ["it holds no text at all: its arrays have 0 rows"])
        raise CheckpointError(f"{path}: not a state of this model\n  {lines}")
