"""Text from a prompt: one parallel pass over the prompt, then one step per token.

The decoding state is all the memory there is, and its size does not grow, so every token costs the
same. After the prompt (``mamba.text.prompt``), three compiled functions draw the tokens: ``_first``
the first, ``_step`` the next, ``_loop`` many. What varies between calls (how many tokens, the
temperature, the end token) is a value to them, not a shape, so they are compiled once.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mamba.text.prompt import padded_length, read_tokens
from mamba.text.request import NO_TOKEN, explain_not_finite, prepare
from mamba.text.sampling import Sampling, penalize, sample
from mamba.text.tokens import check_ids, decode, plain_tokenizer

__all__ = ["Generated", "generate", "stream"]


def generate(
    model,
    *,
    key,
    params,
    tokenizer=None,
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
    num_return_sequences=1,
    return_details=False,
):
    """Continue a prompt, or each prompt of a list, by up to n_tokens_to_gen tokens.

        token_t ~ softmax(logits_t / temperature), penalized and filtered as ``Sampling`` says

    Args:
        model: as ``Mamba.from_pretrained`` returns it.
        key: a JAX random key. The same key gives the same text. Every row and every token draws
            with a key of its own: row i with ``fold_in(key, i)``, a prompt alone as row 0.
        params: the model's parameters.
        tokenizer: one of ``transformers`` or ``tokenizers``. The special tokens that it adds by
            default are added where a text begins. Prompts of token ids need none.
        prompt: a str, or a list of token ids; or a list of several. In a list, no row depends on
            its neighbours: with temperature=0, where no key matters, each continues as it would
            alone.
        n_tokens_to_gen: how many tokens to draw, at most.
        temperature: ≥ 0, divides the logits; 0 takes the likeliest token.
        top_k: only the k likeliest tokens are drawn; None for all.
        top_p: only the fewest likeliest tokens whose probabilities reach p are drawn.
        min_p: only tokens with at least p times the largest probability are drawn.
        repetition_penalty: above 1, tokens of the prompt or generated before become less likely.
        eos_token_id: where this token comes, the text ends, without it; or several such tokens.
            None never ends early.
        stop: a str or several. The text ends before the first that is generated (``TextWriter``).
        state: a TextState from ``read_prompt``. The prompt continues the text that it holds, and
            may be ""; that text is not returned. One text serves any number of prompts.
        num_return_sequences: how many texts continue each prompt, each row with a key of its own.
            Above 1, a list is returned, in which the texts of one prompt stand side by side.
        return_details: whether to return each text as a ``Generated``.

    Returns:
        The prompt followed by its continuation: a str, or a list of ids for a prompt of ids; for a
        list of prompts, a list. Token ids that the model or the tokenizer does not have (padding of
        the embedding) are never drawn.

    Raises:
        ValueError: an empty prompt or list; a tokenizer, parameters or a state that do not fit;
            n_tokens_to_gen < 1; a sampling setting out of range; several texts with temperature=0;
            a stop string without a tokenizer; logits that are NaN or infinite.
        TypeError: an argument of another kind, such as a key that is not one.
    """
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    request = prepare(
        model, key, params, tokenizer, prompt, n_tokens_to_gen, sampling, eos_token_id, stop, state,
        num_return_sequences,
    )  # fmt: skip
    model, params, writers = request.model, request.params, request.writers
    texts, log_probs, left = [""] * len(writers), [], request.n

    read = read_tokens(model, params, request.ids, request.state)
    read = _repeat_rows(read, request.copies)
    carry = _first(read, request.keys, request.limit, request.sampling, return_details)
    drawn, m = jax.tree.map(lambda v: np.asarray(v)[:, None], carry.drawn), 1  # (b, m) each
    while True:
        tokens = np.asarray(drawn.token)[:, :m]  # those drawn last
        if (tokens == NO_TOKEN).any():
            raise ValueError(explain_not_finite(request))
        for i, row in enumerate(tokens.tolist()):
            texts[i] += "".join(map(writers[i].write, row))
        if return_details:
            log_probs.append(np.asarray(drawn.log_prob)[:, :m])
        left -= m
        done = np.array([writer.done for writer in writers])  # (b,)
        if left == 0 or done.all():
            break
        m, settings = min(left, request.at_once), (request.ends, request.limit, request.sampling)
        drawn, carry = _loop(model, params, carry, done, m, *settings, padded_length(m))
    texts = [text + writer.close() for text, writer in zip(texts, writers, strict=True)]

    rows = np.concatenate(log_probs, axis=1) if return_details else [None] * len(texts)  # (b, n)
    results = [_result(*row) for row in zip(request.prompts, texts, writers, rows, strict=True)]
    return results[0] if request.one else results


class Generated(NamedTuple):
    """A text that ``generate`` wrote, and the n tokens that were drawn for it.

    The tokens include the end token, and those of the stop string that ended the text.
    """

    text: str | None  # the prompt and its continuation; None without a tokenizer
    ids: list[int]  # (n,) the tokens drawn
    log_probs: np.ndarray  # (n,) float32: log p of each, as the model gives it, without settings
    ended_by: str  # the argument that ended it: "n_tokens_to_gen", "eos_token_id" or "stop"


def _result(prompt, text, writer, log_probs):
    """What is returned of a row: in its prompt's form, or with log_probs the details."""
    ids = writer.ids
    if log_probs is None and isinstance(prompt, str):
        return prompt + text
    if log_probs is None:
        return check_ids(prompt) + ids[: len(ids) - (writer.ended_by == "eos_token_id")]
    if writer.tokenizer is None:
        whole = None
    else:
        whole = prompt if isinstance(prompt, str) else decode(writer.tokenizer, check_ids(prompt))
        whole += text
    return Generated(whole, ids, log_probs[: len(ids)], writer.ended_by)


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

    Args and Raises: as ``generate``'s, except that there is one prompt, and a tokenizer. Arguments
    are checked at the call, before the first str is asked for.
    """
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    request = prepare(
        model, key, params, plain_tokenizer(tokenizer), prompt, n_tokens_to_gen, sampling,
        eos_token_id, stop, state, 1,
    )  # fmt: skip
    if not request.one:
        raise TypeError("stream continues one prompt, a str or its token ids, got several")
    (writer,) = request.writers

    def texts():
        read = read_tokens(request.model, request.params, request.ids, request.state)
        carry = _first(read, request.keys, request.limit, request.sampling, False)
        for i in range(request.n):
            if i:
                carry = _step(request.model, request.params, carry, request.limit, request.sampling)
            token = int(carry.drawn.token[0])
            if token == NO_TOKEN:
                raise ValueError(explain_not_finite(request))
            text = writer.write(token)
            if writer.done:
                break
            yield text
        else:
            text = writer.close()
        if text:
            yield text

    return texts()


# --- the compiled part ----------------------------------------------------------------------------


class _Drawn(NamedTuple):
    """What was drawn for b rows."""

    token: jax.Array  # (b, …) int32
    log_prob: jax.Array | None  # (b, …) float32, the model's log p of the token; None: not asked


class _Carry(NamedTuple):
    """What one token leaves to the next, for b rows."""

    drawn: _Drawn  # (b,) last, which the model has not read yet
    layers: tuple  # the decoding state before that token
    seen: jax.Array | None  # (b, padded_vocab_size) bool, tokens of the text; None: no penalty
    keys: jax.Array  # (b,) random keys


@functools.partial(jax.jit, static_argnames="scored")
def _first(read, keys, limit, sampling, scored):
    """Draw the first token after the text that a TextState holds -> carry."""
    seen = None if sampling.repetition_penalty is None else read.seen
    return _draw(read.logits, read.layers, seen, keys, limit, sampling, scored)


@functools.partial(jax.jit, static_argnames="model")
def _step(model, params, carry, limit, sampling):
    """Read the token drawn last and draw the next -> carry."""
    (token, log_prob), layers, seen, keys = carry
    logits, layers = model.apply({"params": params}, token[:, None], layers, method="last_logits")
    return _draw(logits, layers, seen, keys, limit, sampling, log_prob is not None)


@functools.partial(jax.jit, static_argnames=("model", "size"))
def _loop(model, params, carry, done, n, ends, limit, sampling, size):
    """Take n ≤ size steps, or fewer once every row is done or has drawn one of the ends (k,).

    -> what was drawn, (b, size), of which the first n count, carry
    """

    def unfinished(loop):
        t, _, done, _ = loop
        return (t < n) & ~done.all()

    def body(loop):
        t, carry, done, drawn = loop
        carry = _step(model, params, carry, limit, sampling)
        done |= (carry.drawn.token[:, None] == ends).any(axis=1)  # (b,)
        return (
            t + 1,
            carry,
            done,
            jax.tree.map(lambda v, now: v.at[:, t].set(now), drawn, carry.drawn),
        )

    drawn = jax.tree.map(lambda v: jnp.zeros((len(v), size), v.dtype), carry.drawn)
    _, carry, _, drawn = jax.lax.while_loop(unfinished, body, (0, carry, done, drawn))
    return drawn, carry


def _draw(logits, layers, seen, keys, limit, sampling, scored):
    """Draw one token per row of logits (b, v), each with a key of its own -> carry."""
    plain = logits
    if seen is not None:
        logits = penalize(logits, seen, sampling.repetition_penalty)
    finite = jnp.isfinite(logits).all(axis=-1)  # (b,)
    allowed = jnp.arange(logits.shape[-1]) < limit  # (v,)
    logits = jnp.where(allowed, logits, -jnp.inf)  # (b, v)

    def draw(key, row):
        key, now = jax.random.split(key)
        return sample(now, row, sampling), key

    if sampling.greedy:
        token = sample(None, logits, sampling)  # (b,)
    else:
        token, keys = jax.vmap(draw)(keys, logits)  # (b,), (b,)
    log_prob = None
    if scored:
        log_p = jax.nn.log_softmax(jnp.where(allowed, plain, -jnp.inf))  # (b, v)
        log_prob = jnp.take_along_axis(log_p, token[:, None], axis=-1)[:, 0]  # (b,)
    token = jnp.where(finite, token, NO_TOKEN)
    if seen is not None:
        seen = seen.at[jnp.arange(len(token)), token].set(True)
    return _Carry(_Drawn(token, log_prob), layers, seen, keys)


def _repeat_rows(read, copies):
    """Each row of a TextState several times, side by side."""
    if copies == 1:
        return read
    return jax.tree.map(lambda leaf: jnp.repeat(leaf, copies, axis=0), read)
