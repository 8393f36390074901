"""Text from a prompt: one parallel pass over the prompt, then one step per token.

The decoding state is all the memory there is, and its size does not grow, so every token costs the
same. After the prompt (``mamba.text.prompt``), three compiled functions draw the tokens: ``_first``
the first, ``_step`` the next, ``_loop`` many. What varies between calls (how many tokens, the
temperature, the end token) is a value to them, not a shape, so they are compiled once.
"""

import functools
import numbers
import operator
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mamba.model import Mamba
from mamba.text.prompt import encode_prompts, padded_length, read_tokens, upcast_on_cpu
from mamba.text.sampling import Sampling, penalize, sample
from mamba.text.state import TextState
from mamba.text.writer import TextWriter

__all__ = ["generate", "stream"]

STOP_CHECK_EVERY = 16  # tokens drawn between two searches for a stop string


def generate(
    model,
    *,
    key,
    params,
    tokenizer,
    prompt,
    n_tokens_to_gen,
    temperature=1.0,
    top_k=40,
    top_p=None,
    min_p=None,
    repetition_penalty=None,
    eos_token_id=None,
    stop=None,
    state=None,
):
    """Continue a prompt, or each prompt of a list, by up to n_tokens_to_gen tokens.

        token_t ~ softmax(logits_t / temperature), penalized and filtered as ``Sampling`` says

    Args:
        model: as ``Mamba.from_pretrained`` returns it.
        key: a JAX random key. The same key gives the same text. Every row and every token draws
            with a key of its own: row i with ``fold_in(key, i)``, a prompt alone as row 0.
        params: the model's parameters.
        tokenizer: one of ``transformers`` or ``tokenizers``. The special tokens that it adds by
            default are added where a text begins.
        prompt: a str or a list of str. In a list, no row depends on its neighbours: with
            temperature=0, where no key matters, each continues as it would alone.
        n_tokens_to_gen: how many tokens to draw, at most.
        temperature: ≥ 0, divides the logits; 0 takes the likeliest token.
        top_k: only the k likeliest tokens are drawn; None for all.
        top_p: only the fewest likeliest tokens whose probabilities reach p are drawn.
        min_p: only tokens with at least p times the largest probability are drawn.
        repetition_penalty: above 1, tokens of the prompt or generated before become less likely.
        eos_token_id: where this token comes, the text ends, without it. None never ends early.
        stop: a str or several. The text ends before the first that is generated (``TextWriter``).
        state: a TextState from ``read_prompt``. The prompt continues the text that it holds, and
            may be ""; that text is not returned. One text serves any number of prompts.

    Returns:
        The prompt followed by its continuation: a str, or a list of str for a list. Token ids that
        the model or the tokenizer does not have (padding of the embedding) are never drawn.

    Raises:
        ValueError: an empty prompt or list; a tokenizer, parameters or a state that do not fit;
            n_tokens_to_gen < 1; a sampling setting out of range.
        TypeError: an argument of another kind, such as a key that is not one.
    """
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    prompts = [prompt] if isinstance(prompt, str) else prompt
    job = _check(model, key, params, tokenizer, prompts, n_tokens_to_gen, eos_token_id, stop, state)
    texts, left = list(prompts), job.n

    read = read_tokens(job.model, job.params, job.ids, job.state)
    carry = _first(read, job.keys, job.limit, sampling)
    tokens = np.asarray(carry.token)[:, None]  # (b, m): the m tokens drawn last
    while True:
        for i, row in enumerate(tokens.tolist()):
            texts[i] += "".join(map(job.writers[i].write, row))
        left -= tokens.shape[1]
        done = np.array([writer.done for writer in job.writers])  # (b,)
        if left == 0 or done.all():
            break
        m = min(left, job.at_once)
        tokens, carry = _loop(
            job.model, job.params, carry, done, m, job.eos, job.limit, sampling, padded_length(m)
        )
        tokens = np.asarray(tokens)[:, :m]
    texts = [text + writer.close() for text, writer in zip(texts, job.writers, strict=True)]
    return texts[0] if isinstance(prompt, str) else texts


def stream(
    model,
    *,
    key,
    params,
    tokenizer,
    prompt,
    n_tokens_to_gen,
    temperature=1.0,
    top_k=40,
    top_p=None,
    min_p=None,
    repetition_penalty=None,
    eos_token_id=None,
    stop=None,
    state=None,
):
    """Continue one prompt, and yield the text as it grows.

    One str comes per token. It is "" while the end of the text is held back: a character of several
    bytes until it is whole, and what a stop string may begin with until it is known not to be one.
    What is left at the end comes last, as one more str. Joined, they are the continuation that
    ``generate`` gives for the same key; the prompt is not yielded.

    Args and Raises: as ``generate``'s, except that the prompt is a str. Arguments are checked at
    the call, before the first str is asked for.
    """
    if not isinstance(prompt, str):
        raise TypeError(f"stream continues one prompt, a str, got {type(prompt).__name__}")
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    prompts = [prompt]
    job = _check(model, key, params, tokenizer, prompts, n_tokens_to_gen, eos_token_id, stop, state)
    (writer,) = job.writers

    def texts():
        read = read_tokens(job.model, job.params, job.ids, job.state)
        carry = _first(read, job.keys, job.limit, sampling)
        for i in range(job.n):
            if i:
                carry = _step(job.model, job.params, carry, job.limit, sampling)
            text = writer.write(int(carry.token[0]))
            if writer.done:
                break
            yield text
        else:
            text = writer.close()
        if text:
            yield text

    return texts()


# --- the compiled part ----------------------------------------------------------------------------


class _Carry(NamedTuple):
    """What one token leaves to the next, for b rows."""

    token: jax.Array  # (b,) int32, the token drawn last, which the model has not read yet
    layers: tuple  # the decoding state before that token
    seen: jax.Array | None  # (b, padded_vocab_size) bool, tokens of the text; None: no penalty
    keys: jax.Array  # (b,) random keys


@jax.jit
def _first(read, keys, limit, sampling):
    """Draw the first token after the text that a TextState holds -> carry."""
    seen = None if sampling.repetition_penalty is None else read.seen
    return _draw(read.logits, read.layers, seen, keys, limit, sampling)


@functools.partial(jax.jit, static_argnames="model")
def _step(model, params, carry, limit, sampling):
    """Read the token drawn last and draw the next -> carry."""
    token, layers, seen, keys = carry
    logits, layers = model.apply({"params": params}, token[:, None], layers, method="last_logits")
    return _draw(logits, layers, seen, keys, limit, sampling)


@functools.partial(jax.jit, static_argnames=("model", "size"))
def _loop(model, params, carry, done, n, eos, limit, sampling, size):
    """Take n ≤ size steps, or fewer once every row is done or has drawn eos.

    -> tokens (b, size), of which the first n count, carry
    """

    def unfinished(loop):
        t, _, done, _ = loop
        return (t < n) & ~done.all()

    def body(loop):
        t, carry, done, tokens = loop
        carry = _step(model, params, carry, limit, sampling)
        return t + 1, carry, done | (carry.token == eos), tokens.at[:, t].set(carry.token)

    tokens = jnp.zeros((len(carry.token), size), jnp.int32)
    _, carry, _, tokens = jax.lax.while_loop(unfinished, body, (0, carry, done, tokens))
    return tokens, carry


def _draw(logits, layers, seen, keys, limit, sampling):
    """Draw one token per row of logits (b, v), each with a key of its own -> carry."""
    logits = jnp.where(jnp.arange(logits.shape[-1]) < limit, logits, -jnp.inf)  # (b, v)
    if seen is not None:
        logits = penalize(logits, seen, sampling.repetition_penalty)

    def draw(key, row):
        key, now = jax.random.split(key)
        return sample(now, row, sampling), key

    if sampling.greedy:
        token = sample(None, logits, sampling)  # (b,)
    else:
        token, keys = jax.vmap(draw)(keys, logits)  # (b,), (b,)
    if seen is not None:
        seen = seen.at[jnp.arange(len(token)), token].set(True)
    return _Carry(token, layers, seen, keys)


# --- the checks: everything that can be wrong is found before anything is compiled ----------------


class _Job(NamedTuple):
    """The arguments of a call: checked, and in the form that the compiled functions take."""

    model: Mamba  # with the dtype that the backend computes in
    params: Mapping  # in that dtype
    ids: list[list[int]]  # of each prompt, b lists
    state: TextState  # b rows, from which they are read
    keys: jax.Array  # (b,) random keys
    limit: int  # the model and the tokenizer have the token ids 0 … limit − 1
    n: int  # tokens to draw
    at_once: int  # tokens to draw before their text is looked at
    eos: int  # the end token; −1, which no token is, for none
    writers: list[TextWriter]  # one per row


def _check(model, key, params, tokenizer, prompts, n, eos_token_id, stop, state):
    """Check the arguments of ``generate`` and ``stream`` -> _Job."""
    n, stop = _check_count(n), _check_stop(stop)
    if eos_token_id is not None and not isinstance(eos_token_id, numbers.Integral):
        raise TypeError(f"eos_token_id must be one token id, or None, got {eos_token_id!r}")
    tokenizer, ids, state = encode_prompts(model, params, tokenizer, prompts, state)
    model, params = upcast_on_cpu(model, params)
    contexts = [[last] if last >= 0 else [] for last in state.last.tolist()]  # what ids follow
    return _Job(
        model=model,
        params=params,
        ids=ids,
        state=state,
        keys=_row_keys(key, len(ids)),
        limit=min(model.config.vocab_size, max(tokenizer.get_vocab().values()) + 1),
        n=n,
        # Stop strings are searched for in the text, which is made outside the compiled loop.
        at_once=STOP_CHECK_EVERY if stop else n,
        eos=-1 if eos_token_id is None else eos_token_id,
        writers=[
            TextWriter(tokenizer, context + row, eos_token_id, stop)
            for context, row in zip(contexts, ids, strict=True)
        ],
    )


def _check_count(n):
    """The number of tokens as an int."""
    try:
        n = operator.index(n)
    except TypeError:
        raise TypeError(f"n_tokens_to_gen must be an integer, got {n!r}") from None
    if n < 1:
        raise ValueError(f"n_tokens_to_gen must be at least 1, got {n}")
    if n >= 2**31:
        raise ValueError(f"n_tokens_to_gen must be below 2^31, got {n}")
    return n


def _check_stop(stop):
    """The stop strings as a tuple."""
    several = isinstance(stop, Iterable) and not isinstance(stop, str)
    strings = tuple(stop) if several else () if stop is None else (stop,)
    if not all(isinstance(s, str) and s for s in strings):
        raise ValueError(f"stop must be a non-empty str or a list of such, got {stop!r}")
    return strings


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
