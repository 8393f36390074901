"""What a call refuses, in words: shapes, token ids, states, lengths and resets.

Shapes and dtypes are known even under ``jit``. Values are not: what depends on them is checked only
outside it.
"""

import operator

import jax
import jax.numpy as jnp
import numpy as np

__all__ = [
    "check_axes",
    "check_chunk",
    "check_lengths",
    "check_resets",
    "check_shapes",
    "check_state",
    "check_tokens",
    "choose_method",
    "forms",
]


def check_axes(**arrays):
    """Raise unless each array has the axes that are named, none of them empty.

    arrays: name=(array, axes), such as ``x=(x, "b l d")``
    """
    for name, (array, axes) in arrays.items():
        _check_array(name, array)
        axes = axes.split()
        if array.ndim != len(axes) or 0 in array.shape:
            wanted = ", ".join(axes)
            raise ValueError(f"{name} must have shape ({wanted}), all >= 1, got {array.shape}")


def check_shapes(shapes, optional=(), **arrays):
    """Raise unless each array has the shape of its name, of real numbers, and resets are bool.

    Args:
        shapes: {name: shape}.
        optional: names of those that may be None.
        arrays: the arrays by name.

    Raises:
        ValueError: another shape.
        TypeError: no array; another kind of numbers: integers would be rounded to, complex ones cut
            short.
    """
    for name, array in arrays.items():
        if array is None and name in optional:
            continue
        _check_array(name, array)
        if array.shape != shapes[name]:
            raise ValueError(f"{name} must have shape {shapes[name]}, got {array.shape}")
        if name == "resets" and array.dtype != bool:
            raise TypeError(
                f"resets must be bool, True where a new segment starts, got {array.dtype}"
            )
        if name != "resets" and not jnp.issubdtype(array.dtype, jnp.floating):
            raise TypeError(f"{name} must hold floating-point numbers, got {array.dtype}")


def _check_array(name, array):
    if not hasattr(array, "shape") or not hasattr(array, "dtype"):
        raise TypeError(f"{name} must be an array, got {type(array).__name__}")


def check_resets(resets, shape):
    """Raise unless resets are None, or bool of the shape (b, l) of the tokens."""
    check_shapes({"resets": shape}, ["resets"], resets=resets)


def check_chunk(chunk):
    """A number of tokens -> int. Raises ValueError for anything else."""
    try:
        number = 0 if isinstance(chunk, bool) else operator.index(chunk)
    except TypeError:
        number = 0
    if number < 1:
        raise ValueError(f"chunk must be a number of tokens, at least 1, got {chunk!r}")
    return number


def choose_method(method, methods, default, chunk):
    """The method that "auto" stands for, if it is among ``methods`` -> method.

    That is the default, but "chunked" where a chunk is given.

    Raises:
        ValueError: an unknown method, or a chunk for another method than "chunked".
    """
    if method == "auto":
        method = default if chunk is None else "chunked"
    if method not in methods:
        raise ValueError(f"unknown method {method!r}: expected 'auto' or one of {sorted(methods)}")
    if chunk is not None and method != "chunked":
        raise ValueError(f"method {method!r} takes no chunk: only 'chunked' does")
    return method


def check_tokens(tokens, vocab_size):
    """Raise unless tokens are integers (b, l), b and l ≥ 1, in 0 … vocab_size − 1."""
    _check_array("tokens", tokens)
    if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(
            f"tokens must be integers of shape (b, l), got {tokens.dtype} of shape {tokens.shape}"
        )
    if 0 in tokens.shape:
        raise ValueError(
            f"tokens of shape {tokens.shape}: the model needs a row, and a token to start from"
        )
    if not isinstance(tokens, jax.core.Tracer) and tokens.size:
        values = np.asarray(tokens)  # NumPy: inside jit, even a constant's minimum is traced
        low, high = int(values.min()), int(values.max())
        if low < 0 or high >= vocab_size:
            raise ValueError(
                f"token ids run from {low} to {high}, but this model's vocabulary is "
                f"0 … {vocab_size - 1}: was it another model's tokenizer?"
            )


def check_state(state, initial_state, batch):
    """Raise ValueError unless a state is None, or as ``initial_state(batch)``: sizes and dtypes."""
    if state is not None:
        expected = jax.eval_shape(lambda: initial_state(batch))
        if forms(state) != forms(expected):
            raise ValueError(
                f"the state is not one of {batch} rows and this model's sizes in float32, such as "
                f"model.initial_state({batch}) makes and a call with it returns"
            )


def forms(tree):
    """The shape and the dtype of each leaf, in the same tree; None for a leaf that is no array."""
    form = lambda v: (v.shape, np.dtype(v.dtype)) if hasattr(v, "dtype") else None  # noqa: E731
    return jax.tree.map(form, tree)


def check_lengths(lengths, shape):
    """Raise unless lengths are None, or b integers in 0 … l, for tokens of (b, l)."""
    if lengths is None:
        return
    _check_array("lengths", lengths)
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
