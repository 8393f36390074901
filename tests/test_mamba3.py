"""Mamba-3's block: its sizes, its rates, what stays float32, the initialization.

tests/test_model.py and tests/test_mamba1.py hold values, gradients, splits, padding and packing
against float64 for every generation.
"""

import dataclasses
import math
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import mamba.mamba3
from mamba.layers import GatedMLP
from mamba.mamba3 import Mamba3Config, heavy_tail
from mamba.model import Mamba, ResidualBlock
from tests.helpers.checkpoints import abstract_params
from tests.helpers.models import (
    SMALL_3,
    SMALL_MIMO,
    assert_close,
    block_loop_3,
    make,
    mlp_loop,
    to_float64,
)
from tests.helpers.parameters import assert_uniform, in_bfloat16

# --- sizes and rates ----------------------------------------------------------------------------


def test_derived_sizes():
    c = Mamba3Config(d_model=768, n_layer=12, vocab_size=128256, d_intermediate=1264)
    assert (c.n_heads, c.rank, c.n_angles, c.mlp_width) == (24, 1, 32, 1280)
    c = dataclasses.replace(c, is_mimo=True, rope_fraction=1.0, d_intermediate=None, mimo_rank=3)
    assert (c.rank, c.n_angles, c.mlp_width) == (3, 64, None)
    angles = [
        dataclasses.replace(c, d_state=n, rope_fraction=share).n_angles
        for n, share in [(5, 1.0), (7, 0.5), (6, 0.5), (8, None), (8, 0)]
    ]
    assert angles == [2, 1, 1, 0, 0]  # of an even number of states
    widths = [dataclasses.replace(c, d_intermediate=n).mlp_width for n in (1, 128, 129, 1280)]
    assert widths == [128, 128, 256, 1280]
    state = dataclasses.replace(c, head_dim=32).zero_state(2)
    shapes = [(2, 48, 64), (2, 48, 32, 128), (2, 48, 3, 128), (2, 48, 3, 32)]
    assert [v.shape for v in state] == shapes


def test_heavy_tail_and_its_slope():
    """1 + x above 0, 1/(1 − x) below; both have the slope 1 at 0."""
    x = jnp.float32([-1e30, -99.0, -3.0, -1.0, -1e-6, 0.0, 1e-6, 1.0, 3.0, 1e30])
    expected = [1e-30, 0.01, 0.25, 0.5, 1 - 1e-6, 1, 1 + 1e-6, 2, 4, 1e30]
    np.testing.assert_allclose(heavy_tail(x), expected, rtol=1e-6)
    slope = jax.vmap(jax.grad(heavy_tail))(x)
    expected = [0, 1e-4, 1 / 16, 0.25, 1 - 2e-6, 1, 1, 1, 1, 1]
    np.testing.assert_allclose(slope, expected, rtol=1e-6)


def test_the_floor_holds():
    """With rates that would be almost 0, the state fades as fast as the floor says, no faster."""
    c = dataclasses.replace(SMALL_MIMO, A_floor=0.3)
    params = jax.tree.map(jnp.asarray, make(SMALL_MIMO)[1]["layers_0"]["mixer"])
    widths = 2 * c.d_inner + 2 * c.rank * c.n_groups * c.d_state + c.n_heads
    rates = slice(widths, widths + c.n_heads)
    kernel = params["in_proj"]["kernel"].at[:, rates].set(-1e6)
    params = params | {"in_proj": {"kernel": kernel}}
    u = jnp.ones((1, 1, c.d_model))
    state = jax.tree.map(lambda v: v + 1.0, c.zero_state(1))._replace(x=c.zero_state(1).x)
    step = jax.jit(lambda state: c.block(None).apply({"params": params}, u, state)[1].h)
    faded, without = step(state), step(state._replace(h=0 * state.h))
    dt = (u[0] @ kernel[:, widths - c.n_heads : widths])[0] + params["dt_bias"]
    expected = np.exp(-0.3 * np.logaddexp(0, np.float64(dt)))  # (h,)
    np.testing.assert_allclose((faded - without)[0, :, 0, 0], expected, rtol=1e-5)


@pytest.mark.parametrize("bias", [-80.0, -200.0])  # e^-200 is 0 in float32
def test_a_token_with_a_time_step_of_almost_0_is_still_a_token(bias):
    """It reads the state, and the next token finds it: padding, where Δ = 0, does neither."""
    c, (_, params) = SMALL_3, make(SMALL_3)
    p = params["layers_0"]["mixer"] | {"dt_bias": np.full(6, bias, np.float32)}
    u = np.random.default_rng(0).normal(size=(1, 2, 12))
    state = jax.tree.map(lambda v: np.ones(v.shape), c.zero_state(1))
    expected = block_loop_3(to_float64(p), u, c, state)
    arrays = jnp.float32(u), jax.tree.map(jnp.float32, state)
    assert_close(jax.jit(c.block(None).apply)({"params": p}, *arrays), expected, 1e-5)


# --- dtypes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("small", [SMALL_3, SMALL_MIMO], ids=["siso", "mimo"])
def test_what_stays_float32_in_bfloat16(small, monkeypatch):
    config = dataclasses.replace(small, dtype=jnp.bfloat16)
    p = in_bfloat16(make(small)[1])["layers_0"]
    seen = {}

    def spy(x, *arrays, **kwargs):
        names = ("delta", "A", "lam", "B", "C", "theta", "D")
        seen.update({name: v.dtype for name, v in zip(names, arrays, strict=True)}, x=x.dtype)
        return scan(x, *arrays, **kwargs)

    scan = mamba.mamba3.trapezoidal_scan
    monkeypatch.setattr(mamba.mamba3, "trapezoidal_scan", spy)
    x = jnp.float32(np.random.default_rng(0).normal(size=(2, 3, config.d_model))) + 100
    y, state = jax.jit(ResidualBlock(config).apply)({"params": p}, x)
    f32, bf16 = jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)
    assert seen.pop("x") == (f32 if config.is_mimo else bf16)  # mimo_x is float32
    assert set(seen.values()) == {f32} == {v.dtype for v in state}
    assert y.dtype == f32 and (y != y.astype(bf16)).any()  # the residual stream is not rounded


# --- the MLP ------------------------------------------------------------------------------------


def test_the_second_half_of_the_mlp_is_the_gate():
    rng = np.random.default_rng(0)
    p = {"fc1": {"kernel": rng.normal(size=(6, 10))}, "fc2": {"kernel": rng.normal(size=(5, 6))}}
    x = rng.normal(size=(3, 6))
    found = GatedMLP(5, n_layer=1).apply({"params": jax.tree.map(jnp.float32, p)}, jnp.float32(x))
    np.testing.assert_allclose(found, mlp_loop(p, x), rtol=1e-4, atol=1e-5)
    half = GatedMLP(5, n_layer=1, dtype=jnp.bfloat16).apply(
        {"params": jax.tree.map(jnp.bfloat16, p)}, jnp.float32(x)
    )
    assert half.dtype == jnp.bfloat16


def test_the_mlp_reads_what_the_block_wrote():
    """x + block(norm(x)), then x + mlp(norm2(x)): without the second norm it would differ."""
    _, params = make(SMALL_3)
    p = params["layers_0"]
    x = np.float32(np.random.default_rng(0).normal(size=(2, 3, 12)))
    y, _ = ResidualBlock(SMALL_3).apply({"params": p}, x)
    bare = dataclasses.replace(SMALL_3, d_intermediate=None)
    middle, _ = ResidualBlock(bare).apply({"params": {k: p[k] for k in ("norm", "mixer")}}, x)
    p, middle = to_float64(p), np.float64(middle)
    u = middle / np.sqrt((middle**2).mean(-1, keepdims=True) + 1e-5) * p["norm2"]["scale"]
    np.testing.assert_allclose(y, middle + mlp_loop(p["mlp"], u), rtol=1e-4, atol=1e-4)


# --- initialization -----------------------------------------------------------------------------

SIZES = {"d_model": 96, "n_layer": 2, "vocab_size": 300, "head_dim": 1, "d_state": 3}
SIZES |= {"rope_fraction": None}


@cache
def initial(**changes):
    """The parameters of a model of two layers -> (all of them, the two layers)."""
    config = Mamba3Config(**(SIZES | {"tie_embeddings": False} | changes))
    shape = jnp.zeros((1, 1), jnp.int32)
    params = jax.jit(Mamba(config).init)(jax.random.key(5), shape)["params"]
    return params, [params[f"layers_{i}"] for i in range(2)]


MIMO = {"is_mimo": True, "mimo_rank": 4, "d_intermediate": 100}


@pytest.mark.parametrize(
    ("module", "name", "mlp", "bound"),
    [
        ("mixer", "in_proj", False, 96**-0.5),
        ("mixer", "out_proj", False, (192 * 2) ** -0.5),  # ÷ √n_layer
        ("mixer", "out_proj", True, (192 * 2) ** -0.5),
        ("mlp", "fc1", True, 96**-0.5),
        ("mlp", "fc2", True, (128 * 2) ** -0.5),
    ],
)
def test_initial_uniform(module, name, mlp, bound):
    """With an MLP, too: MixerModel divides by √(2 n_layer), but the class around it draws again."""
    weights = [layer[module][name]["kernel"] for layer in initial(**(MIMO if mlp else {}))[1]]
    assert_uniform(weights, -bound, bound)
    assert not np.array_equal(*weights)  # every layer has draws of its own


def test_initial_time_steps():
    steps = lambda layers: np.logaddexp(0, np.float64([v["mixer"]["dt_bias"] for v in layers]))  # noqa: E731
    dt = steps(initial()[1])
    assert_uniform(np.log(dt), math.log(1e-3) - 1e-5, math.log(0.1) + 1e-5)
    dt = steps(initial(dt_min=1e-5, dt_max=1e-3)[1])
    assert dt.min() == pytest.approx(1e-4, rel=1e-5)  # the floor
    assert_uniform(np.log(dt[dt > 1.001e-4]), math.log(1e-4), math.log(1e-3) + 1e-5)
    assert np.mean(dt < 1.001e-4) == pytest.approx(0.5, abs=0.1)


def test_initial_rest():
    params, layers = initial(**MIMO)
    for layer in layers:
        mixer = layer["mixer"]
        constants = {
            "B_bias": 1,
            "C_bias": 1,
            "D": 1,
            "mimo_x": 1 / 4,
            "mimo_z": 1,
            "mimo_o": 1 / 4,
        }
        for name, value in constants.items():
            assert (mixer[name] == value).all(), name
        norms = (layer["norm"], layer["norm2"], mixer["B_norm"], mixer["C_norm"], params["norm_f"])
        assert all((norm["scale"] == 1).all() for norm in norms)
        assert mixer.keys() - constants.keys() == {
            "in_proj", "dt_bias", "B_norm", "C_norm", "out_proj"
        }  # fmt: skip
    embedding = np.ravel(params["embedding"]["embedding"]).astype(np.float64)
    assert stats.kstest(embedding, stats.norm(0, 0.02).cdf).pvalue > 1e-3
    assert_uniform(params["lm_head"]["kernel"], -(96**-0.5), 96**-0.5)
    assert {p.dtype for p in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize("name", ["d_intermediate", "rope_fraction"])
@pytest.mark.parametrize("none", [0, 0.0, np.int32(0)])
def test_0_is_none_as_in_config_json(name, none):
    with_0, with_none = (dataclasses.replace(SMALL_3, **{name: v}) for v in (none, None))
    assert with_0 == with_none and hash(with_0) == hash(with_none)


def test_one_input_a_step_has_no_mixing_weights():
    mixer = abstract_params(SMALL_3)["layers_0"]["mixer"]
    assert not {"mimo_x", "mimo_z", "mimo_o", "A_log", "conv1d"} & mixer.keys()
    assert mixer["B_bias"].shape == (6, 1, 5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head_dim": 7}, "heads of 7 channels do not divide d_inner = 24"),
        ({"n_groups": 4}, "4 groups do not divide 6 heads"),
        ({"rope_fraction": 1.5}, "rope_fraction must be at most 1, got 1.5"),
        ({"rope_fraction": -1}, "rope_fraction must be a number above 0"),
        ({"rope_fraction": False}, "rope_fraction must be a number above 0"),
        ({"rope_fraction": 0.01}, "rope_fraction = 0.01 of d_state = 5 states is less than one pa"),
        ({"d_state": 3}, "rope_fraction = 0.5 of d_state = 3 states is less than one pair"),
        ({"mimo_rank": 0}, "mimo_rank must be a whole number, at least 1"),
        ({"is_mimo": 1}, "is_mimo must be True or False"),
        ({"heavy_tail": None}, "heavy_tail must be True or False"),
        ({"A_floor": 0.0}, "A_floor must be a number above 0"),
        ({"d_intermediate": -1}, "d_intermediate must be a whole number, at least 1"),
    ],
)
def test_bad_config(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL_3, **change)
