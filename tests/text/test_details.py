"""Prompts of token ids, several texts for one prompt, and what is known of a text's tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mamba import Generated, Mamba, MambaConfig, read_prompt, stream
from mamba.text.sampling import Sampling
from tests.helpers.parameters import random_params

SIZES = {"d_model": 16, "n_layer": 1, "vocab_size": 257, "d_state": 4, "tie_embeddings": False}

PROMPT = "def main("


@pytest.fixture(scope="module")
def pair():
    """One model: nothing here depends on its block."""
    model = Mamba(MambaConfig(**SIZES))
    return model, random_params(model)


@pytest.fixture
def ids(tokenizer):
    return tokenizer.encode(PROMPT).ids


def test_ids_continue_as_their_text_does(go_on, pair, tokenizer, ids):
    """With or without a tokenizer; a list of ids for a list of ids, and the same row by row."""
    text = go_on(PROMPT, temperature=0)
    whole = go_on(ids, temperature=0)
    assert whole[: len(ids)] == ids and len(whole) == len(ids) + 12
    assert tokenizer.decode(whole, skip_special_tokens=False) == text
    assert go_on(ids, temperature=0, tokenizer=None) == whole
    for several in ([ids, [5]], [tuple(ids), np.array([5])]):
        rows = go_on(several, temperature=0, tokenizer=None)
        assert rows == [whole, go_on([5], temperature=0, tokenizer=None)]
    for array in (jnp.array(ids), np.array([ids]), tuple(ids)):
        expected = [whole] if np.ndim(array) == 2 else whole
        assert go_on(array, temperature=0, tokenizer=None) == expected
    assert {type(id) for id in go_on(np.array(ids))} == {int}


def test_ids_in_a_stream_and_after_a_state(go_on, pair, tokenizer, ids, read):
    model, params = pair
    settings = {"params": params, "tokenizer": tokenizer, "key": jax.random.key(1)}
    settings |= {"n_tokens_to_gen": 12, "prompt": ids}
    assert PROMPT + "".join(stream(model, **settings)) == go_on(PROMPT)
    assert "".join(stream(model, **settings | {"state": read(PROMPT), "prompt": ""}))
    state = read_prompt(model, params=params, prompt=ids)
    jax.tree.map(np.testing.assert_array_equal, state, read(PROMPT))
    assert go_on([[]], state=state, tokenizer=None) == [go_on(ids)[len(ids) :]]


def test_several_texts_of_a_prompt(go_on):
    """Those of one prompt stand side by side, each drawn with the key of its row."""
    texts = go_on(PROMPT, num_return_sequences=2)
    assert len(set(texts)) == 2 and texts == go_on([PROMPT] * 2)
    assert texts[0] == go_on(PROMPT) == go_on(PROMPT, num_return_sequences=1)
    assert go_on([PROMPT], num_return_sequences=np.int64(1)) == texts[:1]
    assert go_on([PROMPT, "x"], num_return_sequences=2) == go_on([PROMPT, PROMPT, "x", "x"])


def log_probabilities(pair, ids, drawn):
    """The log of the model's probabilities for the drawn tokens, by one pass over all of them."""
    model, params = pair
    row = np.array([ids + drawn[:-1]])
    padded = np.zeros((1, 64), np.int32)  # one length to compile
    padded[:, : row.shape[1]] = row
    logits = np.float64(model.apply({"params": params}, padded)[0, : row.shape[1]])
    logits = logits[len(ids) - 1 :, : model.config.vocab_size]
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return log_p[np.arange(len(drawn)), drawn]


@pytest.mark.parametrize(
    "settings",
    [{"temperature": 0}, {"temperature": 0.3, "top_k": 5, "repetition_penalty": 3.0, "stop": "☃"}],
)
def test_log_probabilities_are_the_models(pair, go_on, ids, settings):
    """Whatever the settings: a second reading of the text gives the same, to float32's digits."""
    one = go_on(PROMPT, return_details=True, **settings)
    assert isinstance(one, Generated) and one.text == go_on(PROMPT, **settings)
    assert one.ended_by == "n_tokens_to_gen" and len(one.ids) == 12
    np.testing.assert_allclose(one.log_probs, log_probabilities(pair, ids, one.ids), atol=2e-5)
    bare = go_on(ids, return_details=True, **settings | {"stop": None}, tokenizer=None)
    assert bare.text is None and bare.ids == one.ids
    np.testing.assert_array_equal(bare.log_probs, one.log_probs)
    assert go_on(ids, return_details=True, **settings).text == one.text


def test_what_ended_a_text(go_on, tokenizer):
    """Details stop where the text does, whatever the other rows do."""
    whole = go_on([PROMPT, "x"], temperature=0, return_details=True)
    drawn = whole[0].ids
    end = next(id for id in drawn[3:] if id not in whole[1].ids)
    n = drawn.index(end) + 1
    cut, other = go_on([PROMPT, "x"], temperature=0, return_details=True, eos_token_id=end)
    assert (cut.ids, cut.ended_by) == (drawn[:n], "eos_token_id")
    np.testing.assert_allclose(cut.log_probs, whole[0].log_probs[:n], atol=1e-5)
    assert cut.text == PROMPT + tokenizer.decode(drawn[: n - 1], skip_special_tokens=False)
    assert other.ids == whole[1].ids and other.ended_by == "n_tokens_to_gen"
    start = tokenizer.encode(PROMPT).ids
    without = go_on(start, temperature=0, eos_token_id=end, tokenizer=None)
    assert without == start + drawn[: n - 1]

    stop = whole[0].text[len(PROMPT) + 2 :][:2]
    cut = go_on(PROMPT, temperature=0, return_details=True, stop=stop)
    assert cut.ended_by == "stop" and cut.text == whole[0].text.split(stop)[0]
    assert cut.ids == drawn[: len(cut.ids)] and len(cut.log_probs) == len(cut.ids) < 12


def test_a_top_k_of_the_whole_vocabulary_is_none(go_on, pair):
    """The table has more rows than the model has tokens: that must not show."""
    model, _ = pair
    vocab = model.config.vocab_size
    assert vocab < model.config.padded_vocab_size
    texts = {go_on(PROMPT, top_k=k) for k in (None, vocab, vocab + 1, 10**6)}
    assert len(texts) == 1


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"prompt": [1, 2.0]}, TypeError, "token ids must hold integers only, got 2.0"),
        ({"prompt": [1, True]}, TypeError, "token ids must hold integers only, got True"),
        ({"prompt": [[1], "a"], "tokenizer": None}, TypeError, "must be a tokenizer, .* got None"),
        ({"prompt": [1, -1]}, ValueError, "the prompt holds token ids from -1 to 1, but"),
        ({"prompt": [10**6]}, ValueError, "the prompt holds token ids from 1000000 to 1000000"),
        ({"prompt": [[1], []]}, ValueError, r"the prompt \[\] has no tokens"),
        ({"prompt": [{}]}, TypeError, "must be a str or a list of token ids, got dict"),
        ({"prompt": [1], "tokenizer": None, "stop": "a"}, ValueError, "give the tokenizer"),
        ({"prompt": "a", "num_return_sequences": 0}, ValueError, "num_return_sequences must be at"),
        ({"prompt": "a", "num_return_sequences": 10**9}, ValueError, "10{9} texts at once are too"),
        ({"prompt": "a", "num_return_sequences": 2, "temperature": 0}, ValueError, "one text, not"),
    ],
)
def test_what_does_not_fit(go_on, change, error, message):
    with pytest.raises(error, match=message):
        go_on(**change)


def test_a_stream_needs_a_tokenizer(pair):
    model, params = pair
    settings = {"params": params, "prompt": [1], "n_tokens_to_gen": 1, "key": jax.random.key(0)}
    with pytest.raises(TypeError, match="tokenizer must be a tokenizer"):
        stream(model, tokenizer=None, **settings)


def test_without_details_nothing_is_added(pair):
    """The program of a plain call takes no logarithm of probabilities."""
    from mamba.text import generate as module

    model, params = pair
    state, greedy = read_prompt(model, params=params, prompt=[1]), Sampling(temperature=0)
    keys = jax.random.split(jax.random.key(0), 1)

    def program(scored):
        carry = module._first(state, keys, 257, greedy, scored)
        return module._step.lower(model, params, carry, 257, greedy).as_text()

    assert "stablehlo.log " in program(True) and "stablehlo.log " not in program(False)
