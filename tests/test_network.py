"""The published weights give the published outputs. Needs the internet; `make network-test`.

The expected values come from the model cards, tests and records of others. We did not produce them.
Of Mamba-2 and of the small Falcon-Mamba we know no published output. There the tests ask that the
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


# Of state-spaces/mamba3-{siso,mimo}-187m in bfloat16, from the official code on a GPU: the first 64
# of 256 random token ids, the likeliest next token after each of them, and the logarithm of the sum
# of the exponentials of all logits after every eighth. Recorded in the repository that
# tests/test_kernel_records.py names (MIT), in model_forward.npz.
# fmt: off
RANDOM_IDS = [
    541, 97, 191, 172, 553, 604, 103, 733, 842, 633, 190, 717, 798, 284, 678, 208, 164, 611,
    922, 191, 912, 457, 451, 275, 734, 937, 376, 202, 807, 739, 990, 935, 114, 947, 140, 766,
    272, 777, 854, 14, 126, 858, 131, 476, 348, 291, 505, 853, 768, 533, 365, 943, 107, 565,
    602, 462, 257, 899, 349, 775, 799, 757, 725, 429,
]
LIKELIEST = {
    "siso": [
        11, 11, 11, 101, 71, 72, 320, 72, 198, 281, 8, 13, 198, 220, 315, 798, 254, 220, 611,
        198, 798, 791, 25, 611, 374, 53, 367, 284, 82, 16, 284, 259, 284, 451, 103, 84, 284,
        220, 284, 15, 259, 14, 104, 198, 16, 198, 279, 198, 198, 198, 198, 198, 198, 77, 220,
        220, 220, 220, 275, 220, 198, 220, 275, 40,
    ],
    "mimo": [
        11, 11, 1029, 254, 64, 64, 11, 311, 198, 11, 11, 13, 198, 220, 315, 405, 254, 220, 220,
        198, 284, 791, 220, 284, 284, 284, 1122, 11, 82, 198, 284, 284, 198, 12, 103, 284, 282,
        66, 198, 15, 272, 66, 104, 198, 16, 198, 272, 198, 198, 198, 71, 198, 198, 66, 220, 198,
        220, 66, 198, 198, 198, 220, 198, 40,
    ],
}
# fmt: on
LOG_SUM_EXP = {
    "siso": [14.3, 15.02, 23.18, 19.38, 13.53, 14.3, 15.5, 16.29],
    "mimo": [24.05, 16.55, 28.76, 17.48, 13.09, 11.52, 15.56, 17.33],
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["siso", "mimo"])
def test_mamba3_187m_against_the_official_code(kind, dtype):
    """Two runs of the official code agree on the likeliest token at 98.8 % (SISO) and 95.3 % (MIMO)
    of 256 places: of 64, on all but 0.8 and 3.0, give or take 0.9 and 1.7. So 9 may differ.

    A rounding to bfloat16 errs by 0.11 %, root mean square. About ten in each of 24 branches make
    1.7 % of the features, if they are independent, and so of the logits. The largest logit nearly
    is such a sum. So 3 % of the largest sum leaves room for a place where it is more.
    """
    name = f"state-spaces/mamba3-{kind}-187m"
    model, params = Mamba.from_pretrained(name, dtype=dtype)
    count = sum(p.size for p in jax.tree.leaves(params))
    assert count == {"siso": 186_849_600, "mimo": 187_291_968}[kind]
    logits = np.asarray(model.apply({"params": params}, np.array([RANDOM_IDS])))[0]  # (64, vocab)
    assert (np.argmax(logits, axis=-1) != LIKELIEST[kind]).sum() <= 9
    sums = np.asarray(jax.nn.logsumexp(logits, axis=-1))[::8]
    expected = np.array(LOG_SUM_EXP[kind])
    np.testing.assert_allclose(sums, expected, rtol=0, atol=0.03 * expected.max())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_mamba3_187m_continues_the_capital(dtype):
    """A third party reports " of the state of" for SISO, without its token ids.

    So the prompt is tried with the token at which texts begin, and without it. Ids are those of
    Llama 3.1, whose tokenizer the hub gives only to those who ask for access.
    """
    begin, the_capital, of_the_state_of = 128000, [791, 6864], [315, 279, 1614, 315]
    model, params = Mamba.from_pretrained("state-spaces/mamba3-siso-187m", dtype=dtype)
    step = jax.jit(lambda params, *args: model.apply({"params": params}, *args))
    found = []
    for prompt in (the_capital, [begin, *the_capital]):
        logits, state = step(params, np.array([prompt]), model.initial_state(1))
        ids = []
        for _ in of_the_state_of:
            ids.append(int(logits[0, -1].argmax()))
            logits, state = step(params, np.array([ids[-1:]]), state)
        found.append(ids)
    assert of_the_state_of in found
