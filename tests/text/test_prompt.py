"""Prompts of every length, read at once, in slices and in parts, against one token at a time."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer

import mamba.text.prompt
from mamba.mamba1 import MambaConfig
from mamba.model import Mamba
from mamba.text.prompt import (
    padded_length,
    read_prompt,
    read_slice,
    read_tokens,
    upcast_on_cpu,
)
from mamba.text.state import TextState
from mamba_book.reference import relative_error
from tests.helpers.compilations import count_compilations
from tests.helpers.models import on_the_circle
from tests.helpers.parameters import random_params


def assert_close(a, b, tolerance):
    for x, y in zip(*(jax.tree.leaves(on_the_circle(tree)) for tree in (a, b)), strict=True):
        if jnp.issubdtype(x.dtype, jnp.floating):
            assert relative_error(x, y) < tolerance
        else:
            np.testing.assert_array_equal(x, y)


def ids(n, seed=0):
    return np.random.default_rng(seed).integers(0, 257, n).tolist()


def unpadded(pair, row, state):
    """The state after reading a row as it is, token by token, without lengths and padding."""
    model, params = pair
    layers, seen = state.layers, np.array(state.seen)
    for token in row:
        logits, layers = _last_logits(model, params, np.array([[token]], np.int32), layers)
    seen[0, row] = True
    return TextState(layers, logits, seen, np.array(row[-1:], np.int32))


_last_logits = jax.jit(
    lambda model, params, *args: model.apply({"params": params}, *args, method="last_logits"),
    static_argnums=0,
)


# --- padding and slices ---------------------------------------------------------------------------


def test_padded_lengths():
    lengths = [padded_length(n) for n in (1, 16, 17, 32, 33, 2048)]
    assert lengths == [16, 16, 32, 32, 64, 2048]


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 129])
def test_a_padded_prompt_has_the_state_of_the_bare_one(pair, n):
    model, params = pair
    start = TextState.empty(model, 1)
    # The others' decays are differences of sums, which are large with these parameters.
    tolerance = 1e-6 if isinstance(model.config, MambaConfig) else 2e-5
    found = read_tokens(model, params, [ids(n)], start)
    assert_close(found.layers, unpadded(pair, ids(n), start).layers, tolerance)
    assert_close(found, unpadded(pair, ids(n), start), max(1e-5, tolerance))
    again = read_tokens(model, params, [ids(n, 1)], found)  # and continuing
    assert_close(again.layers, unpadded(pair, ids(n, 1), found).layers, tolerance)


def test_the_token_at_padding_does_not_matter(pair):
    """Whatever token fills up the row: the same state, bit for bit."""
    model, params = pair
    lengths, start = np.array([5]), TextState.empty(model, 1)
    states = []
    for pad in (0, 200):
        tokens = np.full((1, 16), pad, np.int32)
        tokens[0, :5] = ids(5)
        states.append(read_slice(model, params, tokens, lengths, start))
    for a, b in zip(jax.tree.leaves(states[0]), jax.tree.leaves(states[1]), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_ragged_batch_has_the_states_of_its_rows(pair):
    model, params = pair
    rows = [ids(n, n) for n in (1, 40, 3, 17, 16)]
    together = read_tokens(model, params, rows, TextState.empty(model, 5))
    for i, row in enumerate(rows):
        alone = read_tokens(model, params, [row], TextState.empty(model, 1))
        of_row = jax.tree.map(lambda v, i=i: np.asarray(v)[i : i + 1], together)
        assert_close(of_row, alone, 1e-5)


def test_a_long_prompt_is_read_in_slices(pair, monkeypatch):
    model, params = pair
    rows, start = [ids(100), ids(20, 1), ids(33, 2)], TextState.empty(model, 3)
    whole = read_tokens(model, params, rows, start)
    sizes = []

    def spy(model, params, tokens, lengths, state):
        sizes.append((tokens.shape[1], lengths.tolist()))
        return read_slice(model, params, tokens, lengths, state)

    monkeypatch.setattr(mamba.text.prompt, "read_slice", spy)
    monkeypatch.setattr(mamba.text.prompt, "PROMPT_SLICE", 32)
    assert_close(read_tokens(model, params, rows, start), whole, 1e-5)
    assert sizes == [(32, [32, 20, 32]), (32, [32, 0, 1]), (32, [32, 0, 0]), (16, [4, 0, 0])]


def test_twenty_lengths_cause_three_compilations(pair, tokenizer):
    model = Mamba(dataclasses.replace(pair[0].config, norm_eps=3e-5))  # not compiled before
    programs = []  # how many were compiled for each length
    for n in range(1, 61, 3):
        with count_compilations() as compiled:
            read_prompt(model, params=pair[1], tokenizer=tokenizer, prompt="x" * n)
        programs.append(len(compiled))
    assert programs[0] >= 1  # for 16, and what the first call of all needs
    assert sum(programs[1:]) == 2  # for 32 and 64


# --- continuation ---------------------------------------------------------------------------------


@pytest.mark.parametrize("split", [1, 2, 5, 16, 17, 30])
def test_reading_in_two_parts_is_reading_the_whole(read, split):
    text = "def main(argv): return 日本語 1"
    assert_close(read(text[split:], read(text[:split])), read(text), 1e-5)


def test_gradient_through_the_state(pair):
    """Of the loss on later tokens, by what was read before: only the state connects the two."""
    model, params = pair
    row = jnp.array([ids(12)])
    expected = jax.nn.one_hot(jnp.array(ids(6, 1)), 264)

    def in_two(params):
        _, state = model.apply({"params": params}, row[:, :6], model.initial_state(1))
        logits, _ = model.apply({"params": params}, row[:, 6:], state)
        return -(jax.nn.log_softmax(logits[0]) * expected).sum()

    def in_one(params):
        logits = model.apply({"params": params}, row)[:, 6:]
        return -(jax.nn.log_softmax(logits[0]) * expected).sum()

    def cut(params):
        _, state = model.apply({"params": params}, row[:, :6], model.initial_state(1))
        logits, _ = model.apply({"params": params}, row[:, 6:], jax.lax.stop_gradient(state))
        return -(jax.nn.log_softmax(logits[0]) * expected).sum()

    ours, whole, part = jax.jit(lambda p: [jax.grad(f)(p) for f in (in_two, in_one, cut)])(params)
    assert_close(ours, whole, 1e-4)
    part, whole = (v["layers_0"]["mixer"]["in_proj"] for v in (part, whole))
    assert relative_error(part, whole) > 1e-2  # some of the gradient does go through the state


def test_no_special_tokens_in_the_middle_of_a_text(pair, tokenizer):
    from tokenizers.processors import TemplateProcessing

    with_start = Tokenizer.from_str(tokenizer.to_str())
    with_start.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    model, params = pair
    arguments = {"params": params, "tokenizer": with_start}
    state = read_prompt(model, prompt="ab", **arguments)
    state = read_prompt(model, prompt="cd", state=state, **arguments)
    assert_close(state, read_prompt(model, prompt="abcd", **arguments), 1e-5)


def test_states_that_do_not_fit(read, go_on, tokenizer, pair):
    state = read(["a", "b"])
    with pytest.raises(ValueError, match="the state holds 2 texts: give as many prompts, not 3"):
        go_on(["a", "b", "c"], state=state)
    with pytest.raises(ValueError, match="the state holds 2 texts"):
        go_on("a", state=state)
    with pytest.raises(TypeError, match="as read_prompt returns it, got <class 'tuple'>"):
        go_on("a", state=state.layers)
    with pytest.raises(ValueError, match="the prompt '' has no tokens"):
        read("")
    other = Mamba(dataclasses.replace(pair[0].config, d_state=5))
    params = random_params(other)
    with pytest.raises(ValueError, match="the state belongs to a model of other sizes"):
        read_prompt(other, params=params, tokenizer=tokenizer, prompt="a", state=read("a"))


# --- the dtype of the weights ---------------------------------------------------------------------


def test_upcast_on_cpu(pair, tokenizer):
    """In float32, with the values that bfloat16 gave the weights."""
    model, params = pair
    half = model.clone(config=dataclasses.replace(model.config, dtype=jnp.bfloat16))
    rounded = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    assert upcast_on_cpu(model, params) == (model, params)
    upcast, values = upcast_on_cpu(half, rounded)
    assert upcast.config == model.config
    jax.tree.map(np.testing.assert_array_equal, values, rounded)
    assert {leaf.dtype for leaf in jax.tree.leaves(values)} == {jnp.dtype(jnp.float32)}

    state = read_prompt(half, params=rounded, tokenizer=tokenizer, prompt="def")
    expected = read_prompt(upcast, params=values, tokenizer=tokenizer, prompt="def")
    jax.tree.map(np.testing.assert_array_equal, state, expected)
