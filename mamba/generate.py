"""Text from a prompt: one parallel pass over the prompt, then one step per token.

The decoding state is all the memory there is, and its size does not grow, so every token costs the
same. After the prompt (``mamba.prompt``), three compiled functions do the work: ``_first`` token,
then ``_loop`` to the end, or one ``_step``. What varies between calls (how many tokens, the
temperature, the end token) is a value to them rather than a shape, so they are compiled once.
"""

import dataclasses
import functools
import numbers
import operator
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np

from mamba.prompt import bucket, encode_prompts, read_tokens, widen
from mamba.sampling import check_sampling, penalize, sample
from mamba.text import TextWriter

__all__ = ["generate", "stream"]

BLOCK = 16  # tokens generated between two looks for a stop string


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

        token_t ~ softmax(logits_t / temperature), penalized and filtered as ``mamba.sampling`` says

    model, params: as ``Mamba.from_pretrained`` returns them.   key: a JAX random key; the same key
    gives the same text, and every row and token draws with a key of its own.   tokenizer: one of
    ``transformers`` or ``tokenizers``, with the special tokens it adds to a prompt by default.
    prompt: str -> str, list of str -> list of str: each prompt followed by its continuation. In a
    list, no row depends on its neighbours: row i draws with ``fold_in(key, i)``, a prompt alone as
    row 0; with temperature=0, where no key matters, each continues as it would alone.
    repetition_penalty: on every token of the prompt and of what was generated (``penalize``).
    eos_token_id: where this token comes, the text ends, without it; None never ends early.
    stop: a str or several; the text ends before the first that is generated (``TextWriter``).
    state: of a text read before, by ``read_prompt``: prompt then follows that text, and may be "".
    The state's text is not returned. A state of one text serves any number of prompts.

    Tokens that the model or the tokenizer does not have (padding of the embedding) are never drawn.
    Raises ValueError or TypeError for an empty prompt or list, a tokenizer or a state that does not
    fit, n_tokens_to_gen < 1, sampling settings out of range, or what is not a key or parameters.
    """
    settings = _settings(temperature, top_k, top_p, min_p, repetition_penalty)
    n, stop = _check_count(n_tokens_to_gen), _check_stop(stop)
    prompts = [prompt] if isinstance(prompt, str) else prompt
    tokenizer, ids, state = encode_prompts(model, params, tokenizer, prompts, state)
    model, params = widen(model, params)
    keys, limit = _row_keys(key, len(ids)), _vocabulary_limit(model, tokenizer)
    writers = _writers(tokenizer, ids, state, eos_token_id, stop)
    results = list(prompts)

    eos = -1 if eos_token_id is None else eos_token_id  # no token is -1
    token, carry = _first(read_tokens(model, params, ids, state), keys, limit, settings)
    block = np.asarray(token)[:, None]  # (b, m): the m tokens drawn last
    while True:
        for i, row in enumerate(block.tolist()):
            results[i] += "".join(map(writers[i].write, row))
        n -= block.shape[1]
        done = np.array([writer.done for writer in writers])  # (b,)
        if n == 0 or done.all():
            break
        # Stop strings are text, and text is made here, not in the compiled loop. So with them the
        # loop comes back after a few tokens: what it computed in vain is less than one block.
        m = min(n, BLOCK) if stop else n
        rows, token, carry = _loop(
            model, params, token, carry, done, m, eos, limit, settings, size=bucket(m)
        )
        block = np.asarray(rows)[:, :m]
    results = [text + writer.close() for text, writer in zip(results, writers, strict=True)]
    return results[0] if isinstance(prompt, str) else results


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
    """Continue one prompt, yielding the text as it grows; arguments and errors as ``generate``'s.

    The prompt itself is not yielded. One piece comes per token, "" while the end of the text is
    held back: a character of several bytes until it is whole, and what a stop string may begin with
    until it is known not to be one. What is left at the end comes last, as one more piece. Joined,
    the pieces are the continuation that ``generate`` gives for the same key. Arguments are checked
    at the call, not later.
    """
    if not isinstance(prompt, str):
        raise TypeError(f"stream continues one prompt, a str, got {type(prompt).__name__}")
    settings = _settings(temperature, top_k, top_p, min_p, repetition_penalty)
    n, stop = _check_count(n_tokens_to_gen), _check_stop(stop)
    tokenizer, ids, state = encode_prompts(model, params, tokenizer, [prompt], state)
    model, params = widen(model, params)
    keys, limit = _row_keys(key, 1), _vocabulary_limit(model, tokenizer)
    (writer,) = _writers(tokenizer, ids, state, eos_token_id, stop)

    def pieces():
        token, carry = _first(read_tokens(model, params, ids, state), keys, limit, settings)
        for i in range(n):
            if i:
                token, carry = _step(model, params, token, carry, limit, settings)
            piece = writer.write(int(token[0]))
            if writer.done:
                break
            yield piece
        else:
            piece = writer.close()
        if piece:
            yield piece

    return pieces()


# --- the compiled part: token (b,), carry = (layers' states, tokens seen or None, keys (b,)) -----


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["temperature", "min_p", "repetition_penalty"],
    meta_fields=["top_k", "top_p"],  # these shape the program
)
@dataclasses.dataclass(frozen=True)
class _Settings:
    """How to draw. None is off, and costs nothing: it is another program. Temperature None: greedy.

    All other values share one program, but for top_k and top_p.
    """

    temperature: jax.Array | None
    min_p: jax.Array | None
    repetition_penalty: jax.Array | None
    top_k: int | None
    top_p: float | None


@jax.jit
def _first(state, keys, limit, settings):
    """Draw the first token after what was read."""
    seen = None if settings.repetition_penalty is None else state.seen
    return _draw(state.logits, (state.layers, seen, keys), limit, settings)


@functools.partial(jax.jit, static_argnames="model")
def _step(model, params, token, carry, limit, settings):
    """Read the token drawn last, draw the next: the state goes in, the state comes out."""
    layers, seen, keys = carry
    logits, layers = model.apply({"params": params}, token[:, None], layers, method="last_logits")
    return _draw(logits, (layers, seen, keys), limit, settings)


@functools.partial(jax.jit, static_argnames=("model", "size"))
def _loop(model, params, token, carry, done, n, eos, limit, settings, *, size):
    """n ≤ size steps, fewer once every row is done or has met eos.

    -> tokens drawn (b, size), of which n are meant, the last token, carry
    """

    def unfinished(loop):
        t, _, _, done, _ = loop
        return (t < n) & ~done.all()

    def body(loop):
        t, token, carry, done, rows = loop
        token, carry = _step(model, params, token, carry, limit, settings)
        return t + 1, token, carry, done | (token == eos), rows.at[:, t].set(token)

    rows = jnp.zeros((token.shape[0], size), jnp.int32)
    start = (0, token, carry, done, rows)
    _, token, carry, _, rows = jax.lax.while_loop(unfinished, body, start)
    return rows, token, carry


def _draw(logits, carry, limit, settings):
    """One token per row of logits (b, v), each with a key of its own -> tokens (b,), carry."""
    layers, seen, keys = carry
    logits = jnp.where(jnp.arange(logits.shape[-1]) < limit, logits, -jnp.inf)  # (b, v)
    if seen is not None:
        logits = penalize(logits, seen, settings.repetition_penalty)

    def draw(key, row):
        key, now = jax.random.split(key)
        filters = {"top_k": settings.top_k, "top_p": settings.top_p, "min_p": settings.min_p}
        return sample(now, row, temperature=settings.temperature, **filters), key

    if settings.temperature is None:
        token = sample(None, logits, temperature=0)  # (b,)
    else:
        token, keys = jax.vmap(draw)(keys, logits)
    if seen is not None:
        seen = seen.at[jnp.arange(token.shape[0]), token].set(True)
    return token, (layers, seen, keys)


# --- before: everything that can be wrong is checked before anything is compiled -----------------


def _settings(temperature, top_k, top_p, min_p, repetition_penalty):
    """The settings, checked, as the compiled functions take them."""
    check_sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    return _Settings(
        temperature=jnp.float32(temperature) if temperature else None,
        min_p=jnp.float32(min_p) if min_p else None,
        repetition_penalty=(
            None if repetition_penalty in (None, 1) else jnp.float32(repetition_penalty)
        ),
        top_k=top_k,
        top_p=top_p,
    )


def _check_count(n):
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


def _vocabulary_limit(model, tokenizer):
    """Token ids from here on do not exist: the model or the tokenizer does not have them."""
    return min(model.config.vocab_size, max(tokenizer.get_vocab().values()) + 1)


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


def _writers(tokenizer, ids, state, eos_token_id, stop):
    """A TextWriter for each row, which knows the tokens before the first one."""
    if eos_token_id is not None and not isinstance(eos_token_id, numbers.Integral):
        raise TypeError(f"eos_token_id must be one token id, or None, got {eos_token_id!r}")
    before = [[last] if last >= 0 else [] for last in state.last.tolist()]
    return [
        TextWriter(tokenizer, context + row, eos_token_id, stop)
        for context, row in zip(before, ids, strict=True)
    ]
