"""From a prompt to the state after it: one parallel pass for each slice of the prompt.

A compiled function serves one shape. So prompts are padded on the right to a few lengths. This is
exact: at padding Δ = 0, which leaves the state as it is (``mamba.layers.zero_at_padding``).
"""

import dataclasses
import functools
import numbers
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from mamba.checks import forms
from mamba.model import Mamba
from mamba.text.state import TextState
from mamba.text.tokens import check_ids, encode, plain_tokenizer

__all__ = [
    "encode_prompts",
    "list_prompts",
    "padded_length",
    "read_prompt",
    "read_slice",
    "read_tokens",
    "upcast_on_cpu",
]

PROMPT_SLICE = 2048  # tokens read at once: bounds the memory, and the number of padded lengths


def read_prompt(model, *, params, tokenizer=None, prompt, state=None):
    """Read a prompt, or each prompt of a list, into a TextState from which ``generate`` continues.

    The result has one row per prompt, and the same size whatever was read. It is a value that
    nothing changes: it can be saved (``save_state``) and used any number of times.

    Args:
        model: as ``Mamba.from_pretrained`` returns it.
        params: its parameters.
        tokenizer: one of ``transformers`` or ``tokenizers``. The special tokens that it adds by
            default are added where a text begins. Token ids need none.
        prompt: a str or a list of token ids, or a list of several.
        state: a TextState; the prompt then continues the text that it holds. Reading "a" and then
            "b" is reading "ab", if the tokenizer splits "ab" there. None: the prompt begins a text.

    A long prompt is read in slices of 2048 tokens, so that memory is bounded too. The last slice,
    like a short prompt, is padded on the right to the next power of two, which is exact.

    Raises:
        ValueError: an empty prompt or list; a tokenizer, parameters or a state that do not fit.
        TypeError: an argument of another kind.
    """
    prompts, _ = list_prompts(prompt)
    _, ids, state = encode_prompts(model, params, tokenizer, prompts, state)
    return read_tokens(*upcast_on_cpu(model, params), ids, state)


def read_tokens(model, params, ids, state):
    """Read token ids from a state on, slice by slice.

    Args:
        model: a Mamba.
        params: its parameters.
        ids: b lists of token ids, of any lengths. A row without ids stays as it is.
        state: the TextState, b rows, to continue from.

    Returns:
        The TextState after them.
    """
    longest = max(map(len, ids))
    for start in range(0, longest, PROMPT_SLICE):
        slices = [row[start : start + PROMPT_SLICE] for row in ids]
        lengths = np.array([len(row) for row in slices], np.int32)  # (b,)
        tokens = np.zeros((len(ids), padded_length(int(lengths.max()))), np.int32)  # (b, l)
        for padded, row in zip(tokens, slices, strict=True):
            padded[: len(row)] = row
        state = read_slice(model, params, tokens, lengths, state)
    return state


def padded_length(n):
    """The next power of two, at least 16: programs are compiled for few lengths only."""
    return max(16, 1 << (n - 1).bit_length())


@functools.partial(jax.jit, static_argnames="model")
def read_slice(model, params, tokens, lengths, state):
    """Read right-padded tokens from a TextState on, in one parallel pass.

    Args:
        model: a Mamba.
        params: its parameters.
        tokens: (b, l) integers.
        lengths: (b,) how many tokens of each row are real, possibly 0.
        state: the TextState, b rows, to continue from.

    Returns:
        The TextState after the real tokens; a row without any stays as it is.
    """
    real = jnp.arange(tokens.shape[1]) < lengths[:, None]  # (b, l)
    logits, layers = model.apply(
        {"params": params}, tokens, state.layers, lengths, method="last_logits"
    )
    rows = jnp.arange(tokens.shape[0])  # (b,)
    read_any = lengths > 0  # (b,)
    return TextState(
        layers=layers,
        logits=jnp.where(read_any[:, None], logits, state.logits),
        seen=state.seen.at[rows[:, None], tokens].max(real),
        last=jnp.where(read_any, tokens[rows, lengths - 1], state.last),
    )


def upcast_on_cpu(model, params):
    """The model and its parameters as the backend computes with them: on a CPU, in float32.

    On a CPU, XLA multiplies bfloat16 numbers in float32, and would convert the weights again for
    every token. This converts them once per call. Their values do not change.
    """
    if jax.default_backend() != "cpu" or model.config.dtype == jnp.float32:
        return model, params
    config = dataclasses.replace(model.config, dtype=jnp.float32)
    return model.clone(config=config), jax.tree.map(lambda p: p.astype(jnp.float32), params)


# --- checks ---------------------------------------------------------------------------------------


def list_prompts(prompt):
    """One prompt or several -> the list of them, and whether it was one.

    A prompt is a str, or the token ids of a text: a list, tuple or array of integers.
    """
    prompt = prompt.tolist() if hasattr(prompt, "tolist") else prompt
    of_ids = isinstance(prompt, list | tuple) and prompt and isinstance(prompt[0], numbers.Integral)
    one = isinstance(prompt, str) or bool(of_ids)
    return ([prompt] if one else prompt), one


def encode_prompts(model, params, tokenizer, prompts, state):
    """Check all that a prompt needs, and encode it.

    Args:
        model: must be a Mamba.
        params: must be this model's parameters.
        tokenizer: must encode and decode, with ids that the model has; or None for token ids.
        prompts: must be a non-empty list of str or of lists of token ids, each with at least one
            token where a text begins.
        state: must be None or a TextState of this model, with one row or one per prompt.

    Returns:
        tokenizer: in its plain form (``plain_tokenizer``), or None.
        ids: for each prompt the list of token ids to read.
        state: the TextState of b rows to read them from; the empty one if there was None.

    Raises:
        ValueError, TypeError: what does not fit, in words.
    """
    _check_model(model, params)
    if not isinstance(prompts, list | tuple) or not prompts:
        raise ValueError(
            "prompt must be a str, a list of token ids, or a non-empty list of such, "
            f"got {prompts!r:.80}"
        )
    needed = tokenizer is not None or any(isinstance(prompt, str) for prompt in prompts)
    tokenizer = plain_tokenizer(tokenizer) if needed else None
    begins = state is None
    ids = [_ids(tokenizer, prompt, begins) for prompt in prompts]
    for prompt, row in zip(prompts, ids, strict=True):
        _check_vocabulary(row, prompt, model.config.vocab_size, begins)
    if begins:
        return tokenizer, ids, TextState.empty(model, len(ids))
    return tokenizer, ids, _with_rows(state, model, len(ids))


def _check_model(model, params):
    """Raise unless model is a Mamba and params are parameters of its width and vocabulary."""
    if not isinstance(model, Mamba):
        raise TypeError(f"model must be a Mamba, as from_pretrained returns it, got {model!r:.80}")
    if not isinstance(params, Mapping) or "embedding" not in params:
        raise ValueError(
            "params must be this model's parameters, as in model, params = "
            'Mamba.from_pretrained(...) or params = model.init(key, tokens)["params"]'
        )
    found = [np.shape(leaf) for leaf in jax.tree.leaves(params["embedding"])]
    expected = [(model.config.padded_vocab_size, model.config.d_model)]
    if found != expected:
        raise ValueError(f"params are another model's: an embedding of {found}, not {expected}")
    found = sum(name.startswith("layers_") for name in params)
    if found != model.config.n_layer:
        raise ValueError(f"params are another model's: {found} layers, not {model.config.n_layer}")


def _with_rows(state, model, b):
    """The state with b rows; a single row is repeated."""
    if not isinstance(state, TextState):
        raise TypeError(f"state must be a TextState, as read_prompt returns it, got {type(state)}")
    rows = state.last.shape[0]
    expected = jax.eval_shape(lambda: TextState.empty(model, rows))
    if forms(state) != forms(expected):
        raise ValueError("the state belongs to a model of other sizes, or is not in float32")
    if rows == b:
        return state
    if rows != 1:
        raise ValueError(f"the state holds {rows} texts: give as many prompts, not {b}")
    return jax.tree.map(lambda leaf: jnp.repeat(leaf, b, axis=0), state)


def _ids(tokenizer, prompt, begins):
    """The token ids of a prompt, encoded if it is a text."""
    return encode(tokenizer, prompt, begins) if isinstance(prompt, str) else check_ids(prompt)


def _check_vocabulary(ids, prompt, vocab_size, begins):
    """Raise ValueError for a text without tokens, or with tokens that the model does not have."""
    if not ids and begins:
        raise ValueError(f"the prompt {prompt!r} has no tokens: give at least one to start from")
    if ids and (min(ids) < 0 or max(ids) >= vocab_size):
        whose = "the tokenizer gave" if isinstance(prompt, str) else "the prompt holds"
        raise ValueError(
            f"{whose} token ids from {min(ids)} to {max(ids)}, but the model's vocabulary is "
            f"0 … {vocab_size - 1}: use the tokenizer that the model was trained with"
        )
