"""From logits to a token: a penalty for repetition, temperature, top-k, top-p, min-p, and a draw.

    p_i ∝ exp(logit_i / temperature), over the candidates that the three filters leave

The filters are functions from logits to logits: what they reject becomes −inf, whose exp is 0. Two
of them speak of candidates in falling order, because they ask how far down a ranking to go:
``keep_top_k`` makes the ranking, ``keep_top_p`` reads it. ``keep_min_p`` needs none.
"""

import numbers

import jax
import jax.numpy as jnp

__all__ = ["check_sampling", "keep_min_p", "keep_top_k", "keep_top_p", "penalize", "sample"]


def sample(key, logits, *, temperature=1.0, top_k=None, top_p=None, min_p=None):
    """Draw a token id from each row of logits.

    logits: (v,) or (b, v), computed in float32 whatever their dtype; −inf forbids a token.
    temperature ≥ 0, dividing the logits: below 1 sharper, above 1 flatter; 0 takes the likeliest
    token (the first of equals) and neither filter nor key matters. Under ``jit`` a positive
    temperature and min_p may be traced numbers; top_k and top_p shape the program and may not.
    Then, in this order, each on what the one before it left and None for no limit:
    top_k: only the k likeliest tokens stay (Fan et al., 2018).
    top_p: only the fewest likeliest whose probabilities together reach p (Holtzman et al., 2020).
    min_p: only those at least min_p times as probable as the likeliest (Nguyen et al., 2025).

    Returns ids: () or (b,), int32. Raises ValueError for settings out of range.
    """
    known = [None if isinstance(v, jax.core.Tracer) else v for v in (temperature, min_p)]
    check_sampling(1.0 if known[0] is None else known[0], top_k, top_p, known[1])
    logits = jnp.asarray(logits, jnp.float32)  # (..., v)
    if known[0] == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)  # (...,)

    # Differences are all that counts; from the largest down, a tiny temperature cannot overflow.
    logits = (logits - logits.max(axis=-1, keepdims=True)) / temperature  # (..., v)
    ids = None
    if top_k is not None or top_p not in (None, 1):
        logits, ids = keep_top_k(logits, logits.shape[-1] if top_k is None else top_k)  # (..., k)
    if top_p not in (None, 1):
        logits = keep_top_p(logits, top_p)  # (..., k)
    if min_p is not None:
        logits = keep_min_p(logits, min_p)  # (..., k)
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


def keep_min_p(logits, p):
    """−inf for every candidate less than p times as probable as the likeliest one.

        candidate i stays  ⇔  exp(logit_i − max_j logit_j) ≥ p

    so the likeliest always stays, with p = 1 it and its equals only, with p = 0 all. logits:
    (..., k) in any order -> (..., k). Raises ValueError for p outside [0, 1] (unless traced).
    """
    if not isinstance(p, jax.core.Tracer):
        check_sampling(min_p=p)
    odds = jnp.exp(logits - logits.max(axis=-1, keepdims=True))  # (..., k)
    return jnp.where(odds >= p, logits, -jnp.inf)


def penalize(logits, seen, penalty):
    """Make the tokens that the text already holds less likely; before the temperature.

        logit_i ← logit_i / penalty  if logit_i > 0,  logit_i · penalty  otherwise,  where seen_i

    logits: (..., v).   seen: (..., v), True for those tokens.   penalty > 0: above 1 discourages
    repetition, below 1 invites it, 1 changes nothing. -> (..., v). Source: Keskar et al. (2019),
    §4.1, who divide; for negative logits, where dividing would reward, transformers multiplies.
    Raises ValueError for a penalty that is not positive (unless traced).
    """
    if not isinstance(penalty, jax.core.Tracer):
        check_sampling(repetition_penalty=penalty)
    penalized = jnp.where(logits > 0, logits / penalty, logits * penalty)  # (..., v)
    return jnp.where(seen, penalized, logits)


def check_sampling(temperature=1.0, top_k=None, top_p=None, min_p=None, repetition_penalty=None):
    """Raise ValueError for a setting that is out of range; the message says which, and the range.

    0 ≤ temperature < ∞, top_k ≥ 1, 0 < top_p ≤ 1, 0 ≤ min_p ≤ 1, 0 < repetition_penalty < ∞; None,
    for all but the temperature, means no limit.
    """

    def lies(value, test):
        try:
            return bool(test(value))  # a NaN fails every comparison
        except TypeError:  # not a number at all
            return False

    if not lies(temperature, lambda v: 0 <= v < float("inf")):
        raise ValueError(f"temperature must be a number from 0 (greedy) up, got {temperature!r}")
    if top_k is not None and (not isinstance(top_k, numbers.Integral) or top_k < 1):
        raise ValueError(f"top_k must be a whole number from 1 up, or None for all, got {top_k!r}")
    if top_p is not None and not lies(top_p, lambda v: 0 < v <= 1):
        raise ValueError(f"top_p must lie in (0, 1], or be None for no limit, got {top_p!r}")
    if min_p is not None and not lies(min_p, lambda v: 0 <= v <= 1):
        raise ValueError(f"min_p must lie in [0, 1], or be None for no limit, got {min_p!r}")
    if repetition_penalty is not None and not lies(
        repetition_penalty, lambda v: 0 < v < float("inf")
    ):
        raise ValueError(
            "repetition_penalty must be a number above 0 (1 or None: no penalty), got "
            f"{repetition_penalty!r}"
        )
