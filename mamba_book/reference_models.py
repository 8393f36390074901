"""Whole models of each generation in float64 NumPy, from the equations: what blocks are held to.

``mamba_book.reference`` has the scans; here is what surrounds them, for the tests and for the check
of an accelerator (benchmarks/accelerator.py).
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from mamba import LayerState, MambaConfig
from mamba.mamba2 import Mamba2Config, Mamba2State
from mamba.mamba3 import Mamba3Config
from mamba.trapezoid import TrapezoidState
from mamba_book.reference import selective_scan_loop, ssd_loop, trapezoid_loop

# The parameters, with dt_proj's bias, that stay in float32 whatever the dtype of the matrices.
FLOAT32 = {"A_log", "B_bias", "C_bias", "D", "dt_bias", "mimo_o", "mimo_x", "mimo_z", "scale"}


def silu(v):
    return v / (1 + np.exp(-v))


def rms(v, eps):
    return v / np.sqrt((v**2).mean(-1, keepdims=True) + eps)


def linear(p, v):
    return v @ p["kernel"] + p.get("bias", 0.0)


def conv_loop(p, x, before):
    """The convolution, channel by channel, and SiLU -> output, the inputs with those before."""
    window = np.concatenate([before, x], axis=1)  # (b, d_conv - 1 + l, channels)
    y = np.zeros_like(x)
    for i, channel in np.ndindex(x.shape[0], x.shape[2]):
        taps = p["kernel"][:, channel]  # np.correlate conjugates, does not flip
        y[i, :, channel] = np.correlate(window[i, :, channel], taps, mode="valid")
    return silu(y + p.get("bias", 0.0)), window


def block_loop(p, u, c, state):
    """Mamba's block from the equations. u: (b, l, d_model), state: the one before it."""
    x, z = np.split(linear(p["in_proj"], u), 2, axis=-1)
    x, window = conv_loop(p["conv1d"], x, state.conv)
    dt, B, C = np.split(linear(p["x_proj"], x), [c.rank, c.rank + c.d_state], axis=-1)
    if c.select_norm_eps:
        dt, B, C = (rms(v, c.select_norm_eps) for v in (dt, B, C))
    delta = np.log1p(np.exp(linear(p["dt_proj"], dt)))
    y, h = selective_scan_loop(x, delta, -np.exp(p["A_log"]), B, C, p["D"], z=z, h0=state.ssm)
    return linear(p["out_proj"], y), LayerState(window[:, u.shape[1] :], h)


def block_loop_2(p, u, c, state):
    """Mamba-2's block from the equations."""
    (b, l, _), di, gn, heads = u.shape, c.d_inner, c.n_groups * c.d_state, c.n_heads
    zxBCdt = linear(p["in_proj"], u)
    z, xBC, dt = zxBCdt[..., :di], zxBCdt[..., di:-heads], zxBCdt[..., -heads:]
    xBC, window = conv_loop(p["conv1d"], xBC, state.conv)
    x, B, C = xBC[..., :di], xBC[..., di : di + gn], xBC[..., di + gn :]
    x = x.reshape(b, l, heads, c.head_dim)
    B, C = (v.reshape(b, l, c.n_groups, c.d_state) for v in (B, C))
    delta = np.clip(np.log1p(np.exp(dt + p["dt_bias"])), *c.dt_limit)
    y, h = ssd_loop(x, delta, -np.exp(p["A_log"]), B, C, p["D"], state.ssm)
    gated = (y.reshape(b, l, di) * silu(z)).reshape(b, l, c.n_groups, -1)
    y = rms(gated, c.norm_eps).reshape(b, l, di) * p["norm"]["scale"]
    return linear(p["out_proj"], y), Mamba2State(window[:, l:], h)


def block_loop_3(p, u, c, state):
    """Mamba-3's block from the equations, head by head where heads differ."""
    (b, l, _), heads, r, n = u.shape, c.n_heads, c.rank, c.d_state
    widths = [c.d_inner] * 2 + [r * c.n_groups * n] * 2 + [heads] * 3
    parts = np.split(linear(p["in_proj"], u), np.cumsum(widths), axis=-1)
    z, x, B, C, dt, a, trap, angles = parts
    delta = np.log1p(np.exp(dt + p["dt_bias"]))  # (b, l, h)
    rate = np.where(a >= 0, 1 + a, 1 / (1 - np.minimum(a, 0)))
    A = -np.maximum(rate if c.heavy_tail else np.log1p(np.exp(a)), c.A_floor)
    theta = np.einsum("blh,bls->blhs", delta, np.pi * np.tanh(angles))

    def for_heads(v, name):
        v = v.reshape(b, l, r, c.n_groups, n)
        of_group = [rms(v[:, :, :, g], c.norm_eps) for g in range(c.n_groups)]  # (b, l, r, n) each
        share, scale = heads // c.n_groups, p[f"{name}_norm"]["scale"]
        return np.stack(
            [of_group[i // share] * scale + p[f"{name}_bias"][i] for i in range(heads)], axis=2
        )

    x, z = (v.reshape(b, l, heads, 1, c.head_dim) for v in (x, z))
    if c.is_mimo:
        x, z = x * p["mimo_x"], z * p["mimo_z"]  # (b, l, h, r, p)
    y, state = trapezoid_loop(
        x, delta, A, 1 / (1 + np.exp(-trap)), for_heads(B, "B"), for_heads(C, "C"), theta, p["D"],
        state, pairs="halves" if c.is_mimo else "interleaved",
    )  # fmt: skip
    y = y * silu(z) * (p["mimo_o"] if c.is_mimo else 1)
    out = linear(p["out_proj"], y.sum(3).reshape(b, l, c.d_inner))
    return out, TrapezoidState(*state)


def mlp_loop(p, u):
    """fc2 of (the first half of fc1, gated by the second)."""
    y, gate = np.split(linear(p["fc1"], u), 2, axis=-1)
    return linear(p["fc2"], y * silu(gate))


BLOCKS = {MambaConfig: block_loop, Mamba2Config: block_loop_2, Mamba3Config: block_loop_3}


def model_loop(params, tokens, c):
    """-> logits and state of a whole sequence read from the beginning."""
    table = params["embedding"]["embedding"]
    x = table[np.asarray(tokens)]
    b = x.shape[0]
    states = []
    for i in range(c.n_layer):
        p = params[f"layers_{i}"]
        start = to_float64(c.zero_state(b))
        u = rms(x, c.norm_eps) * p["norm"]["scale"]
        out, state = BLOCKS[type(c)](p["mixer"], u, c, start)
        x = x + out
        if "mlp" in p:
            x = x + mlp_loop(p["mlp"], rms(x, c.norm_eps) * p["norm2"]["scale"])
        states.append(state)
    head = table.T if c.tie_embeddings else params["lm_head"]["kernel"]
    return rms(x, c.norm_eps) * params["norm_f"]["scale"] @ head, tuple(states)


def to_float64(tree):
    return jax.tree.map(lambda v: np.asarray(v, np.float64), tree)


def random_params(model, seed=0):
    """Parameters that are all random, as if trained: norms, D, biases and constants too."""
    tree = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    rng = np.random.default_rng(seed)

    def draw(path, p):
        module, name = path[-2].key, path[-1].key
        values = rng.normal(size=p.shape)
        if name == "A_log":
            values = rng.uniform(-1, 3, p.shape)
        elif (module, name) == ("dt_proj", "bias") or name == "dt_bias":
            values = rng.uniform(-6, 0, p.shape)  # Δ between 0.0025 and 0.7
        elif name in ("scale", "D", "bias"):
            values = (name != "bias") + 0.3 * values
        elif name == "kernel":
            values = values / math.sqrt(p.shape[0])
        return jnp.asarray(values, p.dtype)

    return jax.tree_util.tree_map_with_path(draw, tree)


def in_bfloat16(params):
    """The matrices and convolutions in bfloat16, as ``from_pretrained`` leaves them."""

    def convert(path, p):
        module, name = path[-2].key, path[-1].key
        keep = name in FLOAT32 or (module, name) == ("dt_proj", "bias")
        return p if keep else p.astype(jnp.bfloat16)

    return jax.tree_util.tree_map_with_path(convert, params)
