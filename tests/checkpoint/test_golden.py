"""Our logits and continuations, compared with those of transformers' PyTorch Mamba in files.

scripts/make_goldens.py wrote the files, so PyTorch is not needed. tests/test_parity.py compares the
same things live.
"""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from mamba import Mamba

GOLDEN = Path(__file__).parents[1] / "golden" / "logits"
CASES = sorted(path.name for path in GOLDEN.iterdir())


def relative_error(ours, theirs):
    return float(np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max())


@pytest.fixture(scope="module", params=CASES)
def case(request):
    folder = GOLDEN / request.param
    model, params = Mamba.from_pretrained(folder)
    return model, params, load_file(folder / "reference.safetensors")


def test_there_are_enough_cases():
    assert len(CASES) >= 4
    assert any(name.startswith("original") for name in CASES)
    assert any(name.startswith("transformers") for name in CASES)


def test_logits(case):
    model, params, reference = case
    logits = jax.jit(model.apply)({"params": params}, reference["tokens"])
    assert logits.shape == reference["logits"].shape
    assert relative_error(logits, reference["logits"]) < 1e-5


def test_greedy_continuation(case):
    """Prefill and then one token at a time: the tokens are those of transformers."""
    model, params, reference = case
    tokens = reference["tokens"]
    step = jax.jit(lambda tokens, state: model.apply({"params": params}, tokens, state))
    logits, state = step(tokens, model.initial_state(tokens.shape[0]))
    out = []
    for _ in range(reference["greedy"].shape[1]):
        out.append(jnp.argmax(logits[:, -1], axis=-1)[:, None])
        logits, state = step(out[-1], state)
    np.testing.assert_array_equal(np.concatenate(out, axis=1), reference["greedy"])


def test_the_references_can_tell():
    """The comparison is not blind: a slightly different eps is outside the tolerance."""
    folder = GOLDEN / "transformers-untied"
    model, params = Mamba.from_pretrained(folder)
    reference = load_file(folder / "reference.safetensors")

    other = Mamba(dataclasses.replace(model.config, norm_eps=0.021))
    logits = jax.jit(other.apply)({"params": params}, reference["tokens"])
    assert relative_error(logits, reference["logits"]) > 1e-5
