"""The presets: possible runs, published settings, blocks of equal size."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import pytest

from mamba import Mamba
from mamba.train.presets import PRESETS

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


@pytest.mark.parametrize("task", ["parity", "modular-addition", "permutations"])
def test_the_blocks_that_track_a_state_are_of_nearly_the_same_size(task):
    """Each keeps 16 numbers for each of 64 channels; Mamba has the most parameters, 10,496."""

    def parameters(**changes):
        preset = dataclasses.replace(PRESETS[task]["laptop"], **changes)
        model = Mamba(preset.config())
        shapes = jax.eval_shape(model.init, KEY, jnp.zeros((1, 2), jnp.int32))
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))

    third = parameters()
    no_turn = parameters(model=PRESETS[task]["laptop"].model | {"rope_fraction": None})
    sizes = [parameters(block="mamba"), parameters(block="mamba2"), no_turn]
    assert all(0.95 * third <= size <= 1.2 * third for size in sizes), (third, sizes)
