"""From logits to a token: temperature, top-k, top-p, and a draw.

    p_i ∝ exp(logit_i / temperature), over the candidates that the two filters leave

The filters are functions from logits to logits. Both speak of candidates in falling order, because
both ask how far down a ranking to go: ``keep_top_k`` makes the ranking, ``keep_top_p`` reads it.
"""

import numbers

import jax
import jax.numpy as jnp

__all__ = ["check_sampling", "keep_top_k", "keep_top_p", "sample"]


def sample(key, logits, *, temperature=1.0, top_k=None, top_p=None):
    """Draw a token id from each row of logits.

    logits: (v,) or (b, v), computed in float32 whatever their dtype; −inf forbids a token.
    temperature ≥ 0, dividing the logits: below 1 sharper, above 1 flatter; 0 takes the likeliest
    token (the first of equals) and neither filter nor key matters. Under ``jit`` a positive
    temperature may be a traced number; top_k and top_p shape the program and may not.
    top_k: only the k likeliest tokens stay (Fan et al., 2018). Then top_p: of those only the
    fewest likeliest whose probabilities together reach p (Holtzman et al., 2020). None: no limit.

    Returns ids: () or (b,), int32. Raises ValueError for settings out of range.
    """
    traced = isinstance(temperature, jax.core.Tracer)
    check_sampling(1.0 if traced else temperature, top_k, top_p)
    logits = jnp.asarray(logits, jnp.float32)  # (..., v)
    if not traced and temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)  # (...,)

    # Differences are all that counts; from the largest down, a tiny temperature cannot overflow.
    logits = (logits - logits.max(axis=-1, keepdims=True)) / temperature  # (..., v)
    ids = None
    if top_k is not None or top_p not in (None, 1):
        logits, ids = keep_top_k(logits, logits.shape[-1] if top_k is None else top_k)  # (..., k)
    if top_p not in (None, 1):
        logits = keep_top_p(logits, top_p)  # (..., k)
    choice = jax.random.categorical(key, logits)  # (...,), an index into the candidates
    if ids is not None:
        choice = jnp.take_along_axis(ids, choice[..., None], axis=-1)[..., 0]
    return choice.astype(jnp.int32)


def keep_top_k(logits, k):
    """The k largest logits, in falling order, and their token ids.

    logits: (..., v) -> values (..., k), ids (..., k). Exactly k: of equal logits the lower id wins.
    A k beyond the vocabulary keeps everything (and is a full sort). Raises ValueError for k < 1.
    """
    check_sampling(top_k=k)
    return jax.lax.top_k(logits, min(k, logits.shape[-1]))


def keep_top_p(logits, p):
    """The nucleus: −inf for all but the fewest leading candidates whose probability reaches p.

        candidate i stays  ⇔  Σ_{j<i} softmax(logits)_j < p

    so the first one always stays. logits: (..., k) in falling order, as ``keep_top_k`` returns them
    -> (..., k). Raises ValueError for p outside (0, 1].
    """
    check_sampling(top_p=p)
    probabilities = jax.nn.softmax(logits, axis=-1)  # (..., k)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities  # (..., k)
    return jnp.where((before < p) | (p == 1), logits, -jnp.inf)


def check_sampling(temperature=1.0, top_k=None, top_p=None):
    """Raise ValueError unless 0 ≤ temperature < ∞, top_k ≥ 1 and 0 < top_p ≤ 1 (None: no limit)."""
    if not 0 <= temperature < float("inf"):  # a NaN fails every comparison
        raise ValueError(f"temperature must be a number from 0 (greedy) up, got {temperature}")
    if top_k is not None and (not isinstance(top_k, numbers.Integral) or top_k < 1):
        raise ValueError(f"top_k must be a whole number from 1 up, or None for all, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must lie in (0, 1], or be None for no limit, got {top_p}")
