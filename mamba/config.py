"""What the configurations of all generations have in common: their checks, and derived sizes."""

import dataclasses
import math
import numbers

import jax.numpy as jnp
import numpy as np

__all__ = ["ModelConfig", "MultiHeadConfig", "check_range"]

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


class ModelConfig:
    """A frozen dataclass of sizes and choices, each field checked by its annotation.

    An int is a size, a float is positive, a dtype is a floating-point one. NumPy's numbers become
    Python's, which ``config.json`` can hold. A generation adds its fields, and two methods, all
    that ``mamba.model`` asks for: ``block(name, axis)`` and ``zero_state(batch)``.

    Raises ValueError for sizes and choices that make no model.
    """

    mlp_width = None  # of the MLP after each block; None: there is none

    def __post_init__(self):
        _check_fields(self)
        if self.dt_min > self.dt_max:
            raise ValueError(f"expected dt_min <= dt_max, got {self.dt_min} and {self.dt_max}")

    @property
    def d_inner(self):
        """Width inside the block, E · d_model."""
        return self.expand * self.d_model

    @property
    def padded_vocab_size(self):
        """Rows of the embedding: vocab_size rounded up to a multiple that suits the hardware."""
        multiple = self.pad_vocab_size_multiple
        return -(-self.vocab_size // multiple) * multiple


class MultiHeadConfig(ModelConfig):
    """A ModelConfig with heads of head_dim channels, of which n_groups groups share B and C."""

    def __post_init__(self):
        super().__post_init__()
        if self.d_inner % self.head_dim:
            raise ValueError(
                f"heads of {self.head_dim} channels do not divide d_inner = {self.d_inner}"
            )
        if self.n_heads % self.n_groups:
            raise ValueError(f"{self.n_groups} groups do not divide {self.n_heads} heads")

    @property
    def n_heads(self):
        """H = d_inner / P."""
        return self.d_inner // self.head_dim


def _check_fields(config):
    for field in dataclasses.fields(config):
        name, kind, value = field.name, field.type, getattr(config, field.name)
        if value is not None:
            kind = {int | None: int, float | None: float}.get(kind, kind)
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


def check_range(config, name):
    """A field that is a range, low and high -> two floats, 0 <= low <= high (which may be ∞).

    Raises ValueError for anything else.
    """
    value = getattr(config, name)
    pair = isinstance(value, tuple | list) and len(value) == 2
    if pair and all(isinstance(v, numbers.Real) and not isinstance(v, bool) for v in value):
        low, high = map(float, value)
        if 0 <= low <= high and math.isfinite(low):
            return low, high
    raise ValueError(f"{name} must hold two numbers, 0 <= low <= high, got {value!r}")
