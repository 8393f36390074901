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

__all__ = ["generate", "stream"]


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
        eos_token_id: where this token comes, the text ends, without it; or several such tokens.
            None never ends early.
        stop: a str or several. The text ends before the first that is generated (``TextWriter``).
        state: a TextState from ``read_prompt``. The prompt continues the text that it holds, and
            may be ""; that text is not returned. One text serves any number of prompts.

    Returns:
        The prompt followed by its continuation: a str, or a list of str for a list. Token ids that
        the model or the tokenizer does not have (padding of the embedding) are never drawn.

    Raises:
        ValueError: an empty prompt or list; a tokenizer, parameters or a state that do not fit;
            n_tokens_to_gen < 1; a sampling setting out of range; logits that are NaN or infinite.
        TypeError: an argument of another kind, such as a key that is not one.
    """
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    prompts = [prompt] if isinstance(prompt, str) else prompt
    request = prepare(
        model, key, params, tokenizer, prompts, n_tokens_to_gen, eos_token_id, stop, state
    )
    model, params, writers = request.model, request.params, request.writers
    texts, left = list(prompts), request.n

    read = read_tokens(model, params, request.ids, request.state)
    carry = _first(read, request.keys, request.limit, sampling)
    tokens = np.asarray(carry.token)[:, None]  # (b, m): the m tokens drawn last
    while True:
        if (tokens == NO_TOKEN).any():
            raise ValueError(explain_not_finite(request))
        for i, row in enumerate(tokens.tolist()):
            texts[i] += "".join(map(writers[i].write, row))
        left -= tokens.shape[1]
        done = np.array([writer.done for writer in writers])  # (b,)
        if left == 0 or done.all():
            break
        m = min(left, request.at_once)
        tokens, carry = _loop(
            model, params, carry, done, m, request.ends, request.limit, sampling, padded_length(m)
        )
        tokens = np.asarray(tokens)[:, :m]
    texts = [text + writer.close() for text, writer in zip(texts, writers, strict=True)]
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
    request = prepare(
        model, key, params, tokenizer, [prompt], n_tokens_to_gen, eos_token_id, stop, state
    )
    (writer,) = request.writers

    def texts():
        read = read_tokens(request.model, request.params, request.ids, request.state)
        carry = _first(read, request.keys, request.limit, sampling)
        for i in range(request.n):
            if i:
                carry = _step(request.model, request.params, carry, request.limit, sampling)
            token = int(carry.token[0])
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
def _loop(model, params, carry, done, n, ends, limit, sampling, size):
    """Take n ≤ size steps, or fewer once every row is done or has drawn one of the ends (k,).

    -> tokens (b, size), of which the first n count, carry
    """

    def unfinished(loop):
        t, _, done, _ = loop
        return (t < n) & ~done.all()

    def body(loop):
        t, carry, done, tokens = loop
        carry = _step(model, params, carry, limit, sampling)
        done |= (carry.token[:, None] == ends).any(axis=1)  # (b,)
        return t + 1, carry, done, tokens.at[:, t].set(carry.token)

    tokens = jnp.zeros((len(carry.token), size), jnp.int32)
    _, carry, _, tokens = jax.lax.while_loop(unfinished, body, (0, carry, done, tokens))
    return tokens, carry


def _draw(logits, layers, seen, keys, limit, sampling):
    """Draw one token per row of logits (b, v), each with a key of its own -> carry."""
    if seen is not None:
        logits = penalize(logits, seen, sampling.repetition_penalty)
    finite = jnp.isfinite(logits).all(axis=-1)  # (b,)
    logits = jnp.where(jnp.arange(logits.shape[-1]) < limit, logits, -jnp.inf)  # (b, v)

    def draw(key, row):
        key, now = jax.random.split(key)
        return sample(now, row, sampling), key

    if sampling.greedy:
        token = sample(None, logits, sampling)  # (b,)
    else:
        token, keys = jax.vmap(draw)(keys, logits)  # (b,), (b,)
    token = jnp.where(finite, token, NO_TOKEN)
    if seen is not None:
        seen = seen.at[jnp.arange(len(token)), token].set(True)
    return _Carry(token, layers, seen, keys)
