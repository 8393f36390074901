"""What a call refuses, in words: settings, shapes, token ids, states, lengths and resets.

Shapes and dtypes are known even under ``jit``. Values are not: what depends on them is checked only
outside it.
"""

import dataclasses
import numbers

import jax
import jax.numpy as jnp
import numpy as np

__all__ = [
    "check_axes",
    "check_config",
    "check_lengths",
    "check_resets",
    "check_shapes",
    "check_state",
    "check_tokens",
    "forms",
]


_FIELDS = {  # annotation: (whether a value is of that kind, the kind in words)
    bool: (lambda v: isinstance(v, bool | np.bool_), "True or False"),
    int: (
        lambda v: isinstance(v, numbers.Integral) and not isinstance(v, bool) and 1 <= v < 2**31,
        "a whole number, at least 1 and below 2^31",
    ),
    float: (
        lambda v: isinstance(v, numbers.Real) and not isinstance(v, bool) and 0 < v < 1e9,
        "a number above 0 and below 1e9",
    ),
}


def check_config(config):
    """Raise ValueError unless each field of a configuration is what its annotation says.

    An int is a size, a float is positive, a dtype is a floating-point one. NumPy's numbers become
    Python's, which ``config.json`` can hold.
    """
    for field in dataclasses.fields(config):
        name, kind, value = field.name, field.type, getattr(config, field.name)
        if kind == int | None and value is not None:
            kind = int
        if name == "dtype":
            _check_floating(value)
        elif kind in _FIELDS:
            admits, words = _FIELDS[kind]
            if not admits(value):
                raise ValueError(f"{name} must be {words}, got {value!r}")
            object.__setattr__(config, name, kind(value))


def _check_floating(dtype):
    """Raise ValueError unless it names a floating-point dtype."""
    try:
        good = jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
    except TypeError:
        good = False
    if not good:
        raise ValueError(f"dtype must be a floating-point dtype such as jnp.float32, got {dtype!r}")


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


def check_shapes(shapes, **arrays):
    """Raise unless each array has the shape of its name, of real numbers, and resets are bool.

    Args:
        shapes: {name: shape}.
        arrays: the arrays by name; None for one that this call does without.

    Raises:
        ValueError: another shape.
        TypeError: another kind of numbers: integers would be rounded to, complex ones cut short.
    """
    for name, array in arrays.items():
        if array is None:
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
    check_shapes({"resets": shape}, resets=resets)


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
