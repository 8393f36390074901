"""Text from a prompt: one parallel pass over the prompt, then one step per token.

The decoding state is all the memory there is, and its size does not grow, so every token costs the
same. Three compiled functions do the work: ``_read`` a prompt, ``_loop`` to the end, or one
``_step``. What varies between calls (the prompt's length, how many tokens, the temperature, the end
token) is a value to them rather than a shape, so they are compiled once and not once per prompt.
"""

import functools
import operator
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from mamba.sampling import check_sampling, sample

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
    eos_token_id=None,
):
    """Continue a prompt, or each prompt of a list, by up to n_tokens_to_gen tokens.

        token_t ~ softmax(logits_t / temperature), filtered by top_k and top_p (``mamba.sampling``)

    model, params: as ``Mamba.from_pretrained`` returns them.   key: a JAX random key; the same key
    gives the same text, and every row and token draws with a key of its own.   tokenizer: one of
    ``transformers`` or ``tokenizers``, with the special tokens it adds to a prompt by default.
    prompt: str -> str, list of str -> list of str: each prompt followed by its continuation. In a
    list, no row depends on its neighbours: row i draws with ``fold_in(key, i)``, a prompt alone as
    row 0; with temperature=0, where no key matters, each continues as it would alone.
    eos_token_id: where this token comes, the text ends, without it; None never ends early.

    Tokens that the model or the tokenizer does not have (padding of the embedding) are never drawn.
    Raises ValueError or TypeError for an empty prompt or list, a tokenizer that does not fit the
    model, n_tokens_to_gen < 1, sampling settings out of range, or what is not a key or parameters.
    """
    prompts = [prompt] if isinstance(prompt, str) else prompt
    contexts, inputs, n, temperature, tokenizer = _prepare(
        model, key, params, tokenizer, prompts, n_tokens_to_gen, temperature, top_k, top_p
    )
    token, carry = _read(model, params, *inputs, temperature, top_k=top_k, top_p=top_p)
    eos = -1 if eos_token_id is None else eos_token_id  # no token is -1
    rows = _loop(
        model, params, token, carry, n, eos, temperature, size=_bucket(n), top_k=top_k, top_p=top_p
    )  # (b, size)
    rows = np.asarray(rows)[:, :n].tolist()
    texts = [
        start + "".join(_pieces(tokenizer, context, row, eos_token_id))
        for start, context, row in zip(prompts, contexts, rows, strict=True)
    ]
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
    eos_token_id=None,
):
    """Continue one prompt, yielding the text as it grows; arguments and errors as ``generate``'s.

    The prompt itself is not yielded. One piece comes per token, "" while the tokens so far end
    inside a character of several bytes, which is held back until it is whole (if it never is, what
    decoding makes of it comes last, as one more piece). Joined, the pieces are the continuation
    that ``generate`` gives for the same key. Arguments are checked at the call, not later.
    """
    if not isinstance(prompt, str):
        raise TypeError(f"stream continues one prompt, a str, got {type(prompt).__name__}")
    (context,), inputs, n, temperature, tokenizer = _prepare(
        model, key, params, tokenizer, [prompt], n_tokens_to_gen, temperature, top_k, top_p
    )

    def tokens():
        token, carry = _read(model, params, *inputs, temperature, top_k=top_k, top_p=top_p)
        yield int(token[0])
        for _ in range(n - 1):
            token, carry = _step(model, params, token, carry, temperature, top_k=top_k, top_p=top_p)
            yield int(token[0])

    return _pieces(tokenizer, context, tokens(), eos_token_id)


# --- the compiled part: token is (b,), carry = (decoding state, keys (b,), vocabulary limit ()) --


@functools.partial(jax.jit, static_argnames=("model", "top_k", "top_p"))
def _read(model, params, tokens, lengths, keys, limit, temperature, *, top_k, top_p):
    """Read right-padded prompts (b, l) in one parallel pass and draw the first token of each."""
    state = model.initial_state(tokens.shape[0])
    logits, state = model.apply({"params": params}, tokens, state, lengths, method="last_logits")
    token, keys = _draw(keys, logits, limit, temperature, top_k, top_p)
    return token, (state, keys, limit)


@functools.partial(jax.jit, static_argnames=("model", "top_k", "top_p"))
def _step(model, params, token, carry, temperature, *, top_k, top_p):
    """Read the token drawn last, draw the next: the state goes in, the state comes out."""
    state, keys, limit = carry
    logits, state = model.apply({"params": params}, token[:, None], state, method="last_logits")
    token, keys = _draw(keys, logits, limit, temperature, top_k, top_p)
    return token, (state, keys, limit)


@functools.partial(jax.jit, static_argnames=("model", "size", "top_k", "top_p"))
def _loop(model, params, token, carry, n, eos, temperature, *, size, top_k, top_p):
    """Step until there are n tokens or every row has met eos -> (b, size), of which n are meant."""
    rows = jnp.zeros((token.shape[0], size), jnp.int32).at[:, 0].set(token)

    def unfinished(loop):
        t, _, done, _, _ = loop
        return (t < n) & ~done.all()

    def body(loop):
        t, token, done, rows, carry = loop
        token, carry = _step(model, params, token, carry, temperature, top_k=top_k, top_p=top_p)
        return t + 1, token, done | (token == eos), rows.at[:, t].set(token), carry

    return jax.lax.while_loop(unfinished, body, (1, token, token == eos, rows, carry))[3]


def _draw(keys, logits, limit, temperature, top_k, top_p):
    """One token per row of logits (b, v), each with a key of its own -> tokens (b,), next keys."""
    logits = jnp.where(jnp.arange(logits.shape[-1]) < limit, logits, -jnp.inf)  # (b, v)
    if temperature is None:  # greedy, see _prepare
        return sample(None, logits, temperature=0), keys

    def draw(key, row):
        key, now = jax.random.split(key)
        return sample(now, row, temperature=temperature, top_k=top_k, top_p=top_p), key

    return jax.vmap(draw)(keys, logits)


# --- before and after ---------------------------------------------------------------------------


def _bucket(n):
    """The next power of two, at least 16: few sizes to compile for, and at most twice the work."""
    return max(16, 1 << (n - 1).bit_length())


def _prepare(model, key, params, tokenizer, prompts, n, temperature, top_k, top_p):
    """Check everything that can be wrong, and make arrays of it before anything is compiled.

    Returns the prompts' token ids, what `_read` takes of them (tokens, lengths, keys, limit), n,
    the temperature (None if greedy, which is another program; all others share one), a tokenizer.
    """
    check_sampling(temperature, top_k, top_p)
    n = operator.index(n)
    if n < 1:
        raise ValueError(f"n_tokens_to_gen must be at least 1, got {n}")
    if not isinstance(params, Mapping) or "embedding" not in params:
        raise ValueError(
            "params must be this model's parameters, as in model, params = "
            'Mamba.from_pretrained(...) or params = model.init(key, tokens)["params"]'
        )
    # transformers wraps a tokenizers.Tokenizer, and may tidy up spaces when it decodes; a stream
    # cannot take back a space that it has shown, so both kinds are used in the plain form.
    tokenizer = getattr(tokenizer, "backend_tokenizer", tokenizer)
    limit = min(model.config.vocab_size, max(tokenizer.get_vocab().values()) + 1)
    if not isinstance(prompts, list | tuple) or not prompts:
        raise ValueError(f"prompt must be a str or a non-empty list of str, got {prompts!r}")
    contexts = [_encode(tokenizer, prompt, model.config.vocab_size) for prompt in prompts]

    b, longest = len(contexts), max(map(len, contexts))
    tokens = np.zeros((b, _bucket(longest)), np.int32)  # (b, l), padded on the right
    for row, context in zip(tokens, contexts, strict=True):
        row[: len(context)] = context
    lengths = np.array([len(context) for context in contexts], np.int32)  # (b,)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(_check_key(key), np.arange(b))  # (b,)
    temperature = jnp.float32(temperature) if temperature else None
    return contexts, (tokens, lengths, keys, limit), n, temperature, tokenizer


def _check_key(key):
    """The key in JAX's newer, typed form; jax.random.PRNGKey still makes the older one."""
    if isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jnp.uint32) and key.ndim == 1:
        key = jax.random.wrap_key_data(key)
    if (
        not isinstance(key, jax.Array)
        or not jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
        or key.shape != ()
    ):
        raise TypeError(f"key must be one random key, such as jax.random.key(0), got {key!r}")
    return key


def _encode(tokenizer, prompt, vocab_size):
    """The prompt's token ids, checked against the model's vocabulary."""
    if not isinstance(prompt, str):
        raise TypeError(f"a prompt must be a str, got {type(prompt).__name__}")
    prompt.encode()  # not text at all (bytes of another encoding)? this error says where
    ids = tokenizer.encode(prompt)
    ids = getattr(ids, "ids", ids)  # tokenizers' Encoding, or the list itself
    if not ids:
        raise ValueError(f"the prompt {prompt!r} has no tokens: give at least one to start from")
    if min(ids) < 0 or max(ids) >= vocab_size:
        raise ValueError(
            f"the tokenizer gave token ids up to {max(ids)}, but the model's vocabulary is "
            f"0 … {vocab_size - 1}: use the tokenizer that the model was trained with"
        )
    return ids


def _pieces(tokenizer, context, tokens, eos_token_id):
    """Turn tokens into text as they come, up to eos.

    A token's text depends on its neighbours (half a character, or a space that only a word's
    beginning gets), so what is new is the difference of two decodings. Decoding from the last shown
    piece on suffices, and keeps the cost of a token the same however long the text.
    """

    def decode(ids):
        return tokenizer.decode(ids, skip_special_tokens=False)

    window, shown = list(context), decode(context)
    n_shown = len(window)  # tokens of the window whose text was shown
    text = shown
    for token in tokens:
        if token == eos_token_id:
            break
        window.append(token)
        text = decode(window)
        if text.endswith("\ufffd"):  # an unfinished character
            yield ""
            continue
        yield text[len(shown) :]
        window = window[n_shown:]
        n_shown, shown = len(window), decode(window)
        text = shown
    if len(text) > len(shown):
        yield text[len(shown) :]
