"""Mamba-2's block and model: any split of a sequence, padding, packing, the initialization."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mamba.mamba2 import GatedRMSNorm, Mamba2Config
from mamba.model import Mamba
from tests.helpers.parameters import random_params

SMALL = Mamba2Config(
    d_model=16, n_layer=2, vocab_size=24, d_state=4, head_dim=8, n_groups=2,
    pad_vocab_size_multiple=8,
)  # fmt: skip


def tokens(b, l, seed=0):
    return np.random.default_rng(seed).integers(0, 24, (b, l)).astype(np.int32)


@pytest.fixture(scope="module")
def pair():
    return Mamba(SMALL), random_params(Mamba(SMALL))


def assert_close(a, b, tolerance=1e-5):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.abs(np.asarray(x) - np.asarray(y)).max() <= tolerance * np.abs(y).max()


def test_any_split_gives_the_same(pair):
    model, params = pair
    t = tokens(2, 70)
    apply = jax.jit(lambda *a: model.apply({"params": params}, *a))
    whole, last = apply(t, model.initial_state(2))
    for cuts in ([35], [1, 2, 40], list(range(1, 70, 9))):
        state, parts = model.initial_state(2), []
        for part in np.split(t, cuts, axis=1):
            logits, state = apply(part, state)
            parts.append(logits)
        assert_close(jnp.concatenate(parts, 1), whole)
        assert_close(state, last)


def test_padding_leaves_the_state(pair):
    model, params = pair
    t, lengths = tokens(3, 40), np.array([40, 1, 17])
    _, state = model.apply({"params": params}, t, model.initial_state(3), lengths)
    for i, n in enumerate(lengths):
        _, alone = model.apply({"params": params}, t[i : i + 1, :n], model.initial_state(1))
        assert_close(jax.tree.map(lambda v, i=i: v[i : i + 1], state), alone)


def test_packed_texts_are_the_texts_apart(pair):
    model, params = pair
    t, resets = tokens(1, 50), np.zeros((1, 50), bool)
    resets[0, [0, 13, 14, 40]] = True
    together = model.apply({"params": params}, t, None, None, resets)
    for first, last in ((0, 13), (13, 14), (14, 40), (40, 50)):
        assert_close(together[:, first:last], model.apply({"params": params}, t[:, first:last]))


def test_the_norm_is_of_each_group_and_after_the_gate():
    rng = np.random.default_rng(0)
    y, z, scale = rng.normal(size=(3, 12)), rng.normal(size=(3, 12)), rng.normal(size=12)
    got = GatedRMSNorm(3).apply({"params": {"scale": scale}}, jnp.float32(y), jnp.float32(z))
    gated = y * z / (1 + np.exp(-z))
    for g in range(3):
        part = np.s_[:, 4 * g : 4 * g + 4]
        rms = np.sqrt((gated[part] ** 2).mean(1, keepdims=True) + 1e-5)
        assert_close(got[part], gated[part] / rms * scale[4 * g : 4 * g + 4], 1e-6)


def test_sizes_of_the_published_130m():
    c = Mamba2Config(d_model=768, n_layer=24, vocab_size=50277)
    shapes = jax.eval_shape(Mamba(c).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    mixer = shapes["params"]["layers_0"]["mixer"]
    assert mixer["in_proj"]["kernel"].shape == (768, 3352)
    assert mixer["conv1d"]["kernel"].shape == (4, 1792) and mixer["conv1d"]["bias"].shape == (1792,)
    assert mixer["dt_bias"].shape == mixer["A_log"].shape == mixer["D"].shape == (24,)
    assert mixer["norm"]["scale"].shape == (1536,) and c.padded_vocab_size == 50288


def test_initialization():
    c = Mamba2Config(d_model=512, n_layer=1, vocab_size=24, head_dim=1)
    shape = jnp.zeros((1, 1), jnp.int32)
    mixer = jax.jit(Mamba(c).init)(jax.random.key(0), shape)["params"]["layers_0"]["mixer"]
    A = np.sort(np.exp(mixer["A_log"]))
    assert np.abs(A - np.linspace(1, 16, 1024)).max() < 0.06 * 15
    dt = np.sort(np.log(np.asarray(jax.nn.softplus(mixer["dt_bias"]))))
    assert np.abs(dt - np.linspace(np.log(1e-3), np.log(0.1), 1024)).max() < 0.06 * np.log(100)
    assert (np.asarray(mixer["D"]) == 1).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head_dim": 7}, "heads of 7 channels do not divide d_inner = 32"),
        ({"n_groups": 3}, "3 groups do not divide 4 heads"),
        ({"dt_limit": (0.2, 0.1)}, "dt_limit must hold two numbers, 0 <= low <= high"),
        ({"dt_limit": (float("inf"), float("inf"))}, "dt_limit must hold two numbers"),
        ({"dt_limit": 0.1}, "dt_limit must hold two numbers"),
        ({"A_init_range": (17, 16)}, "A_init_range must hold two numbers"),
        ({"A_init_range": (0, 16)}, "A_init_range must begin above 0"),
    ],
)
def test_bad_config(change, message):
    with pytest.raises(ValueError, match=message):
        Mamba2Config(**({"d_model": 16, "n_layer": 1, "vocab_size": 8, "head_dim": 8} | change))
