"""Mamba-2's block and model: any split of a sequence, padding, packing, the initialization.

tests/test_model.py and tests/test_mamba1.py hold the same against float64 for every generation.
"""

import dataclasses
import math
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import mamba.mamba2
from mamba.mamba2 import GatedRMSNorm, Mamba2Config
from mamba.model import Mamba, ResidualBlock
from tests.helpers.parameters import assert_uniform, in_bfloat16, random_params

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


@pytest.mark.parametrize("limits", [(0.2, 0.3), (0.0, 0.01)])
def test_the_limits_hold_in_decoding_too(pair, limits):
    """One token after another gives what the whole gives, and not what it gives without limits."""
    config, (model, params) = dataclasses.replace(SMALL, dt_limit=limits), pair
    t, limited = tokens(2, 9), Mamba(config)
    whole = limited.apply({"params": params}, t)
    step = jax.jit(lambda *a: limited.apply({"params": params}, *a))
    state, stepped = limited.initial_state(2), []
    for i in range(9):
        logits, state = step(t[:, i : i + 1], state)
        stepped.append(logits)
    assert_close(jnp.concatenate(stepped, 1), whole)
    free = np.asarray(model.apply({"params": params}, t))
    assert np.abs(free - whole).max() > 1e-2 * np.abs(free).max()


# --- dtypes -------------------------------------------------------------------------------------


def test_what_stays_float32_in_bfloat16(pair, monkeypatch):
    config = dataclasses.replace(SMALL, dtype=jnp.bfloat16)
    p = in_bfloat16(pair[1])["layers_0"]
    seen = {}

    def spy(x, delta, A, B, C, D, **kwargs):
        seen.update(x=x.dtype, delta=delta.dtype, A=A.dtype, D=D.dtype, h=kwargs["h0"].dtype)
        return ssd(x, delta, A, B, C, D, **kwargs)

    ssd = mamba.mamba2.ssd
    monkeypatch.setattr(mamba.mamba2, "ssd", spy)
    x = jnp.float32(np.random.default_rng(0).normal(size=(2, 3, config.d_model))) + 100
    y, state = ResidualBlock(config).apply({"params": p}, x)
    f32, bf16 = jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)
    assert seen == {"x": bf16, "delta": f32, "A": f32, "D": f32, "h": f32}
    assert {v.dtype for v in state} == {f32} and y.dtype == f32
    assert (y != y.astype(bf16)).any()  # the residual stream is not rounded to 8 bits
    half = jnp.full((1, 8), 3e4, jnp.float16)  # its square is no number of float16
    norm = GatedRMSNorm(2).apply({"params": {"scale": jnp.ones(8)}}, half, half)
    assert norm.dtype == f32 and np.allclose(norm, 1)


# --- initialization -----------------------------------------------------------------------------


@cache
def initial(**changes):
    """The parameters of a model of two layers -> (all of them, the two mixers)."""
    sizes = {"d_model": 96, "n_layer": 2, "vocab_size": 300, "head_dim": 1, "d_state": 3}
    config = Mamba2Config(**sizes, tie_embeddings=False, bias=True, **changes)
    shape = jnp.zeros((1, 1), jnp.int32)
    params = jax.jit(Mamba(config).init)(jax.random.key(5), shape)["params"]
    return params, [params[f"layers_{i}"]["mixer"] for i in range(2)]


@pytest.mark.parametrize(
    ("module", "name", "bound"),
    [
        ("in_proj", "kernel", 96**-0.5),
        ("conv1d", "kernel", 4**-0.5),
        ("conv1d", "bias", 4**-0.5),
        ("out_proj", "kernel", (192 * 2) ** -0.5),  # ÷ √n_layer
    ],
)
def test_initial_uniform(module, name, bound):
    weights = [mixer[module][name] for mixer in initial()[1]]
    assert_uniform(weights, -bound, bound)
    assert not np.array_equal(*weights)  # every layer has draws of its own


@pytest.mark.parametrize("limits", [(1.0, 16.0), (0.5, 2.0)])
def test_initial_decays(limits):
    mixers = initial()[1] if limits == (1.0, 16.0) else initial(A_init_range=limits)[1]
    A = np.exp(np.float64([mixer["A_log"] for mixer in mixers]))
    assert_uniform(A, limits[0] - 1e-5, limits[1] + 1e-5)
    assert not np.array_equal(*A)


def test_initial_time_steps():
    steps = lambda mixers: np.logaddexp(0, np.float64([m["dt_bias"] for m in mixers]))  # noqa: E731
    dt = steps(initial()[1])
    assert_uniform(np.log(dt), math.log(1e-3) - 1e-5, math.log(0.1) + 1e-5)
    dt = steps(initial(dt_min=1e-5, dt_max=1e-3)[1])
    assert dt.min() == pytest.approx(1e-4, rel=1e-5)  # the floor
    assert_uniform(np.log(dt[dt > 1.001e-4]), math.log(1e-4), math.log(1e-3) + 1e-5)
    assert np.mean(dt < 1.001e-4) == pytest.approx(0.5, abs=0.1)


def test_initial_rest():
    params, mixers = initial()
    for i, mixer in enumerate(mixers):
        assert (mixer["D"] == 1).all() and (mixer["norm"]["scale"] == 1).all()
        assert (params[f"layers_{i}"]["norm"]["scale"] == 1).all()
        assert not mixer["in_proj"]["bias"].any() and not mixer["out_proj"]["bias"].any()
    assert (params["norm_f"]["scale"] == 1).all()
    embedding = np.ravel(params["embedding"]["embedding"]).astype(np.float64)
    assert stats.kstest(embedding, stats.norm(0, 0.02).cdf).pvalue > 1e-3
    assert_uniform(params["lm_head"]["kernel"], -(96**-0.5), 96**-0.5)
    assert {p.dtype for p in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}


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
