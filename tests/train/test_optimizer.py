"""The optimizer: what decays, how the learning rate changes, what is clipped."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mamba import Mamba
from mamba.train.ablation import AblatedConfig
from mamba.train.optimizer import make_optimizer, weight_decay_mask
from tests.helpers.training import MODEL_2, MODEL_3


@pytest.mark.parametrize("selective", [("delta", "B", "C"), ()])
def test_weight_decay_mask(selective):
    config = AblatedConfig(8, 1, 8, selective=selective, bias=True, tie_embeddings=False)
    shapes = jax.eval_shape(Mamba(config).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    mask = jax.tree_util.tree_leaves_with_path(weight_decay_mask(shapes["params"]))
    paths = [path for path, decays in mask if decays]
    names = {jax.tree_util.keystr(path, simple=True, separator="/") for path in paths}
    layers = ["in_proj", "conv1d", "out_proj"] + (["x_proj", "dt_proj"] if selective else [])
    expected = {f"layers_0/mixer/{name}/kernel" for name in layers}
    assert names == expected | {"embedding/embedding", "lm_head/kernel"}


@pytest.mark.parametrize(
    ("model", "layers"),
    [
        (MODEL_2, ["mixer/in_proj", "mixer/conv1d", "mixer/out_proj"]),
        (MODEL_3, ["mixer/in_proj", "mixer/out_proj", "mlp/fc1", "mlp/fc2"]),
    ],
    ids=["mamba2", "mamba3"],
)
def test_weight_decay_mask_of_another_generation(model, layers):
    """Of Mamba-3, the released code marks dt_bias and D; B_bias and C_bias are biases by name.

    mimo_x, mimo_z and mimo_o are scales, as those of norms are, and so do not decay here. The
    released code does not mark them.
    """
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    mask = jax.tree_util.tree_leaves_with_path(weight_decay_mask(shapes["params"]))
    names = {jax.tree_util.keystr(p, simple=True, separator="/") for p, decays in mask if decays}
    assert names == {f"layers_0/{name}/kernel" for name in layers} | {"embedding/embedding"}


def test_decay_and_schedule():
    """With no gradient the update is −rate · decay · p where p decays: it shows the schedule."""
    optimizer = make_optimizer(0.1, 10, warmup=4, end=0.2, weight_decay=0.5)
    params = {"layer": {"kernel": np.float32(2.0), "bias": np.float32(2.0)}}
    state, nothing = optimizer.init(params), jax.tree.map(np.zeros_like, params)
    update, rates = jax.jit(optimizer.update), []
    for _ in range(11):
        updates, state = update(nothing, state, params)
        rates.append(-float(updates["layer"]["kernel"]) / (0.5 * 2))
        assert updates["layer"]["bias"] == 0
    falling = [0.02 + 0.08 * (1 + math.cos(math.pi * t / 6)) / 2 for t in range(7)]
    assert rates == pytest.approx([0, 0.025, 0.05, 0.075, *falling], abs=1e-6)
    constant = make_optimizer(0.1, 10, end=1.0, weight_decay=0.5)
    state, update = constant.init(params), jax.jit(constant.update)
    for _ in range(10):
        updates, state = update(nothing, state, params)
        assert float(updates["layer"]["kernel"]) == pytest.approx(-0.1)


def test_gradients_are_clipped_by_their_global_norm():
    optimizer = make_optimizer(0.1, 10, weight_decay=0.0)
    update = jax.jit(optimizer.update)
    params = {"kernel": np.zeros(2, np.float32), "bias": np.zeros(1, np.float32)}
    long = {"kernel": np.float32([3, 0]), "bias": np.float32([4])}  # norm 5, clipped to 1
    short = {"kernel": np.float32([0.1, 0.2]), "bias": np.float32([0.3])}  # left as it is
    results = []
    for first in (long, jax.tree.map(lambda g: g / 5, long)):
        state = optimizer.init(params)
        for gradient in (first, short):
            updates, state = update(gradient, state, params)
        results.append(updates)
    for a, b in zip(*map(jax.tree.leaves, results), strict=True):
        assert np.allclose(a, b, rtol=1e-5)


def test_the_same_arguments_give_the_same_optimizer():
    assert make_optimizer(0.1, 10, warmup=4) is make_optimizer(0.1, 10, warmup=4)


@pytest.mark.parametrize(
    "bad", [{"warmup": 10}, {"warmup": -1}, {"end": 1.5}, {"learning_rate": 0}]
)
def test_bad_schedules(bad):
    with pytest.raises(ValueError, match="learning_rate > 0, 0 <= warmup < steps and 0 <= end"):
        make_optimizer(**({"learning_rate": 0.1, "steps": 10} | bad))
