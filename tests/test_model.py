"""The model: initialization, sizes, one call for every use, padding, dtypes, bad input.

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

import mamba.block
from mamba.block import LayerState, MambaBlock, MambaConfig, ResidualBlock, RMSNorm
from mamba.model import Mamba
from mamba_book.reference import relative_error, selective_scan_loop
from tests.parameters import random_params

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


# --- values, against float64 NumPy --------------------------------------------------------------


def silu(v):
    return v / (1 + np.exp(-v))


def norm(p, x, eps):
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
        out, state = block_loop(p["mixer"], norm(p["norm"], x, c.norm_eps), c, *start)
        x = x + out
        states.append(state)
    head = table.T if c.tie_embeddings else params["lm_head"]["kernel"]
    return norm(params["norm_f"], x, c.norm_eps) @ head, tuple(states)


def to_float64(tree):
    return jax.tree.map(lambda v: np.asarray(v, np.float64), tree)


@every_config
def test_agrees_with_float64_numpy(config):
    model, params = make(config)
    tokens = random_tokens(config, 2, 9)
    logits, state = model_loop(to_float64(params), tokens, config)
    actual = compiled(config)(params, tokens)
    assert actual.dtype == jnp.float32
    assert_close(actual, logits, 1e-5)
    assert_close(compiled(config)(params, tokens, model.initial_state(2)), (logits, state), 1e-5)


def test_block_continues_like_float64_numpy():
    c = CONFIGS["untied, biases"]
    _, params = make(c)
    p = params["layers_1"]["mixer"]
    rng = np.random.default_rng(3)
    u = rng.normal(size=(3, 7, c.d_model))
    state = LayerState(
        rng.normal(size=(3, c.d_conv - 1, c.d_inner)), rng.normal(size=(3, c.d_inner, c.d_state))
    )
    expected = block_loop(to_float64(p), u, c, *state)
    u, state = np.float32(u), LayerState(*map(np.float32, state))
    assert_close(jax.jit(MambaBlock(c).apply)({"params": p}, u, state), expected, 1e-5)


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
    assert relative_error(actual, norm({"scale": scale}, x, 0.1)) < 1e-6
    half = RMSNorm().apply({"params": {"scale": jnp.ones(8)}}, jnp.full((1, 8), 300, jnp.bfloat16))
    assert half.dtype == jnp.float32 and np.allclose(half, 1)


# --- one call for every use ---------------------------------------------------------------------

SPLITS = [(17,), (1,) * 17, (1, 16), (2, 15), (3, 9, 3, 2), (15, 2), (16, 1)]


def run_in_pieces(config, params, tokens, splits, state=None):
    if state is None:
        state = Mamba(config).initial_state(tokens.shape[0])
    pieces, start = [], 0
    for l in splits:
        logits, state = compiled(config)(params, tokens[:, start : start + l], state)
        pieces.append(logits)
        start += l
    assert start == tokens.shape[1]
    return np.concatenate(pieces, axis=1), state


def row(tree, i):
    """One row of a batch: of its logits, or of its state."""
    return jax.tree.map(lambda v: np.asarray(v)[i : i + 1], tree)


@every_config
def test_step_by_step_is_the_whole_sequence(config):
    _, params = make(config)
    tokens = random_tokens(config, 2, 9, seed=1)
    stepped, state = run_in_pieces(config, params, tokens, (1,) * 9)
    assert_close(stepped, compiled(config)(params, tokens), 1e-5)
    assert_close((stepped, state), run_in_pieces(config, params, tokens, (9,)), 1e-5)


@pytest.mark.parametrize("splits", SPLITS, ids=str)
def test_any_split_is_the_whole_sequence(splits):
    _, params = make(SMALL)
    tokens = random_tokens(SMALL, 2, 17, seed=2)
    logits, state = model_loop(to_float64(params), tokens, SMALL)
    assert_close(run_in_pieces(SMALL, params, tokens, splits), (logits, state), 1e-5)


@pytest.mark.parametrize("l", [1, 2, 3, 16, 33])  # around the conv's width and the scan's chunk
def test_lengths(l):
    _, params = make(SMALL)
    tokens = random_tokens(SMALL, 2, l, seed=l)
    expected = model_loop(to_float64(params), tokens, SMALL)
    assert_close(run_in_pieces(SMALL, params, tokens, (l,)), expected, 1e-5)
    assert_close(run_in_pieces(SMALL, params, tokens, (1,) * l), expected, 1e-5)


def test_is_causal():
    _, params = make(SMALL)
    tokens = random_tokens(SMALL, 2, 9)
    changed = tokens.copy()
    changed[:, 5] = (tokens[:, 5] + 1) % SMALL.vocab_size
    logits, others = (np.asarray(compiled(SMALL)(params, v)) for v in (tokens, changed))
    moved = np.abs(others - logits).max(axis=2)  # (b, l)
    assert (moved[:, :5] == 0).all() and (moved[:, 5:] > 0).all()


def test_last_logits():
    model, params = make(SMALL)
    tokens, state = random_tokens(SMALL, 3, 9), model.initial_state(3)
    last = compiled(SMALL, "last_logits")
    expected, _ = model_loop(to_float64(params), tokens, SMALL)
    logits, end = last(params, tokens, state)
    assert_close(
        (logits, end), (expected[:, -1], run_in_pieces(SMALL, params, tokens, (9,))[1]), 1e-5
    )
    lengths = np.array([9, 1, 4])
    logits, end = last(params, tokens, state, lengths)
    _, padded_end = compiled(SMALL)(params, tokens, state, lengths)
    assert_close((logits, end), (expected[np.arange(3), lengths - 1], padded_end), 1e-5)


@pytest.mark.parametrize("name", ["default", "d_conv=1", "d_conv=2"])
def test_padded_rows_equal_the_rows_alone(name):
    config = CONFIGS[name]
    model, params = make(config)
    lengths = np.array([9, 1, 2] if name == "default" else [9, 1, 9])
    state = model.initial_state(3)
    for seed in (7, 8):  # from the start, then continuing
        tokens = random_tokens(config, 3, 9, seed)
        logits, end = compiled(config)(params, tokens, state, lengths)
        for i, l in enumerate(lengths):
            alone = compiled(config)(params, tokens[i : i + 1, :l], row(state, i))
            assert_close(row(logits, i)[:, :l], alone[0], 1e-5)
            assert_close(row(end, i), alone[1], 1e-6)
        state = end


def test_a_row_without_new_tokens_keeps_its_state():
    model, params = make(SMALL)
    tokens = random_tokens(SMALL, 3, 9)
    _, state = compiled(SMALL)(params, tokens, model.initial_state(3))
    _, after = compiled(SMALL)(params, tokens, state, np.array([0, 4, 9]))
    for before, now in zip(*(map(np.asarray, jax.tree.leaves(v)) for v in (state, after))):
        assert (before[0] == now[0]).all() and (before[1] != now[1]).any()


# --- packed rows --------------------------------------------------------------------------------

# Three rows of nine tokens: pieces around the conv's width, one that starts at the first token.
RESETS = np.zeros((3, 9), bool)
RESETS[0, [0, 2, 3, 7]] = RESETS[1, [5]] = RESETS[2, [1, 2, 3, 4]] = True


def pieces(row, end):
    """-> [(first, last + 1), ...] within the first `end` tokens of one row of resets."""
    edges = sorted({0, *np.flatnonzero(row[:end]), end})
    return list(zip(edges[:-1], edges[1:], strict=True))


@pytest.mark.parametrize("name", ["default", "d_conv=1", "d_conv=2"])
@pytest.mark.parametrize("padded", [False, True])
def test_packed_pieces_are_the_pieces_apart(name, padded):
    """Logits and next state, from the beginning and then going on from that state."""
    config = CONFIGS[name]
    model, params = make(config)
    lengths = np.array([9, 6, 4]) if padded else np.full(3, 9)
    state = model.initial_state(3)
    for seed in (3, 4):
        tokens = random_tokens(config, 3, 9, seed)
        logits, end = compiled(config)(params, tokens, state, lengths if padded else None, RESETS)
        for i, l in enumerate(lengths):
            for first, last in pieces(RESETS[i], l):
                start = model.initial_state(1) if RESETS[i, first] else row(state, i)
                piece, steps = tokens[i : i + 1, first:last], (1,) * (last - first)
                alone = run_in_pieces(config, params, piece, steps, start)
                assert_close(row(logits, i)[:, first:last], alone[0], 1e-5)
            assert_close(row(end, i), alone[1], 1e-5)
        state = end


def test_packed_pieces_without_a_state_and_for_last_logits():
    model, params = make(SMALL)
    tokens, state = random_tokens(SMALL, 3, 9), model.initial_state(3)
    logits, end = compiled(SMALL)(params, tokens, state, None, RESETS)
    assert_close(compiled(SMALL)(params, tokens, None, None, RESETS), logits, 1e-6)
    last = compiled(SMALL, "last_logits")(params, tokens, state, None, RESETS)
    assert_close(last, (np.asarray(logits)[:, -1], end), 1e-5)


def test_no_gradient_crosses_a_reset():
    """Exactly zero in the block's input, and nothing that comes before changes what comes after."""
    _, params = make(SMALL)
    p = params["layers_0"]["mixer"]
    u = np.float32(np.random.default_rng(0).normal(size=(2, 9, SMALL.d_model)))
    resets = np.zeros((2, 9), bool)
    resets[:, 4] = True

    @jax.jit
    def block(u, weight):  # and the gradient of Σ weight ⊙ y
        y, pull = jax.vjp(lambda u: MambaBlock(SMALL).apply({"params": p}, u, resets=resets), u)
        return y, pull(weight)[0]

    after, before = np.ones_like(u), np.zeros_like(u)
    after[:, :4], before[:, :4] = 0, 1
    y, gradient = map(np.asarray, block(u, after))
    assert not gradient[:, :4].any() and (gradient[:, 4:] != 0).any(axis=2).all()
    assert (np.asarray(block(u + before, after)[0])[:, 4:] == y[:, 4:]).all()


def test_bad_resets():
    model, params = make(SMALL)
    tokens = random_tokens(SMALL, 2, 9)
    for resets in (np.zeros((2, 8), bool), np.zeros(9, bool), np.zeros((2, 9), np.int32)):
        with pytest.raises(ValueError, match=r"resets must be bool of shape \(b, l\) = \(2, 9\)"):
            model.apply({"params": params}, tokens, resets=resets)


# --- dtypes -------------------------------------------------------------------------------------


def in_bfloat16(params):
    """The matrices and convolutions in bfloat16, as ``from_pretrained`` leaves them."""

    def convert(path, p):
        module, name = path[-2].key, path[-1].key
        keep = name in ("A_log", "D", "scale") or (module, name) == ("dt_proj", "bias")
        return p if keep else p.astype(jnp.bfloat16)

    return jax.tree_util.tree_map_with_path(convert, params)


def test_bfloat16():
    model, params = make(SMALL)
    config = dataclasses.replace(SMALL, dtype=jnp.bfloat16)
    tokens = random_tokens(SMALL, 2, 9)
    expected = compiled(SMALL)(params, tokens)
    logits, state = compiled(config)(in_bfloat16(params), tokens, model.initial_state(2))
    assert logits.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {jnp.dtype(jnp.float32)}
    assert 1e-4 < relative_error(logits, expected) < 2e-2  # it is bfloat16, and it is close


def test_what_stays_float32_in_bfloat16(monkeypatch):
    config = dataclasses.replace(SMALL, dtype=jnp.bfloat16)
    p = in_bfloat16(make(SMALL)[1])["layers_0"]
    seen = {}

    def spy(x, delta, A, B, C, D, **kwargs):
        seen.update(x=x.dtype, delta=delta.dtype, A=A.dtype, D=D.dtype, h=kwargs["h0"].dtype)
        return selective_scan(x, delta, A, B, C, D, **kwargs)

    selective_scan = mamba.block.selective_scan
    monkeypatch.setattr(mamba.block, "selective_scan", spy)
    x = jnp.float32(np.random.default_rng(0).normal(size=(2, 1, config.d_model))) + 100
    y = ResidualBlock(config).apply({"params": p}, x)
    f32, bf16 = jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)
    assert seen == {"x": bf16, "delta": f32, "A": f32, "D": f32, "h": f32}
    out = MambaBlock(config).apply(
        {"params": p["mixer"]}, RMSNorm().apply({"params": p["norm"]}, x)
    )
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


def assert_uniform(values, low, high):
    values, width = np.asarray(values, np.float64).ravel(), high - low
    edge = 20 * width / values.size  # probability e^-20 that nothing falls so near an end
    assert low <= values.min() < low + edge and high - edge < values.max() <= high
    assert stats.kstest(values, stats.uniform(low, width).cdf).pvalue > 1e-3


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


# --- sizes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("d_model", "n_layer", "published"),
    [
        (768, 24, 129_135_360),
        (1024, 48, 371_516_416),
        (1536, 48, 793_204_224),
        (2048, 48, 1_372_178_432),
        (2560, 64, 2_768_345_600),
    ],
)
def test_parameter_counts_are_the_published_ones(d_model, n_layer, published):
    model = Mamba(MambaConfig(d_model=d_model, n_layer=n_layer, vocab_size=50277))
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == published


@every_config
def test_parameter_tree(config):
    c = config
    d, di, n, R, V = c.d_model, c.d_inner, c.d_state, c.rank, c.padded_vocab_size
    expected = {"embedding/embedding": (V, d), "norm_f/scale": (d,)}
    if not c.tie_embeddings:
        expected["lm_head/kernel"] = (d, V)
    for i in range(c.n_layer):
        layer, mixer = f"layers_{i}", f"layers_{i}/mixer"
        expected |= {
            f"{layer}/norm/scale": (d,),
            f"{mixer}/in_proj/kernel": (d, 2 * di),
            f"{mixer}/conv1d/kernel": (c.d_conv, di),
            f"{mixer}/x_proj/kernel": (di, R + 2 * n),
            f"{mixer}/dt_proj/kernel": (R, di),
            f"{mixer}/dt_proj/bias": (di,),
            f"{mixer}/A_log": (di, n),
            f"{mixer}/D": (di,),
            f"{mixer}/out_proj/kernel": (di, d),
        }
        if c.conv_bias:
            expected[f"{mixer}/conv1d/bias"] = (di,)
        if c.bias:
            expected |= {f"{mixer}/in_proj/bias": (2 * di,), f"{mixer}/out_proj/bias": (d,)}
    leaves = jax.tree_util.tree_leaves_with_path(make(config)[1])
    assert {"/".join(k.key for k in path): p.shape for path, p in leaves} == expected


def test_derived_sizes():
    c = MambaConfig(d_model=770, n_layer=1, vocab_size=50277, expand=3)
    assert (c.d_inner, c.rank, c.padded_vocab_size) == (2310, 49, 50280)
    c = dataclasses.replace(c, vocab_size=50280, dt_rank=5, pad_vocab_size_multiple=64)
    assert (c.rank, c.padded_vocab_size) == (5, 50304)
    state = Mamba(c).initial_state(3)
    assert [s.conv.shape + s.ssm.shape for s in state] == [(3, 3, 2310, 3, 2310, 16)]
    assert all(leaf.dtype == jnp.float32 and not leaf.any() for leaf in jax.tree.leaves(state))
    assert hash(c) == hash(dataclasses.replace(c))  # a static argument of jit


# --- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (np.zeros((2, 0), np.int32), "length 0"),
        (np.zeros(4, np.int32), r"\(4,\)"),
        (np.zeros((1, 4), np.float32), "float32"),
        (np.zeros((1, 4), bool), "bool"),
        (np.array([[0, 24]]), "0 to 24"),
        (np.array([[3, -1]]), "-1 to 3"),
    ],
)
@pytest.mark.parametrize("as_array", [np.asarray, jnp.asarray], ids=["numpy", "jax"])
def test_bad_tokens(tokens, message, as_array):
    model, params = make(SMALL)
    with pytest.raises(ValueError, match=message):
        model.apply({"params": params}, as_array(tokens))
    with pytest.raises(ValueError, match=message):
        model.apply({"params": params}, as_array(tokens), model.initial_state(len(tokens)))


def test_id_too_large_under_jit_gives_nan():
    _, params = make(SMALL)
    tokens = random_tokens(SMALL, 2, 9)
    tokens[0, 4] = 24
    logits = np.asarray(compiled(SMALL)(params, tokens))
    assert np.isfinite(logits[0, :4]).all() and np.isnan(logits[0, 4:]).all()
    assert np.isfinite(logits[1]).all()  # another row has no part in it


def test_known_tokens_inside_a_jitted_function():
    model, params = make(SMALL)
    tokens = random_tokens(SMALL, 2, 9)
    tokens[0, 0] = 23  # the last id of the padded vocabulary
    tokens = jnp.asarray(tokens)
    inside = jax.jit(lambda params: model.apply({"params": params}, tokens))  # closes over them
    assert_close(inside(params), compiled(SMALL)(params, tokens), 1e-6)
    with pytest.raises(ValueError, match="to 24"):
        jax.jit(lambda params: model.apply({"params": params}, np.asarray(tokens) + 1))(params)


def test_state_of_another_model():
    model, params = make(SMALL)
    with pytest.raises(ValueError):  # one layer's state for two layers
        compiled(SMALL)(params, random_tokens(SMALL, 1, 3), model.initial_state(1)[:1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"d_model": 0}, "d_model"),
        ({"n_layer": 0}, "n_layer"),
        ({"vocab_size": -1}, "vocab_size"),
        ({"d_state": 0}, "d_state"),
        ({"d_conv": 0}, "d_conv"),
        ({"expand": 0}, "expand"),
        ({"dt_rank": 0}, "rank"),
        ({"pad_vocab_size_multiple": 0}, "pad_vocab_size_multiple"),
        ({"dt_min": 0.2}, "dt_min"),
        ({"dt_min": 0.0}, "dt_min"),
    ],
)
def test_bad_config(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **change)


@pytest.mark.parametrize(
    "lengths, message",
    [
        ([5], "from 5 to 5, but tokens have length 2"),
        ([-1], "from -1 to -1"),
        ([1, 2], r"shape \(1,\)"),
        ([1.0], "must be integers"),
    ],
)
def test_lengths_that_do_not_fit(lengths, message):
    model, params = make(SMALL)
    with pytest.raises(ValueError, match=message):
        model.apply(
            {"params": params}, jnp.array([[1, 2]]), model.initial_state(1), jnp.array(lengths)
        )


def test_a_state_that_does_not_fit():
    model, params = make(SMALL)
    for state in (model.initial_state(2), model.initial_state(1)[1:]):
        with pytest.raises(ValueError, match="not one of 1 rows and this model's sizes"):
            model.apply({"params": params}, jnp.array([[1, 2]]), state)


def test_sizes_are_whole_numbers():
    with pytest.raises(ValueError, match="d_model must be a whole number, at least 1, got 64.5"):
        MambaConfig(d_model=64.5, n_layer=1, vocab_size=8)
