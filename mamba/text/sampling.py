"""From logits to a token: a penalty for repetition, temperature, top-k, top-p, min-p, and a draw.

    p_i ∝ exp(logit_i / temperature), over the candidates that the three filters leave

The filters are functions from logits to logits: what they reject becomes −inf, whose exp is 0. Two
of them speak of candidates in falling order, because they ask how far down a ranking to go:
``keep_top_k`` makes the ranking, ``keep_top_p`` reads it. ``keep_min_p`` needs none.
"""

import dataclasses
import math
import numbers

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

__all__ = ["Sampling", "keep_min_p", "keep_top_k", "keep_top_p", "penalize", "sample"]


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. None disables a setting.

    The settings apply in the order penalty, temperature, top-k, top-p, min-p. Each filter works on
    what the one before it left. A compiled function takes all settings as one argument: other
    values of temperature, min_p and repetition_penalty run the same program; another top_k or
    top_p, or another choice of what is disabled, compiles a new one.

    Raises:
        ValueError: a setting is out of range. The message says which, and the range.
    """

    temperature: float = 1.0  # divides the logits: below 1 sharper, above 1 flatter, 0 is greedy
    top_k: int | None = None  # keeps the k likeliest tokens (Fan et al., 2018)
    top_p: float | None = None  # keeps the fewest that together reach p (Holtzman et al., 2020)
    min_p: float | None = None  # keeps p times the likeliest's, or more (Nguyen et al., 2025)
    repetition_penalty: float | None = None  # above 1: what the text holds becomes less likely

    def __post_init__(self):
        for name, value in vars(self).items():
            if value is not None or name == "temperature":
                _check(name, value)
        # What changes nothing is disabled, so that it costs nothing. All numbers become floats,
        # because JAX compiles another program for an int.
        no_effect = {"temperature": None, "top_p": 1, "min_p": 0, "repetition_penalty": 1}
        for name, neutral in no_effect.items():
            value = getattr(self, name)
            value = None if value is None or value == neutral else float(value)
            object.__setattr__(self, name, value)

    @property
    def greedy(self):
        """Whether the likeliest token is taken, the first of equals, without a draw."""
        return isinstance(self.temperature, float) and self.temperature == 0  # 0 is never traced


def sample(key: Array, logits: Float[Array, "*b v"], sampling: Sampling):
    """Draw a token id from each row of logits.

    Args:
        key: a random key; greedy sampling does not use it.
        logits: (v,) or (b, v), computed with in float32 whatever their dtype; −inf forbids a token.
        sampling: all settings but the penalty, which also depends on the text (``penalize``).

    Returns:
        ids: () or (b,), int32.
    """
    logits = jnp.asarray(logits, jnp.float32)  # (..., v)
    if sampling.greedy:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)  # (...,)

    # Only differences count. Below the largest logit, a tiny temperature cannot overflow.
    logits = (logits - logits.max(axis=-1, keepdims=True)) / sampling.temperature  # (..., v)
    ids, vocab_size = None, logits.shape[-1]
    k = min(sampling.top_k or vocab_size, vocab_size)
    if k < vocab_size or sampling.top_p is not None:
        logits, ids = keep_top_k(logits, k)  # (..., k)
    if sampling.top_p is not None:
        logits = keep_top_p(logits, sampling.top_p)  # (..., k)
    if sampling.min_p is not None:
        logits = keep_min_p(logits, sampling.min_p)  # (..., k)
    choice = jax.random.categorical(key, logits)  # (...,), an index into the candidates
    if ids is not None:
        choice = jnp.take_along_axis(ids, choice[..., None], axis=-1)[..., 0]
    return choice.astype(jnp.int32)


def keep_top_k(logits: Float[Array, "*b v"], k: int):
    """The k largest logits, in falling order, and their token ids.

    logits: (..., v) -> values (..., k), ids (..., k). Exactly k: of equal logits the lower id wins.
    A k beyond the vocabulary keeps everything (and is a full sort). Raises ValueError for k < 1.
    """
    _check("top_k", k)
    return jax.lax.top_k(logits, min(k, logits.shape[-1]))


def keep_top_p(logits: Float[Array, "*b k"], p: float):
    """The nucleus: −inf for all but the fewest leading candidates whose probability reaches p.

        candidate i stays  ⇔  Σ_{j<i} softmax(logits)_j < p

    so the first one always stays. logits: (..., k) in falling order, as ``keep_top_k`` returns them
    -> (..., k). Raises ValueError for p outside (0, 1].
    """
    _check("top_p", p)
    probabilities = jax.nn.softmax(logits, axis=-1)  # (..., k)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities  # (..., k)
    return jnp.where((before < p) | (p == 1), logits, -jnp.inf)


def keep_min_p(logits: Float[Array, "*b k"], p: float | Float[Array, ""]):
    """−inf for every candidate less than p times as probable as the likeliest one.

        candidate i stays  ⇔  exp(logit_i − max_j logit_j) ≥ p

    so the likeliest always stays, with p = 1 it and its equals only, with p = 0 all. logits:
    (..., k) in any order -> (..., k). Raises ValueError for p outside [0, 1] (unless traced).
    """
    if not isinstance(p, jax.core.Tracer):
        _check("min_p", p)
    odds = jnp.exp(logits - logits.max(axis=-1, keepdims=True))  # (..., k)
    return jnp.where(odds >= p, logits, -jnp.inf)


def penalize(
    logits: Float[Array, "*b v"], seen: Bool[Array, "*b v"], penalty: float | Float[Array, ""]
):
    """Make the tokens that the text already holds less likely; before the temperature.

        logit_i ← logit_i / penalty  if logit_i > 0,  logit_i · penalty  otherwise,  where seen_i

    logits: (..., v).   seen: (..., v), True for those tokens.   penalty > 0: above 1 discourages
    repetition, below 1 invites it, 1 changes nothing. -> (..., v). Source: Keskar et al. (2019),
    §4.1, who divide; for negative logits, where dividing would reward, transformers multiplies.
    Raises ValueError for a penalty that is not positive (unless traced).
    """
    if not isinstance(penalty, jax.core.Tracer):
        _check("repetition_penalty", penalty)
    penalized = jnp.where(logits > 0, logits / penalty, logits * penalty)  # (..., v)
    return jnp.where(seen, penalized, logits)


# --- the ranges of the settings, and a Sampling as a pytree -------------------------------------

TINY = float(jnp.finfo(jnp.float32).tiny)  # less is 0 to a processor

_RANGES = {  # setting: (whether a value lies in its range, the range in words)
    "temperature": (
        lambda v: v == 0 or TINY <= v < math.inf,
        f"be 0 (greedy) or a number from {TINY:.1e} up",
    ),
    "top_k": (
        lambda v: isinstance(v, numbers.Integral) and not isinstance(v, bool) and v >= 1,
        "be a whole number from 1 up, or None for all",
    ),
    "top_p": (lambda v: 0 < v <= 1, "lie in (0, 1], or be None for no limit"),
    "min_p": (lambda v: 0 <= v <= 1, "lie in [0, 1], or be None for no limit"),
    "repetition_penalty": (
        lambda v: 0 < v < math.inf,
        "be a number above 0 (1 or None: no penalty)",
    ),
}


def _check(name, value):
    """Raise ValueError if a setting is out of its range, as NaN is, or not a number."""
    lies_in_range, words = _RANGES[name]
    try:
        good = bool(lies_in_range(value))
    except TypeError:  # not a number
        good = False
    if not good:
        raise ValueError(f"{name} must {words}, got {value!r}")


def _flatten(sampling):
    """A Sampling -> the values that a compiled function is given, and what it is compiled for."""
    temperature = None if sampling.greedy else sampling.temperature
    values = temperature, sampling.min_p, sampling.repetition_penalty
    return values, (sampling.top_k, sampling.top_p)


def _unflatten(compiled_for, values):
    """The way back, without the checks: inside a compiled function the values are not known."""
    (temperature, min_p, repetition_penalty), (top_k, top_p) = values, compiled_for
    sampling = object.__new__(Sampling)
    vars(sampling).update(
        temperature=0.0 if temperature is None else temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
    )
    return sampling


jax.tree_util.register_pytree_node(Sampling, _flatten, _unflatten)
