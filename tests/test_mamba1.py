"""The block and its model: values, gradients, dtypes and initialization.

Values are held against a float64 NumPy implementation written here from the equations.
"""

import dataclasses
import math
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import mamba.mamba1
from mamba import Mamba, MambaBlock, MambaConfig, ResidualBlock, RMSNorm
from mamba_book.reference import relative_error
from tests.helpers.models import (
    BLOCKS,
    CONFIGS,
    SMALL,
    assert_close,
    compiled,
    every_config,
    every_generation,
    make,
    model_loop,
    random_tokens,
    rms,
    to_float64,
)
from tests.helpers.parameters import assert_uniform, in_bfloat16

# --- values, against float64 NumPy --------------------------------------------------------------


@every_config
def test_agrees_with_float64_numpy(config):
    model, params = make(config)
    tokens = random_tokens(config, 2, 9)
    logits, state = model_loop(to_float64(params), tokens, config)
    actual = compiled(config)(params, tokens)
    assert actual.dtype == jnp.float32
    assert_close(actual, logits, 1e-5)
    assert_close(compiled(config)(params, tokens, model.initial_state(2)), (logits, state), 1e-5)


@pytest.mark.parametrize("name", ["untied, biases", *(n for n in CONFIGS if "mamba" in n)])
def test_block_continues_like_float64_numpy(name):
    c = CONFIGS[name]
    _, params = make(c)
    p = params["layers_0"]["mixer"]
    rng = np.random.default_rng(3)
    u = rng.normal(size=(3, 7, c.d_model))
    state = jax.tree.map(lambda v: rng.normal(size=v.shape), c.zero_state(3))
    expected = BLOCKS[type(c)](to_float64(p), u, c, state)
    u, state = np.float32(u), jax.tree.map(np.float32, state)
    assert_close(jax.jit(c.block(None).apply)({"params": p}, u, state), expected, 1e-5)


@every_config
def test_gradients_agree_with_float64_differences(config):
    _, params = make(config)
    tokens = random_tokens(config, 2, 9)
    rng = np.random.default_rng(1)
    weight = rng.normal(size=(2, 9, config.padded_vocab_size))

    @jax.jit
    @jax.grad
    def loss_gradient(params, tokens, weight):
        return (Mamba(config).apply({"params": params}, tokens) * weight).sum()

    gradient = to_float64(loss_gradient(params, tokens, jnp.float32(weight)))
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        assert np.isfinite(leaf).all() and np.abs(leaf).max() > 0, path

    params = to_float64(params)
    direction = jax.tree.map(lambda v: rng.normal(size=v.shape), params)
    along = sum(
        (g * v).sum() for g, v in zip(*map(jax.tree.leaves, (gradient, direction)), strict=True)
    )
    e = 1e-5
    up, down = (jax.tree.map(lambda p, v, s=s: p + s * v, params, direction) for s in (e, -e))
    f = lambda p: (model_loop(p, tokens, config)[0] * weight).sum()  # noqa: E731
    assert along == pytest.approx((f(up) - f(down)) / (2 * e), rel=1e-4)


def test_rms_norm():
    x = np.random.default_rng(0).normal(size=(3, 5, 8)) * 4
    scale = np.linspace(-1, 2, 8)
    actual = RMSNorm(0.1).apply({"params": {"scale": jnp.float32(scale)}}, jnp.float32(x))
    assert relative_error(actual, rms(x, 0.1) * scale) < 1e-6
    half = RMSNorm().apply({"params": {"scale": jnp.ones(8)}}, jnp.full((1, 8), 300, jnp.bfloat16))
    assert half.dtype == jnp.float32 and np.allclose(half, 1)


# --- dtypes -------------------------------------------------------------------------------------


@every_generation
def test_bfloat16(config):
    small, config = config, dataclasses.replace(config, dtype=jnp.bfloat16)
    model, params = make(small)
    tokens = random_tokens(small, 2, 9)
    expected = compiled(small)(params, tokens)
    logits, state = compiled(config)(in_bfloat16(params), tokens, model.initial_state(2))
    assert logits.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {jnp.dtype(jnp.float32)}
    bound = 2e-2 if small is SMALL else 4e-2  # Mamba-2's norm divides small numbers, too
    assert 1e-4 < relative_error(logits, expected) < bound  # it is bfloat16, and it is close


def test_what_stays_float32_in_bfloat16(monkeypatch):
    config = dataclasses.replace(SMALL, dtype=jnp.bfloat16)
    p = in_bfloat16(make(SMALL)[1])["layers_0"]
    seen = {}

    def spy(x, delta, A, B, C, D, **kwargs):
        seen.update(x=x.dtype, delta=delta.dtype, A=A.dtype, D=D.dtype, h=kwargs["h0"].dtype)
        return selective_scan(x, delta, A, B, C, D, **kwargs)

    selective_scan = mamba.mamba1.selective_scan
    monkeypatch.setattr(mamba.mamba1, "selective_scan", spy)
    x = jnp.float32(np.random.default_rng(0).normal(size=(2, 1, config.d_model))) + 100
    y, _ = ResidualBlock(config).apply({"params": p}, x)
    f32, bf16 = jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)
    assert seen == {"x": bf16, "delta": f32, "A": f32, "D": f32, "h": f32}
    u = RMSNorm().apply({"params": p["norm"]}, x)
    out, _ = MambaBlock(config).apply({"params": p["mixer"]}, u)
    assert out.dtype == bf16 and y.dtype == f32
    assert (y == x + out).all()  # the sum of 100 and a small branch, not rounded to 8 bits
    assert (y != y.astype(bf16)).any()


# --- initialization -----------------------------------------------------------------------------


@cache
def initial(**changes):
    config = MambaConfig(d_model=96, n_layer=2, vocab_size=300, tie_embeddings=False, bias=True)
    config = dataclasses.replace(config, **changes)
    model = Mamba(config)
    return config, jax.jit(model.init)(jax.random.key(5), jnp.zeros((1, 1), jnp.int32))["params"]


def layers(params, module, name):
    return np.stack([params[f"layers_{i}"]["mixer"][module][name] for i in range(2)])


@pytest.mark.parametrize(
    ("module", "name", "bound"),
    [
        ("in_proj", "kernel", 96**-0.5),
        ("conv1d", "kernel", 4**-0.5),
        ("conv1d", "bias", 4**-0.5),
        ("x_proj", "kernel", 192**-0.5),
        ("dt_proj", "kernel", 6**-0.5),
        ("out_proj", "kernel", (192 * 2) ** -0.5),
    ],
)
def test_initial_uniform(module, name, bound):
    _, params = initial()
    weights = layers(params, module, name)
    assert_uniform(weights, -bound, bound)
    assert len({w.tobytes() for w in weights}) == 2  # every layer has draws of its own


def test_initial_conv_follows_the_width():
    _, params = initial(d_conv=2, dt_min=1e-5, dt_max=1e-3)
    assert_uniform(layers(params, "conv1d", "kernel"), -(2**-0.5), 2**-0.5)
    assert_uniform(layers(params, "conv1d", "bias"), -(2**-0.5), 2**-0.5)


def test_initial_time_steps():
    _, params = initial()
    dt = np.logaddexp(0, layers(params, "dt_proj", "bias").astype(np.float64))
    assert_uniform(np.log(dt), math.log(1e-3) - 1e-5, math.log(0.1) + 1e-5)
    _, params = initial(d_conv=2, dt_min=1e-5, dt_max=1e-3)
    dt = np.logaddexp(0, layers(params, "dt_proj", "bias").astype(np.float64))
    assert dt.min() == pytest.approx(1e-4, rel=1e-5)  # the floor
    assert_uniform(np.log(dt[dt > 1.001e-4]), math.log(1e-4), math.log(1e-3) + 1e-5)
    assert np.mean(dt < 1.001e-4) == pytest.approx(0.5, abs=0.06)


def test_initial_rest():
    config, params = initial()
    rows = np.arange(1, 17) * np.ones((192, 1))
    for i in range(2):
        layer = params[f"layers_{i}"]
        assert np.allclose(np.exp(layer["mixer"]["A_log"]), rows, rtol=1e-6)
        assert (layer["mixer"]["D"] == 1).all() and (layer["norm"]["scale"] == 1).all()
        assert (layer["mixer"]["in_proj"]["bias"] == 0).all()
        assert (layer["mixer"]["out_proj"]["bias"] == 0).all()
    assert (params["norm_f"]["scale"] == 1).all()
    embedding = np.ravel(params["embedding"]["embedding"]).astype(np.float64)
    assert stats.kstest(embedding, stats.norm(0, 0.02).cdf).pvalue > 1e-3
    assert embedding.std() == pytest.approx(0.02, rel=0.02)
    assert_uniform(params["lm_head"]["kernel"], -(96**-0.5), 96**-0.5)
    assert {p.dtype for p in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
