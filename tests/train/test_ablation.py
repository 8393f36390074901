"""The ablation: any of Δ, B and C may depend on the input, and the others are learned constants.

test_model.py holds that one call serves every use of Mamba; here the same is held for each subset.
"""

import dataclasses
import itertools
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from scipy import stats

import mamba.mamba1
from mamba import Mamba, MambaConfig, selective_scan
from mamba.train.ablation import SELECTIVE, AblatedBlock, AblatedConfig
from mamba_book.reference import relative_error
from tests.helpers.parameters import random_params

SUBSETS = [s for k in range(4) for s in itertools.combinations(SELECTIVE, k)]
every_subset = pytest.mark.parametrize("selective", SUBSETS, ids=lambda s: "+".join(s) or "none")
SIZES = {"d_model": 12, "n_layer": 1, "vocab_size": 19, "d_state": 5, "dt_rank": 3}


@cache
def make(selective):
    """A model of one layer, random parameters of it, and its compiled call."""
    model = Mamba(AblatedConfig(**SIZES, selective=selective))
    params = random_params(model, seed=1)
    return model, params, jax.jit(lambda *args: model.apply({"params": params}, *args))


@cache
def whole_and_gradients(selective):
    """Logits of ``random_tokens(2, 9)`` without a state, and the gradients of their mean square."""
    model, params, _ = make(selective)

    def loss(params):
        logits = model.apply({"params": params}, random_tokens(2, 9))
        return (logits**2).mean(), logits

    gradients, logits = jax.jit(jax.grad(loss, has_aux=True))(params)
    return np.asarray(logits), gradients


def random_tokens(b, l, seed=0):
    return np.random.default_rng(seed).integers(0, 19, (b, l), np.int32)


def assert_close(actual, expected):
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.shape == e.shape and relative_error(a, e) < 1e-5


@every_subset
def test_parameters(selective):
    _, params, _ = make(selective)
    p = params["layers_0"]["mixer"]
    width = 3 * ("delta" in selective) + 5 * ("B" in selective) + 5 * ("C" in selective)
    expected = {
        "in_proj/kernel": (12, 48),
        "conv1d/kernel": (4, 24),
        "conv1d/bias": (24,),
        "A_log": (24, 5),
        "D": (24,),
        "out_proj/kernel": (24, 12),
    }
    if selective:
        expected["x_proj/kernel"] = (24, width)
    if "delta" in selective:
        expected |= {"dt_proj/kernel": (3, 24), "dt_proj/bias": (24,)}
    else:
        expected["dt_bias"] = (24,)
    expected |= {name: (5,) for name in ("B", "C") if name not in selective}
    assert {path: leaf.shape for path, leaf in flatten_dict(p, sep="/").items()} == expected


def test_initial_constants():
    block = AblatedBlock(AblatedConfig(**SIZES | {"d_model": 96, "d_state": 400}, selective=()))
    p = jax.jit(block.init)(jax.random.key(3), jnp.zeros((1, 1, 96)))["params"]
    assert (p["B"] == 1).all()
    assert stats.kstest(np.float64(p["C"]), stats.norm.cdf).pvalue > 1e-3
    dt = np.logaddexp(0, np.float64(p["dt_bias"]))
    low, high = np.log(1e-3), np.log(0.1)
    assert stats.kstest(np.log(dt), stats.uniform(low, high - low).cdf).pvalue > 1e-3


@every_subset
def test_step_by_step_is_the_whole_sequence(selective):
    model, _, apply = make(selective)
    tokens, state = random_tokens(2, 9), model.initial_state(2)
    whole, end = apply(tokens, state)
    assert_close(whole_and_gradients(selective)[0], whole)
    stepped = []
    for t in range(9):
        logits, state = apply(tokens[:, t : t + 1], state)
        stepped.append(logits)
    assert_close((np.concatenate(stepped, axis=1), state), (whole, end))


@every_subset
def test_padded_and_packed_rows_equal_the_rows_alone(selective):
    """Two segments, of 3 and 4 tokens, and two pads: a constant Δ is 0 at pads, too."""
    model, _, apply = make(selective)
    tokens, state = random_tokens(2, 9), model.initial_state(2)
    resets = np.zeros((2, 9), bool)
    resets[0, 3] = True
    logits, end = apply(tokens, state, np.array([7, 9]), resets)
    first = partial(jax.tree.map, lambda v: np.asarray(v)[:1])  # row
    alone = state
    for t in range(7):
        alone = model.initial_state(2) if t == 3 else alone
        expected, alone = apply(tokens[:, t : t + 1], alone)
        assert_close(first(logits)[:, t : t + 1], first(expected))
    assert_close(first(end), first(alone))
    assert_close(np.asarray(logits)[1:], whole_and_gradients(selective)[0][1:])


@every_subset
def test_gradients_are_finite_and_reach_every_parameter(selective):
    _, gradients = whole_and_gradients(selective)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
        assert np.isfinite(leaf).all() and np.abs(leaf).max() > 0, path


# --- what a constant means ----------------------------------------------------------------------


@cache
def scan_arguments(selective):
    """Compiled: the block's input -> the scan's arguments (x, Δ, A, B, C, D) made of it."""
    model, params, _ = make(selective)

    def arguments(u):
        seen = []

        def spy(x, *args, h0, **kwargs):
            seen.extend((x, *args))
            return x, h0

        with pytest.MonkeyPatch.context() as patch:  # while it is traced
            patch.setattr(mamba.mamba1, "selective_scan", spy)
            AblatedBlock(model.config).apply({"params": params["layers_0"]["mixer"]}, u)
        return seen

    return jax.jit(arguments)


def system(selective, seed):
    """The scan's arguments for a random input."""
    u = np.float32(np.random.default_rng(seed).normal(size=(2, 12, 12)))
    return [np.asarray(v) for v in scan_arguments(selective)(u)]


@every_subset
def test_exactly_what_is_named_depends_on_the_input(selective):
    first, second = system(selective, 0), system(selective, 1)
    for name, i in (("delta", 1), ("B", 3), ("C", 4)):
        constant = (first[i] == first[i][:1, :1]).all() and (first[i] == second[i]).all()
        assert constant == (name not in selective), name


@pytest.mark.parametrize("selective", [(), SELECTIVE], ids=["none", "all"])
def test_time_invariant_if_and_only_if_nothing_is_selective(selective):
    """The system made for one input, fed with that input three steps later."""
    x, *rest = system(selective, 1)
    later = np.pad(x, ((0, 0), (3, 0), (0, 0)))[:, :12]
    scan = jax.jit(selective_scan)
    y, y_later = np.asarray(scan(x, *rest)), np.asarray(scan(later, *rest))
    error = relative_error(y_later[:, 3:], y[:, :-3])
    assert error < 1e-6 if selective == () else error > 1e-2


# --- the configuration --------------------------------------------------------------------------


def test_all_three_selective_is_mamba():
    """The same parameters at the start, logits and state as the model of a MambaConfig."""
    tokens = random_tokens(2, 9)
    results = []
    for config in (MambaConfig(**SIZES), AblatedConfig(**SIZES, selective=SELECTIVE)):
        model = Mamba(config)

        @jax.jit
        def start_and_read(key, model=model):
            params = model.init(key, tokens)["params"]
            return params, model.apply({"params": params}, tokens, model.initial_state(2))

        results.append(start_and_read(jax.random.key(0)))
    plain, ablated = results
    assert jax.tree.structure(plain) == jax.tree.structure(ablated)
    for a, b in zip(*map(jax.tree.leaves, results), strict=True):
        assert np.array_equal(a, b)


def test_order_and_type_of_the_names_do_not_matter():
    config = AblatedConfig(**SIZES, selective=["C", "delta"])
    assert config == AblatedConfig(**SIZES, selective=("delta", "C"))
    assert hash(config) and config.selective == ("delta", "C")


@pytest.mark.parametrize("selective", [("A",), ("delta", "D"), "delta", "BC", ("dt",)])
def test_unknown_names(selective):
    with pytest.raises(ValueError, match="selective must be a tuple of names of .'delta', 'B'"):
        AblatedConfig(**SIZES, selective=selective)


def test_other_sizes_are_checked_as_ever():
    config = AblatedConfig(**SIZES, selective=("B",))
    assert dataclasses.replace(config, d_state=6).selective == ("B",)
    with pytest.raises(ValueError, match="d_state must be a whole number"):
        dataclasses.replace(config, d_state=0)


def test_checkpoints_hold_mamba_only(tmp_path):
    model, params, _ = make(("delta", "B"))
    with pytest.raises(ValueError, match="a model of AblatedConfig has no checkpoint format"):
        model.save_pretrained(params, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()
