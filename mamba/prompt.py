"""A prompt -> the state after it: one parallel pass, whatever the prompt's length, compiled once.

A compiled function serves one shape. So prompts are padded on the right to few lengths, and that is
exact: a pad has Δ = 0, which leaves the state as it is (``MambaBlock``).
"""

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from mamba.model import Mamba
from mamba.state import TextState

__all__ = ["bucket", "encode_prompts", "read_prompt", "read_tokens", "widen"]

PIECE = 2048  # tokens read at once: bounds the memory, and the number of padded lengths


def read_prompt(model, *, params, tokenizer, prompt, state=None):
    """Read a prompt, or each of a list, into a TextState, from which ``generate`` can go on.

    Arguments as ``generate``'s; with a state, the text that it holds is continued by the prompt
    (reading "a" and then "b" is reading "ab", if the tokenizer splits "ab" there). The result has
    one row per prompt, a fixed size whatever was read, and may be saved (``save_state``) or used
    any number of times: it is a value, nothing changes it.

    A long prompt is read in pieces of 2048 tokens, so that memory is bounded too; the last piece,
    like a short prompt, is padded on the right to the next power of two. That is exact: a pad has
    Δ = 0, which leaves the state as it is. Errors as ``generate``'s.
    """
    prompts = [prompt] if isinstance(prompt, str) else prompt
    _, ids, state = encode_prompts(model, params, tokenizer, prompts, state)
    return read_tokens(*widen(model, params), ids, state)


def read_tokens(model, params, ids, state):
    """Read each row's token ids from the state on -> TextState. Reads nothing if there is none."""
    longest = max(map(len, ids))
    for start in range(0, longest, PIECE):
        pieces = [row[start : start + PIECE] for row in ids]
        lengths = np.array([len(piece) for piece in pieces], np.int32)  # (b,)
        tokens = np.zeros((len(ids), bucket(int(lengths.max()))), np.int32)  # (b, l)
        for row, piece in zip(tokens, pieces, strict=True):
            row[: len(piece)] = piece  # padded on the right
        state = _read(model, params, tokens, lengths, state)
    return state


def widen(model, params):
    """The model and its weights as the backend computes with them: on a CPU, in float32.

    On a CPU, XLA multiplies bfloat16 numbers in float32: it would convert the weights again for
    every token. Here they are converted once a call; what they are worth does not change.
    """
    if jax.default_backend() != "cpu" or model.config.dtype == jnp.float32:
        return model, params
    config = dataclasses.replace(model.config, dtype=jnp.float32)
    return model.clone(config=config), jax.tree.map(lambda p: p.astype(jnp.float32), params)


def bucket(n):
    """The next power of two, at least 16: few sizes to compile for, and at most twice the work."""
    return max(16, 1 << (n - 1).bit_length())


@functools.partial(jax.jit, static_argnames="model")
def _read(model, params, tokens, lengths, state):
    """Read right-padded tokens (b, l), none of them in some rows perhaps, from a TextState on."""
    real = jnp.arange(tokens.shape[1]) < lengths[:, None]  # (b, l)
    logits, layers = model.apply(
        {"params": params}, tokens, state.layers, lengths, method="last_logits"
    )
    rows = jnp.arange(tokens.shape[0])
    some = lengths > 0  # (b,)
    return TextState(
        layers=layers,
        logits=jnp.where(some[:, None], logits, state.logits),
        seen=state.seen.at[rows[:, None], tokens].max(real),
        last=jnp.where(some, tokens[rows, lengths - 1], state.last),
    )


def encode_prompts(model, params, tokenizer, prompts, state):
    """Check the model, the prompts and the state -> tokenizer, ids of each prompt, state of b rows.

    The ids are what is to be read after the state; without one, it is the empty one.
    """
    if not isinstance(model, Mamba):
        raise TypeError(f"model must be a Mamba, as from_pretrained returns it, got {model!r:.80}")
    if not isinstance(params, Mapping) or "embedding" not in params:
        raise ValueError(
            "params must be this model's parameters, as in model, params = "
            'Mamba.from_pretrained(...) or params = model.init(key, tokens)["params"]'
        )
    held = [np.shape(leaf) for leaf in jax.tree.leaves(params["embedding"])]
    wanted = (model.config.padded_vocab_size, model.config.d_model)
    if held != [wanted]:
        raise ValueError(f"params are another model's: an embedding of {held}, not {[wanted]}")
    # transformers wraps a tokenizers.Tokenizer, and may tidy up spaces when it decodes; a stream
    # cannot take back a space that it has shown, so both kinds are used in the plain form.
    tokenizer = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if not all(hasattr(tokenizer, name) for name in ("encode", "decode", "get_vocab")):
        raise TypeError(
            f"tokenizer must be one, as load_tokenizer returns it, got {tokenizer!r:.80}"
        )
    if not isinstance(prompts, list | tuple) or not prompts:
        raise ValueError(f"prompt must be a str or a non-empty list of str, got {prompts!r}")
    begins = state is None
    ids = [_encode(tokenizer, prompt, model.config.vocab_size, begins) for prompt in prompts]
    if begins:
        return tokenizer, ids, TextState.empty(model, len(ids))
    return tokenizer, ids, _rows_of(state, model, len(ids))


def _rows_of(state, model, b):
    """The state with b rows, those of a single text repeated."""
    if not isinstance(state, TextState):
        raise TypeError(f"state must be a TextState, as read_prompt returns it, got {type(state)}")
    rows = state.last.shape[0]
    fits = jax.eval_shape(lambda: TextState.empty(model, rows))
    if jax.tree.map(np.shape, state) != jax.tree.map(np.shape, fits):
        raise ValueError("the state is that of a model of other sizes")
    if rows == b:
        return state
    if rows != 1:
        raise ValueError(f"the state holds {rows} texts: give as many prompts, not {b}")
    return jax.tree.map(lambda leaf: jnp.repeat(leaf, b, axis=0), state)


def _encode(tokenizer, prompt, vocab_size, begins):
    """The prompt's token ids, checked against the model's vocabulary."""
    if not isinstance(prompt, str):
        raise TypeError(f"a prompt must be a str, got {type(prompt).__name__}")
    prompt.encode()  # not text at all (bytes of another encoding)? this error says where
    # The special tokens that a tokenizer adds belong where a text begins.
    ids = tokenizer.encode(prompt) if begins else tokenizer.encode(prompt, add_special_tokens=False)
    ids = getattr(ids, "ids", ids)  # tokenizers' Encoding, or the list itself
    if not ids and begins:
        raise ValueError(f"the prompt {prompt!r} has no tokens: give at least one to start from")
    if ids and (min(ids) < 0 or max(ids) >= vocab_size):
        raise ValueError(
            f"the tokenizer gave token ids up to {max(ids)}, but the model's vocabulary is "
            f"0 … {vocab_size - 1}: use the tokenizer that the model was trained with"
        )
    return ids
