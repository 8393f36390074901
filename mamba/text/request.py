"""What a call of ``generate`` asks for: its arguments, checked, in the form that is compiled.

Everything that can be wrong with them is found here, before anything is compiled.
"""

import dataclasses
import numbers
import operator
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mamba.model import Mamba
from mamba.text.prompt import encode_prompts, list_prompts, upcast_on_cpu
from mamba.text.sampling import Sampling
from mamba.text.state import TextState
from mamba.text.writer import TextWriter

__all__ = ["NO_TOKEN", "Request", "explain_not_finite", "prepare"]

NO_TOKEN = -1  # no token's id: what is drawn from logits that are not all finite
MOST_TEXTS = 2**16  # at once
STOP_CHECK_EVERY = 16  # tokens drawn between two searches for a stop string


class Request(NamedTuple):
    """The arguments of a call of ``generate`` or ``stream``, checked."""

    model: Mamba  # with the dtype that the backend computes in
    params: Mapping  # in that dtype
    sampling: Sampling  # how tokens are drawn
    prompts: list  # as given, one for each of b rows
    one: bool  # whether one prompt was given, to be continued once
    ids: list[list[int]]  # of each prompt; copies of a prompt share theirs
    copies: int  # how many rows continue a prompt
    state: TextState  # one row for each prompt, from which they are read
    keys: jax.Array  # (b,) random keys
    limit: int  # the model and the tokenizer have the token ids 0 … limit − 1
    n: int  # tokens to draw
    at_once: int  # tokens to draw before their text is looked at
    ends: np.ndarray  # (k,) int32, the tokens at which a row ends, and NO_TOKEN
    writers: list[TextWriter]  # one per row


def prepare(model, key, params, tokenizer, prompt, n, sampling, eos_token_id, stop, state, copies):
    """Check the arguments of ``generate`` or ``stream`` -> Request.

    Args: as theirs. n is ``n_tokens_to_gen``, and copies is ``num_return_sequences``.
    Raises: as theirs.
    """
    n, copies = _check_count("n_tokens_to_gen", n), _check_count("num_return_sequences", copies)
    if copies > 1 and sampling.greedy:
        raise ValueError(f"temperature = 0 gives one text, not num_return_sequences = {copies}")
    stop, (prompts, one) = _check_stop(stop), list_prompts(prompt)
    tokenizer, ids, state = encode_prompts(model, params, tokenizer, prompts, state)
    if len(ids) * copies > MOST_TEXTS:
        raise ValueError(f"{len(ids) * copies} texts at once are too many: at most {MOST_TEXTS}")
    if stop and tokenizer is None:
        raise ValueError("a stop string is searched for in the text: give the tokenizer")
    ends = _check_ends(eos_token_id, model.config.padded_vocab_size)
    model, params = upcast_on_cpu(model, params)
    contexts = [[last] if last >= 0 else [] for last in state.last.tolist()]  # what ids follow
    limit = model.config.vocab_size
    if tokenizer is not None:
        limit = min(limit, max(tokenizer.get_vocab().values()) + 1)
    if sampling.top_k is not None and sampling.top_k >= limit:
        sampling = dataclasses.replace(sampling, top_k=None)
    return Request(
        model=model,
        params=params,
        sampling=sampling,
        prompts=[prompt for prompt in prompts for _ in range(copies)],
        one=one and copies == 1,
        ids=ids,
        copies=copies,
        state=state,
        keys=_row_keys(key, len(ids) * copies),
        limit=limit,
        n=n,
        # Stop strings are searched for in the text, which is made outside the compiled loop.
        at_once=STOP_CHECK_EVERY if stop else n,
        ends=np.array([NO_TOKEN, *ends], np.int32),
        writers=[
            TextWriter(tokenizer, context + row, ends, stop)
            for context, row in zip(contexts, ids, strict=True)
            for _ in range(copies)
        ],
    )


def explain_not_finite(request):
    """Say where NaN or infinity in the logits comes from -> str, for an error message."""
    for where, tree in (
        ("the parameters hold", request.params),
        ("the state holds", request.state),
    ):
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            if not jnp.isfinite(leaf).all():
                name = jax.tree_util.keystr(path, simple=True, separator=".")
                return f"{where} NaN or infinity: {name}"
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(request.state.layers))
    return (
        "the model's logits are NaN or infinite, though its parameters are finite: they, the "
        f"state (largest number {largest:.1e}) or the repetition penalty are too large"
    )


def _check_count(name, n):
    """The number of tokens, or of texts, as an int."""
    try:
        if isinstance(n, bool):
            raise TypeError
        n = operator.index(n)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {n!r}") from None
    if n < 1:
        raise ValueError(f"{name} must be at least 1, got {n}")
    if n >= 2**31:
        raise ValueError(f"{name} must be below 2^31, got {n}")
    return n


def _check_stop(stop):
    """The stop strings as a tuple."""
    several = isinstance(stop, Iterable) and not isinstance(stop, str)
    strings = tuple(stop) if several else () if stop is None else (stop,)
    if not all(isinstance(s, str) and s for s in strings):
        raise ValueError(f"stop must be a non-empty str or a list of such, got {stop!r}")
    return strings


def _check_ends(eos_token_id, vocab_size):
    """The end tokens as a list of int."""
    if eos_token_id is None:
        return []
    several = isinstance(eos_token_id, Iterable) and not isinstance(eos_token_id, str)
    ends = list(eos_token_id) if several else [eos_token_id]
    for end in ends:
        if not isinstance(end, numbers.Integral) or isinstance(end, bool):
            raise TypeError(f"eos_token_id must be a token id, or several, or None, got {end!r}")
        if not 0 <= end < vocab_size:
            raise ValueError(
                f"eos_token_id {end} is no token of this model: its ids are 0 … {vocab_size - 1}"
            )
    return [int(end) for end in ends]


def _row_keys(key, b):
    """A key for each row (b,), in JAX's newer, typed form; PRNGKey still makes the older one."""
    if isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jnp.uint32) and key.ndim == 1:
        key = jax.random.wrap_key_data(key)
    if (
        not isinstance(key, jax.Array)
        or not jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
        or key.shape != ()
    ):
        raise TypeError(f"key must be one random key, such as jax.random.key(0), got {key!r}")
    return jax.vmap(jax.random.fold_in, (None, 0))(key, np.arange(b))
