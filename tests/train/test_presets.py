"""The presets: possible runs, published settings, training lengths, held-out sequences."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from mamba import MambaConfig
from mamba.mamba2 import Mamba2Config
from mamba.train import experiment
from mamba.train.ablation import AblatedConfig
from mamba.train.experiment import run
from mamba.train.presets import PRESETS
from tests.helpers.presets import TINY

KEY = jax.random.key(0)


def test_every_preset_describes_a_possible_run():
    every = [p for name, sizes in PRESETS.items() for p in sizes.values() if p.task == name]
    assert {preset.task for preset in every} == set(PRESETS)
    for preset in every:
        json.dumps(preset.settings(preset.config()))
        preset.optimizer()
        if preset.task != "language-model":
            for length in (preset.length, *preset.lengths):
                batch = jax.eval_shape(lambda key, p=preset, n=length: p.draw(key, 2, n), KEY)
                assert batch.tokens.shape[1] >= length


def test_paper_settings():
    """What the paper states: §4.1, Appendix E.1."""
    copying, induction = (PRESETS[n]["paper"] for n in ("copying", "induction-heads"))
    assert (copying.length, copying.steps, copying.batch) == (4096, 400_000, 64)
    assert (copying.learning_rate, copying.sizes) == (1e-4, {"vocab_size": 16, "n_data": 16})
    assert (induction.length, induction.batch, induction.learning_rate) == (256, 8, 1e-3)
    assert induction.sizes == {"vocab_size": 16} and max(induction.lengths) == 2**20
    for preset in (copying, induction):
        assert preset.model == {"d_model": 64, "n_layer": 2}
        assert (preset.warmup, preset.end) == (0.0, 1.0)  # a constant learning rate


def test_ablation():
    """Every preset makes a plain Mamba, or an ablated one if asked for it."""
    assert type(TINY.config()) is type(TINY.config(("C", "B", "delta"))) is MambaConfig
    config = TINY.config(("C", "delta"), "bfloat16")
    assert isinstance(config, AblatedConfig) and config.selective == ("delta", "C")
    assert (config.d_model, config.vocab_size, config.dtype) == (8, 8, "bfloat16")
    for selective in ("delta", ("A",), ("delta", "B", "C", "D")):
        with pytest.raises(ValueError, match="selective must be a tuple of names"):
            TINY.config(selective)


def test_another_block():
    second = dataclasses.replace(TINY, block="mamba2", model={**TINY.model, "head_dim": 4})
    assert second.config() == Mamba2Config(
        d_model=8, n_layer=1, d_state=4, head_dim=4, vocab_size=8, dtype="float32"
    )
    assert json.loads(json.dumps(second.settings(second.config())))["block"] == "mamba2"
    with pytest.raises(ValueError, match="only Mamba's block can be ablated, not that of mamba2"):
        second.config(())


def test_training_sequences_double_up_to_the_last_length():
    grown = dataclasses.replace(TINY, length=20, steps=8, first_length=5)
    assert [grown.length_at(step) for step in range(8)] == [5, 5, 5, 10, 10, 10, 20, 20]
    thirds = dataclasses.replace(grown, steps=9)  # each length for equally many steps
    assert [thirds.length_at(step) for step in range(9)] == [5, 5, 5, 10, 10, 10, 20, 20, 20]
    assert {TINY.length_at(step) for step in range(TINY.steps)} == {TINY.length}
    not_a_power = dataclasses.replace(grown, first_length=6)
    assert [not_a_power.length_at(step) for step in range(8)] == [6, 6, 6, 12, 12, 12, 20, 20]
    assert dataclasses.replace(grown, first_length=99).length_at(0) == 20


def test_held_out_sequences_are_no_training_sequences_and_always_the_same():
    held_out = TINY.held_out_batches(6)
    again = dataclasses.replace(TINY, steps=99, learning_rate=1.0).held_out_batches(6)
    assert all((a.tokens == b.tokens).all() for a, b in zip(held_out, again, strict=True))
    assert sum(len(batch.tokens) for batch in held_out) >= 10
    seen = {np.asarray(batch.tokens).tobytes() for batch in held_out}
    assert len(seen) == len(held_out)
    for seed in range(3):
        key = jax.random.fold_in(jax.random.key(seed), 1)
        for step in range(100):
            batch = TINY.draw(jax.random.fold_in(key, step), 4, 6)
            seen.add(np.asarray(batch.tokens).tobytes())
    assert len(seen) == len(held_out) + 300


def test_fewer_held_out_sequences_where_they_are_long(monkeypatch):
    monkeypatch.setattr(experiment, "MAX_HELD_OUT_TOKENS", 90)
    for length, n in ((9, 12), (60, 8)):  # 12: 10 in batches of 4
        batches = jax.eval_shape(lambda length=length: TINY.held_out_batches(length))
        assert sum(len(batch.tokens) for batch in batches) == n


def test_the_seed_changes_data_and_parameters():
    curves = [run(TINY, seed=seed, progress=False).trained.curve for seed in (0, 0, 1)]
    assert np.array_equal(curves[0], curves[1]) and not np.array_equal(curves[0], curves[2])
