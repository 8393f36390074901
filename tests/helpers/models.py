"""Small models for tests, and the same from the equations in float64 NumPy."""

import dataclasses
from functools import cache

import jax
import numpy as np
import pytest

from mamba import LayerState, Mamba, MambaConfig
from mamba_book.reference import relative_error, selective_scan_loop
from tests.helpers.parameters import random_params

SMALL = MambaConfig(d_model=12, n_layer=2, vocab_size=19)
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
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())


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


def assert_close(actual, expected, tolerance):
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
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


# --- the equations, in float64 NumPy ------------------------------------------------------------


def silu(v):
    return v / (1 + np.exp(-v))


def rms_norm(p, x, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * p["scale"]


def block_loop(p, u, c, conv, h):
    """The block from the equations. u: (b, l, d_model), conv and h: the state before it."""
    linear = lambda q, v: v @ q["kernel"] + q.get("bias", 0.0)  # noqa: E731
    x, z = np.split(linear(p["in_proj"], u), 2, axis=-1)
    window = np.concatenate([conv, x], axis=1)  # (b, d_conv - 1 + l, d_inner)
    x = np.zeros_like(x)
    for i, channel in np.ndindex(x.shape[0], x.shape[2]):
        taps = p["conv1d"]["kernel"][:, channel]  # np.correlate conjugates, does not flip
        x[i, :, channel] = np.correlate(window[i, :, channel], taps, mode="valid")
    x = silu(x + p["conv1d"].get("bias", 0.0))
    dt, B, C = np.split(linear(p["x_proj"], x), [c.rank, c.rank + c.d_state], axis=-1)
    delta = np.log1p(np.exp(linear(p["dt_proj"], dt)))
    y, h = selective_scan_loop(x, delta, -np.exp(p["A_log"]), B, C, p["D"], z=z, h0=h)
    return linear(p["out_proj"], y), LayerState(window[:, u.shape[1] :], h)


def model_loop(params, tokens, c):
    """-> logits and state of a whole sequence read from the beginning."""
    table = params["embedding"]["embedding"]
    x = table[np.asarray(tokens)]
    b = x.shape[0]
    states = []
    for i in range(c.n_layer):
        p = params[f"layers_{i}"]
        start = np.zeros((b, c.d_conv - 1, c.d_inner)), np.zeros((b, c.d_inner, c.d_state))
        out, state = block_loop(p["mixer"], rms_norm(p["norm"], x, c.norm_eps), c, *start)
        x = x + out
        states.append(state)
    head = table.T if c.tie_embeddings else params["lm_head"]["kernel"]
    return rms_norm(params["norm_f"], x, c.norm_eps) @ head, tuple(states)


def to_float64(tree):
    return jax.tree.map(lambda v: np.asarray(v, np.float64), tree)
