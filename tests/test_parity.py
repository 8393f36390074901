"""Comparison with transformers' PyTorch models, live: new random weights in every form of file.

Deselected by default. `make parity` installs PyTorch and runs it. All numbers are float32.
"""

import shutil

import jax
import numpy as np
import pytest

from mamba import Mamba, generate

pytestmark = pytest.mark.parity

FORMS = [
    "transformers",
    "transformers-untied",
    "transformers-sharded",
    "original-bin",
    "original-safetensors",
    "transformers-falcon",
    "transformers-falcon-7b",
    "transformers-mamba2",
    "transformers-mamba2-codestral",
    "original-mamba2-bin",
    "original-mamba2-safetensors",
]
LENGTHS = [1, 7, 37, 64]


@pytest.fixture(scope="module")
def reference_models():
    try:
        from tests.helpers import reference_models
    except ModuleNotFoundError as error:
        pytest.fail(f"{error}: the parity tests need PyTorch and transformers; run `make parity`")
    return reference_models


@pytest.fixture(scope="module", params=FORMS)
def pair(request, reference_models, tmp_path_factory):
    """(transformers' model, our model, our params), by way of files."""
    theirs = reference_models.reference(request.param, seed=1000 + FORMS.index(request.param))
    folder = tmp_path_factory.mktemp(request.param)
    reference_models.save(theirs, request.param, folder)
    ours, params = Mamba.from_pretrained(folder)
    shutil.rmtree(folder)  # the parameters do not depend on the files any more
    return theirs, ours, params


def test_the_forms_are_all(reference_models):
    assert list(reference_models.SHAPES) == FORMS


@pytest.mark.parametrize("length", LENGTHS)
def test_logits(pair, reference_models, length):
    theirs, ours, params = pair
    tokens = reference_models.random_tokens(theirs, 3, length, seed=length)
    expected = reference_models.logits(theirs, tokens).numpy()
    found = np.asarray(jax.jit(ours.apply)({"params": params}, tokens.int().numpy()))
    error = np.abs(found - expected).max() / np.abs(expected).max()
    print(f"relative error {error:.1e}")
    assert error < 1e-5


def test_what_we_save_is_what_transformers_wrote(pair, tmp_path):
    """Every tensor bit for bit, under their names: in the original naming, and as they load it."""
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    theirs, ours, params = pair
    ours.save_pretrained(params, tmp_path / "theirs", naming="transformers")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs")
    assert type(loaded) is type(theirs)
    again = [loaded.state_dict()]
    if not ours.config.__dict__.get("select_norm_eps"):  # the original naming has no such model
        ours.save_pretrained(params, tmp_path / "ours")
        tensors = load_file(tmp_path / "ours" / "model.safetensors")
        tensors["backbone.embeddings.weight"] = tensors.pop("backbone.embedding.weight")
        if ours.config.tie_embeddings:
            tensors["lm_head.weight"] = tensors["backbone.embeddings.weight"]
        again.append(tensors)
    expected = theirs.state_dict()
    for found in again:
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert found[name].dtype == tensor.dtype and (found[name] == tensor).all(), name


def test_logits_of_what_they_load(pair, reference_models, tmp_path):
    """What transformers makes of a folder that we saved computes what the first model did."""
    from transformers import AutoModelForCausalLM

    theirs, ours, params = pair
    ours.save_pretrained(params, tmp_path, naming="transformers")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    tokens = reference_models.random_tokens(theirs, 2, 23, seed=9)
    expected = reference_models.logits(theirs, tokens)
    assert (reference_models.logits(loaded, tokens) - expected).abs().max() < 1e-6


class Numbers:
    """A tokenizer whose text is the token ids themselves, so that texts compare token for token."""

    def __init__(self, size):
        self.size = size

    def get_vocab(self):
        return {str(i): i for i in range(self.size)}

    def encode(self, text):
        return [int(word) for word in text.split()]

    def decode(self, ids, **_):
        return "".join(f" {i}" for i in ids)


def test_greedy_generation(pair, reference_models):
    theirs, ours, params = pair
    tokenizer = Numbers(ours.config.vocab_size)
    tokens = reference_models.random_tokens(theirs, 1, 9, seed=5) % ours.config.vocab_size
    expected = reference_models.greedy(theirs, tokens, 30, ours.config.vocab_size)[0].tolist()
    prompt = tokenizer.decode(tokens[0].tolist())
    text = generate(
        ours,
        key=jax.random.PRNGKey(0),
        params=params,
        tokenizer=tokenizer,
        prompt=prompt,
        n_tokens_to_gen=30,
        temperature=0,
    )
    assert text == prompt + tokenizer.decode(expected)
