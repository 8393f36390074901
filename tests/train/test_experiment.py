"""One experiment: its model, its training lengths, what is carried on, held-out sequences."""

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
from tests.helpers.presets import TINY

PARITY = dataclasses.replace(
    TINY, task="parity", sizes={"vocab_size": 2}, length=8, first_length=2, carry=0.6
)


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
    by_block = {"mamba2": {"head_dim": 8, "d_state": 9}, "mamba3": {"head_dim": 3}}
    third = dataclasses.replace(TINY, block="mamba2", by_block=by_block)
    assert (third.config().head_dim, third.config().d_state) == (8, 4)  # the model's own come first
    assert dataclasses.replace(third, block="mamba").config() == TINY.config()
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
    longer = dataclasses.replace(grown, full_length=0.5)
    assert [longer.length_at(step) for step in range(8)] == [5, 5, 10, 10, 20, 20, 20, 20]


def test_the_sequences_that_continue_others(monkeypatch):
    """Along each row, from one place where it begins anew to the next: parity of all its ones."""
    seen = {}

    def note(model, data, optimizer, steps, *, carry, **options):
        seen.update(data=data, carry=carry)
        raise KeyboardInterrupt  # instead of a training

    monkeypatch.setattr(experiment, "train", note)
    for carry in (0.6, True):
        with pytest.raises(KeyboardInterrupt):
            run(dataclasses.replace(PARITY, carry=carry))
        kept = np.ones((PARITY.steps, PARITY.batch), bool)
        if carry is not True:
            kept = np.array([seen["carry"](step) for step in range(PARITY.steps)])
            assert not kept[0].any() and 0.3 < kept[1:].mean() < 0.9
        ones = np.zeros(PARITY.batch, int)
        for step in range(PARITY.steps):
            tokens, targets, _ = seen["data"](step)
            sums = np.where(kept[step], ones, 0)[:, None] + np.cumsum(tokens, axis=1)
            assert np.array_equal(targets, sums % 2)
            ones = sums[:, -1]
    for carry in (True, False):  # all, or none, and no function
        with pytest.raises(KeyboardInterrupt):
            run(dataclasses.replace(TINY, carry=carry))
        assert seen["carry"] is carry


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
