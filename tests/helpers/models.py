"""Small models of each generation, and what tests do with them."""

import dataclasses
from functools import cache

import jax
import numpy as np
import pytest

from mamba import Mamba, MambaConfig
from mamba.mamba2 import Mamba2Config
from mamba.mamba3 import Mamba3Config
from mamba.trapezoid import TrapezoidState
from mamba_book.reference import relative_error
from mamba_book.reference_models import (  # noqa: F401  # which tests import from here
    BLOCKS,
    block_loop_3,
    mlp_loop,
    model_loop,
    rms,
    to_float64,
)
from tests.helpers.parameters import random_params

SMALL = MambaConfig(d_model=12, n_layer=2, vocab_size=19)
SMALL_2 = Mamba2Config(
    d_model=12,
    n_layer=2,
    vocab_size=19,
    d_state=5,
    head_dim=4,
    n_groups=3,
    pad_vocab_size_multiple=8,
)
SMALL_3 = Mamba3Config(
    d_model=12,
    n_layer=2,
    vocab_size=19,
    d_intermediate=7,  # an MLP of width 128
    d_state=5,  # and one angle
    head_dim=4,
    n_groups=3,
    pad_vocab_size_multiple=8,
)
SMALL_MIMO = dataclasses.replace(
    SMALL_3,
    n_layer=1,
    d_intermediate=None,
    d_state=8,
    head_dim=6,
    n_groups=2,
    is_mimo=True,
    mimo_rank=3,
    rope_fraction=1.0,
)
# Between them they leave no size and no switch at its default only.
CONFIGS = {
    "default": SMALL,
    "d_state=1": dataclasses.replace(SMALL, d_state=1, n_layer=1),
    "d_conv=1": dataclasses.replace(SMALL, d_conv=1, n_layer=1),
    "d_conv=2": dataclasses.replace(SMALL, d_conv=2, conv_bias=False, n_layer=1),
    "expand=1": dataclasses.replace(SMALL, expand=1, d_state=5, dt_rank=7, n_layer=1),
    "untied, biases": dataclasses.replace(
        SMALL, tie_embeddings=False, bias=True, norm_eps=0.02, pad_vocab_size_multiple=1
    ),
    "falcon": dataclasses.replace(SMALL, select_norm_eps=0.01, n_layer=1),
    "mamba2": SMALL_2,
    "mamba2, untied, biases": dataclasses.replace(
        SMALL_2,
        n_layer=1,
        head_dim=12,
        n_groups=1,
        d_state=1,
        d_conv=2,
        conv_bias=False,
        bias=True,
        dt_limit=(0.01, 0.3),
        tie_embeddings=False,
        norm_eps=0.02,
    ),
    "mamba3": SMALL_3,
    "mamba3, mimo": SMALL_MIMO,
    "mamba3, mimo, nothing turns, floor, untied": dataclasses.replace(
        SMALL_MIMO,
        d_intermediate=129,
        d_state=3,
        n_groups=1,
        mimo_rank=2,
        rope_fraction=None,
        A_floor=0.5,
        heavy_tail=False,
        tie_embeddings=False,
        norm_eps=0.02,
    ),
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
GENERATIONS = {"mamba": SMALL, "mamba2": SMALL_2, "mamba3": SMALL_3}
every_generation = pytest.mark.parametrize("config", GENERATIONS.values(), ids=GENERATIONS.keys())


@cache
def make(config, seed=0):
    """A model, and parameters that are all random."""
    model = Mamba(config)
    return model, random_params(model, seed)


@cache
def compiled(config, method=None):
    """``model.apply`` under jit: (params, tokens, state, lengths, resets) -> what it returns."""
    model = Mamba(config)
    return jax.jit(lambda params, *args: model.apply({"params": params}, *args, method=method))


def random_tokens(config, b, l, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, config.vocab_size, (b, l), np.int32)


def on_the_circle(tree):
    """The same tree, but the angles of Mamba-3's states are cosines and sines: π and −π agree."""
    third = lambda v: isinstance(v, TrapezoidState)  # noqa: E731
    points = lambda v: v._replace(angle=np.stack([np.cos(v.angle), np.sin(v.angle)]))  # noqa: E731
    return jax.tree.map(lambda v: points(v) if third(v) else v, tree, is_leaf=third)


def assert_close(actual, expected, tolerance):
    actual, expected = (jax.tree.leaves(on_the_circle(tree)) for tree in (actual, expected))
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape
        if a.size:  # the conv state is empty when d_conv = 1
            assert relative_error(a, e) < tolerance


def run_split(config, params, tokens, splits, state=None):
    if state is None:
        state = Mamba(config).initial_state(tokens.shape[0])
    outputs, start = [], 0
    for l in splits:
        logits, state = compiled(config)(params, tokens[:, start : start + l], state)
        outputs.append(logits)
        start += l
    assert start == tokens.shape[1]
    return np.concatenate(outputs, axis=1), state


def row(tree, i):
    """One row of a batch: of its logits, or of its state."""
    return jax.tree.map(lambda v: np.asarray(v)[i : i + 1], tree)
