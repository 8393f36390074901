"""The published weights give the published outputs. Needs the internet; `make network-test`.

The expected values come from the model cards and tests of others. We did not produce them. Of
Mamba-2 and of the small Falcon-Mamba we know no published output. There the tests ask that the
files load under their real names, and what must hold for the real weights and for no others.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer

from mamba import Mamba, Mamba2Config, generate, load_tokenizer

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


TEXT = (
    "The capital of France is Paris. It is one of the largest cities in Europe, and it has been a "
    "center of trade, science and art for many centuries. The river that runs through the city is "
    "the Seine."
)


def nats_per_token(model, params, ids):
    """The mean surprise of each token after those before it."""
    log_p = jax.nn.log_softmax(model.apply({"params": params}, np.array([ids[:-1]])))
    return -float(jnp.take_along_axis(log_p, np.array([ids[1:]])[..., None], -1).mean())


def logits_by_token(model, params, ids):
    """The same logits, from one token after another."""
    step = jax.jit(lambda token, state: model.apply({"params": params}, token, state))
    state, out = model.initial_state(1), []
    for token in ids:
        logits, state = step(np.array([[token]]), state)
        out.append(logits[0, 0])
    return np.stack(out)


def test_mamba2_130m_in_the_original_format():
    """English is likely to it. Knowing nothing, a model pays 10.8 nats a token."""
    name = "state-spaces/mamba2-130m"
    model, params = Mamba.from_pretrained(name)
    assert model.config == Mamba2Config(d_model=768, n_layer=24, vocab_size=50277)
    assert sum(p.size for p in jax.tree.leaves(params)) == 128_989_632
    ids = load_tokenizer(name).encode(TEXT).ids
    assert nats_per_token(model, params, ids) < 3.5


def test_the_small_falcon_mamba():
    """It is for tests: whole and token by token its logits are the same."""
    name = "tiiuae/falcon-mamba-tiny-dev"
    model, params = Mamba.from_pretrained(name)
    assert model.config.select_norm_eps is not None
    ids = load_tokenizer(name).encode(TEXT).ids[:16]
    whole = np.asarray(model.apply({"params": params}, np.array([ids])))[0]
    assert np.isfinite(whole).all()
    np.testing.assert_allclose(
        logits_by_token(model, params, ids), whole, rtol=1e-4, atol=1e-4 * abs(whole).max()
    )
