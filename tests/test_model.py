"""One model for every use: splits, padding, packed rows, sizes, and what a call refuses."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mamba import Mamba, MambaConfig
from tests.helpers.models import (
    CONFIGS,
    SMALL,
    assert_close,
    compiled,
    every_config,
    every_generation,
    make,
    model_loop,
    random_tokens,
    row,
    run_split,
    to_float64,
)

# --- one call for every use ---------------------------------------------------------------------

SPLITS = [(17,), (1,) * 17, (1, 16), (2, 15), (3, 9, 3, 2), (15, 2), (16, 1)]


@every_config
def test_step_by_step_is_the_whole_sequence(config):
    _, params = make(config)
    tokens = random_tokens(config, 2, 9, seed=1)
    stepped, state = run_split(config, params, tokens, (1,) * 9)
    assert_close(stepped, compiled(config)(params, tokens), 1e-5)
    assert_close((stepped, state), run_split(config, params, tokens, (9,)), 1e-5)


@every_generation
@pytest.mark.parametrize("splits", SPLITS, ids=str)
def test_any_split_is_the_whole_sequence(config, splits):
    _, params = make(config)
    tokens = random_tokens(config, 2, 17, seed=2)
    logits, state = model_loop(to_float64(params), tokens, config)
    assert_close(run_split(config, params, tokens, splits), (logits, state), 1e-5)


@every_generation
@pytest.mark.parametrize("l", [1, 2, 3, 16, 33])  # around the conv's width and the scan's chunk
def test_lengths(config, l):
    _, params = make(config)
    tokens = random_tokens(config, 2, l, seed=l)
    expected = model_loop(to_float64(params), tokens, config)
    assert_close(run_split(config, params, tokens, (l,)), expected, 1e-5)
    assert_close(run_split(config, params, tokens, (1,) * l), expected, 1e-5)


@every_generation
def test_is_causal(config):
    _, params = make(config)
    tokens = random_tokens(config, 2, 9)
    changed = tokens.copy()
    changed[:, 5] = (tokens[:, 5] + 1) % config.vocab_size
    logits, others = (np.asarray(compiled(config)(params, v)) for v in (tokens, changed))
    moved = np.abs(others - logits).max(axis=2)  # (b, l)
    assert (moved[:, :5] == 0).all() and (moved[:, 5:] > 0).all()


@every_generation
def test_last_logits(config):
    model, params = make(config)
    tokens, state = random_tokens(config, 3, 9), model.initial_state(3)
    last = compiled(config, "last_logits")
    expected, _ = model_loop(to_float64(params), tokens, config)
    logits, end = last(params, tokens, state)
    assert_close((logits, end), (expected[:, -1], run_split(config, params, tokens, (9,))[1]), 1e-5)
    lengths = np.array([9, 1, 4])
    logits, end = last(params, tokens, state, lengths)
    _, padded_end = compiled(config)(params, tokens, state, lengths)
    assert_close((logits, end), (expected[np.arange(3), lengths - 1], padded_end), 1e-5)


PADDED = ["default", "d_conv=1", "d_conv=2", "mamba2", "mamba2, untied, biases"]
PADDED += ["mamba3", "mamba3, mimo"]


@pytest.mark.parametrize("name", PADDED)
def test_padded_rows_equal_the_rows_alone(name):
    config = CONFIGS[name]
    model, params = make(config)
    lengths = np.array([9, 1, 2] if name == "default" else [9, 1, 9])
    state = model.initial_state(3)
    for seed in (7, 8):  # from the start, then continuing
        tokens = random_tokens(config, 3, 9, seed)
        tokens = np.where(np.arange(9) < lengths[:, None], tokens, -1)  # any id may stand there
        logits, end = compiled(config)(params, tokens, state, lengths)
        for i, l in enumerate(lengths):
            alone = compiled(config)(params, tokens[i : i + 1, :l], row(state, i))
            assert_close(row(logits, i)[:, :l], alone[0], 1e-5)
            assert_close(row(end, i), alone[1], 1e-6)
        state = end


@every_generation
def test_a_row_without_new_tokens_keeps_its_state(config):
    model, params = make(config)
    tokens = random_tokens(config, 3, 9)
    _, state = compiled(config)(params, tokens, model.initial_state(3))
    _, after = compiled(config)(params, tokens, state, np.array([0, 4, 9]))
    for before, now in zip(*(map(np.asarray, jax.tree.leaves(v)) for v in (state, after))):
        assert (before[0] == now[0]).all() and (before[1] != now[1]).any()


# --- packed rows --------------------------------------------------------------------------------

# Three rows of nine tokens: segments around the conv's width, one that starts at the first token.
RESETS = np.zeros((3, 9), bool)
RESETS[0, [0, 2, 3, 7]] = RESETS[1, [5]] = RESETS[2, [1, 2, 3, 4]] = True


def segments(row, end):
    """-> [(first, last + 1), ...] within the first `end` tokens of one row of resets."""
    edges = sorted({0, *np.flatnonzero(row[:end]), end})
    return list(zip(edges[:-1], edges[1:], strict=True))


@pytest.mark.parametrize("name", PADDED)
@pytest.mark.parametrize("padded", [False, True])
def test_packed_segments_are_the_segments_apart(name, padded):
    """Logits and next state, from the beginning and then going on from that state."""
    config = CONFIGS[name]
    model, params = make(config)
    lengths = np.array([9, 6, 4]) if padded else np.full(3, 9)
    state = model.initial_state(3)
    for seed in (3, 4):
        tokens = random_tokens(config, 3, 9, seed)
        logits, end = compiled(config)(params, tokens, state, lengths if padded else None, RESETS)
        for i, l in enumerate(lengths):
            for first, last in segments(RESETS[i], l):
                start = model.initial_state(1) if RESETS[i, first] else row(state, i)
                segment, steps = tokens[i : i + 1, first:last], (1,) * (last - first)
                alone = run_split(config, params, segment, steps, start)
                assert_close(row(logits, i)[:, first:last], alone[0], 1e-5)
            assert_close(row(end, i), alone[1], 1e-5)
        state = end


@every_generation
def test_packed_segments_without_a_state_and_for_last_logits(config):
    model, params = make(config)
    tokens, state = random_tokens(config, 3, 9), model.initial_state(3)
    logits, end = compiled(config)(params, tokens, state, None, RESETS)
    assert_close(compiled(config)(params, tokens, None, None, RESETS), logits, 1e-6)
    last = compiled(config, "last_logits")(params, tokens, state, None, RESETS)
    assert_close(last, (np.asarray(logits)[:, -1], end), 1e-5)


@every_generation
def test_no_gradient_crosses_a_reset(config):
    """Exactly zero in the block's input, and nothing that comes before changes what comes after."""
    _, params = make(config)
    p = params["layers_0"]["mixer"]
    u = np.float32(np.random.default_rng(0).normal(size=(2, 9, config.d_model)))
    resets = np.zeros((2, 9), bool)
    resets[:, 4] = True

    @jax.jit
    def block(u, weight):  # and the gradient of Σ weight ⊙ y
        y, pull = jax.vjp(lambda u: config.block(None).apply({"params": p}, u, resets=resets)[0], u)
        return y, pull(weight)[0]

    after, before = np.ones_like(u), np.zeros_like(u)
    after[:, :4], before[:, :4] = 0, 1
    y, gradient = map(np.asarray, block(u, after))
    assert not gradient[:, :4].any() and (gradient[:, 4:] != 0).any(axis=2).all()
    assert (np.asarray(block(u + before, after)[0])[:, 4:] == y[:, 4:]).all()


def test_bad_resets():
    model, params = make(SMALL)
    tokens = random_tokens(SMALL, 2, 9)
    for resets in (np.zeros((2, 8), bool), np.zeros(9, bool)):
        with pytest.raises(ValueError, match=r"resets must have shape \(2, 9\)"):
            model.apply({"params": params}, tokens, resets=resets)
    with pytest.raises(TypeError, match="resets must be bool, .* got int32"):
        model.apply({"params": params}, tokens, resets=np.zeros((2, 9), np.int32))
    with pytest.raises(TypeError, match="resets must be an array, got list"):
        model.apply({"params": params}, tokens, resets=[[True] * 9] * 2)


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


@pytest.mark.parametrize("name", [n for n, c in CONFIGS.items() if type(c) is MambaConfig])
def test_parameter_tree(name):
    c = config = CONFIGS[name]
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
        (np.zeros((2, 0), np.int32), r"\(2, 0\): the model needs a row"),
        (np.zeros((0, 2), np.int32), r"\(0, 2\): the model needs a row"),
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


@every_generation
@pytest.mark.parametrize("wrong", [24, 2**31 - 1, -1, -24, -25])
def test_id_outside_the_vocabulary_under_jit_gives_nan(config, wrong):
    _, params = make(config)
    tokens = random_tokens(config, 2, 9)
    tokens[0, 4] = wrong
    logits = np.asarray(compiled(config)(params, tokens))
    assert np.isnan(logits[0, 4:]).all()
    if config is SMALL:  # the matrices of the others carry NaN to all of a chunk
        assert np.isfinite(logits[0, :4]).all()
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


@every_generation
def test_a_state_that_does_not_fit(config):
    model, params = make(config)
    first = model.initial_state(1)
    integers, half = (jax.tree.map(lambda v, d=d: v.astype(d), first) for d in (int, jnp.float16))
    for state in (model.initial_state(2), first[1:], integers, half, [1, 2]):
        with pytest.raises(ValueError, match="not one of 1 rows and this model's sizes"):
            model.apply({"params": params}, jnp.array([[1, 2]]), state)


def test_sizes_are_whole_numbers():
    with pytest.raises(ValueError, match="d_model must be a whole number, .* got 64.5"):
        MambaConfig(d_model=64.5, n_layer=1, vocab_size=8)
