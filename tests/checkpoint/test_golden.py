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
from mamba.checkpoint.names import read_config
from mamba.mamba2 import Mamba2Config

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
    """Each generation in each naming that it has; Mamba-2 with every number of groups."""
    assert len(CASES) >= 11
    configs = {name: read_config(GOLDEN / name / "config.json") for name in CASES}
    second = {k: c for k, c in configs.items() if isinstance(c, Mamba2Config)}
    falcon = {k for k, c in configs.items() if getattr(c, "select_norm_eps", None)}
    for names in (second, set(CASES) - set(second) - falcon):
        assert {name.split("-")[0] for name in names} == {"original", "transformers"}
    assert {c.n_groups for c in second.values()} == {1, 2, 3, 8}
    assert {configs[name].tie_embeddings for name in falcon} == {True, False}
    assert {c.tie_embeddings for c in second.values()} == {True, False}


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
