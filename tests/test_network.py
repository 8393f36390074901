"""The published weights give the published outputs. Needs the internet; `make network-test`.

The expected values come from the model cards and tests of others. We did not produce them.
"""

import jax
import numpy as np
import pytest
from tokenizers import Tokenizer

from mamba import Mamba, generate, load_tokenizer
from mamba.mamba2 import Mamba2Config

pytestmark = pytest.mark.network


@pytest.fixture(scope="module")
def small():
    """state-spaces/mamba-130m-hf: transformers' naming, safetensors."""
    return Mamba.from_pretrained("state-spaces/mamba-130m-hf")


def test_370m_in_the_original_format():
    name = "state-spaces/mamba-370m"
    model, params = Mamba.from_pretrained(name)
    text = generate(
        model,
        key=jax.random.PRNGKey(0),
        params=params,
        tokenizer=load_tokenizer(name),
        prompt="Mamba is the",
        n_tokens_to_gen=40,
        temperature=0,
    )
    assert text == (
        "Mamba is the first game to be released on the Nintendo Switch. It is a side-scrolling "
        "platformer that is set in a futuristic world where the player must fight against the evil "
        "forces of the Mamba"
    )


def test_130m_continues(small):
    model, params = small
    tokenizer = load_tokenizer("state-spaces/mamba-130m-hf")
    assert isinstance(tokenizer, Tokenizer)
    text = generate(
        model,
        key=jax.random.PRNGKey(0),
        params=params,
        tokenizer=tokenizer,
        prompt="Hey how are you doing?",
        n_tokens_to_gen=10,
        temperature=0,
    )
    assert text == "Hey how are you doing?\n\nI'm so glad you're here."


def test_130m_first_logits(small):
    """At position 0 of the same prompt. 0.05 is what differs between kinds of hardware."""
    model, params = small
    ids = load_tokenizer("state-spaces/mamba-130m-hf").encode("Hey how are you doing?").ids
    logits = np.asarray(model.apply({"params": params}, np.array([ids])))[0, 0, :4]
    expected = np.array([-55.6909, -69.7903, -49.8981, -51.7581])
    np.testing.assert_allclose(logits, expected, rtol=1e-3, atol=0.05)


def mean_loss(model, params, ids):
    """Nats per token of a text that begins anywhere."""
    tokens = np.array([ids], np.int32)
    log_p = jax.nn.log_softmax(model.apply({"params": params}, tokens[:, :-1]))
    return -float(log_p[0, np.arange(len(ids) - 1), tokens[0, 1:]].mean())


def test_mamba2_130m_in_the_original_format():
    """Nobody has published its outputs: it knows its language, and counts as many parameters."""
    model, params = Mamba.from_pretrained("state-spaces/mamba2-130m")
    assert model.config == Mamba2Config(d_model=768, n_layer=24, vocab_size=50277)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 128_989_632
    text = "The capital of France is Paris, and the capital of Germany is Berlin."
    ids = load_tokenizer("state-spaces/mamba-130m-hf").encode(text).ids
    assert mean_loss(model, params, ids) < 4  # as initialized: 10.8
    assert mean_loss(model, params, ids[::-1]) > 6


def test_falcon_mamba_tiny():
    """Its published form: the norms of Falcon-Mamba, and the same logits token by token."""
    model, params = Mamba.from_pretrained("tiiuae/falcon-mamba-tiny-dev")
    assert model.config.select_norm_eps is not None
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (1, 12), np.int32)
    logits = np.asarray(model.apply({"params": params}, tokens))
    state, step = model.initial_state(1), jax.jit(model.apply)
    for i in range(12):
        one, state = step({"params": params}, tokens[:, i : i + 1], state)
        assert np.abs(one[0, 0] - logits[0, i]).max() < 1e-4 * np.abs(logits).max()
