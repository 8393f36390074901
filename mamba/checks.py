"""What a call refuses, in words: shapes, token ids, states, lengths and resets that do not fit.

Shapes and dtypes are known even under ``jit``. Values are not: what depends on them is checked only
outside it.
"""

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["check_lengths", "check_resets", "check_shapes", "check_state", "check_tokens"]


def check_shapes(shapes, **arrays):
    """Raise ValueError unless each array has the shape of its name, and resets are bool.

    Args:
        shapes: {name: shape}.
        arrays: the arrays by name; None for one that this call does without.
    """
    for name, array in arrays.items():
        if array is not None and array.shape != shapes[name]:
            raise ValueError(f"{name} must have shape {shapes[name]}, got {array.shape}")
    resets = arrays.get("resets")
    if resets is not None and resets.dtype != bool:
        raise ValueError(
            f"resets must be bool, True where a new segment starts, got {resets.dtype}"
        )


def check_resets(resets, shape):
    """Raise ValueError unless resets are None, or bool of the shape (b, l) of the tokens."""
    if resets is not None and (resets.shape != shape or resets.dtype != bool):
        raise ValueError(
            f"resets must be bool of shape (b, l) = {shape}, True where a new segment starts, "
            f"got {resets.dtype} of shape {resets.shape}"
        )


def check_tokens(tokens, vocab_size):
    """Raise ValueError unless tokens are integers (b, l), l ≥ 1, in 0 … vocab_size − 1."""
    if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(
            f"tokens must be integers of shape (b, l), got {tokens.dtype} of shape {tokens.shape}"
        )
    if tokens.shape[1] == 0:
        raise ValueError("tokens has length 0: the model needs at least one token to start from")
    if not isinstance(tokens, jax.core.Tracer) and tokens.size:
        values = np.asarray(tokens)  # NumPy: inside jit, even a constant's minimum is traced
        low, high = int(values.min()), int(values.max())
        if low < 0 or high >= vocab_size:
            raise ValueError(
                f"token ids run from {low} to {high}, but this model's vocabulary is "
                f"0 … {vocab_size - 1}: was it another model's tokenizer?"
            )


def check_state(state, initial_state, batch):
    """Raise ValueError unless a state is None, or of the sizes of ``initial_state(batch)``."""
    if state is not None:
        expected = jax.eval_shape(lambda: initial_state(batch))
        if jax.tree.map(jnp.shape, state) != jax.tree.map(jnp.shape, expected):
            raise ValueError(
                f"the state is not one of {batch} rows and this model's sizes, such as "
                f"model.initial_state({batch}) makes and a call with it returns"
            )


def check_lengths(lengths, shape):
    """Raise ValueError unless lengths are None, or b integers in 0 … l, for tokens of (b, l)."""
    if lengths is None:
        return
    b, l = shape
    if jnp.shape(lengths) != (b,) or not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise ValueError(
            f"lengths must be integers of shape ({b},) to fit tokens {shape}, got "
            f"{lengths.dtype} of shape {lengths.shape}"
        )
    if not isinstance(lengths, jax.core.Tracer):
        low, high = int(np.asarray(lengths).min()), int(np.asarray(lengths).max())
        if low < 0 or high > l:
            raise ValueError(f"lengths run from {low} to {high}, but tokens have length {l}")
