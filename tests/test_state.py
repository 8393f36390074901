"""The state as a value: prompts of every length, continuation, its size, and files of it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from tokenizers import Tokenizer

import mamba.prompt
from mamba.block import MambaConfig
from mamba.checkpoint import CheckpointError
from mamba.corpus import train_tokenizer
from mamba.generate import generate, stream
from mamba.model import Mamba
from mamba.prompt import bucket, read_prompt, read_tokens
from mamba.state import TextState, load_state, save_state, state_bytes
from mamba_book.reference import relative_error
from tests.parameters import random_params

CONFIG = MambaConfig(d_model=16, n_layer=2, vocab_size=257, d_state=4, tie_embeddings=False)
KEY = jax.random.key(1)


@pytest.fixture(scope="module")
def tokenizer():
    """Byte-level, without merges: reading a text in two parts is reading the same tokens."""
    return train_tokenizer([], 257)


@pytest.fixture(scope="module")
def pair():
    model = Mamba(CONFIG)
    return model, random_params(model)


@pytest.fixture
def read(pair, tokenizer):
    model, params = pair
    return lambda prompt, state=None: read_prompt(
        model, params=params, tokenizer=tokenizer, prompt=prompt, state=state
    )


@pytest.fixture
def go_on(pair, tokenizer):
    model, params = pair
    settings = {"params": params, "tokenizer": tokenizer, "key": KEY, "n_tokens_to_gen": 12}
    return lambda prompt, **changes: generate(model, prompt=prompt, **(settings | changes))


def assert_close(a, b, tolerance):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        if jnp.issubdtype(x.dtype, jnp.floating):
            assert relative_error(x, y) < tolerance
        else:
            np.testing.assert_array_equal(x, y)


def ids(n, seed=0):
    return np.random.default_rng(seed).integers(0, 257, n).tolist()


def unpadded(pair, row, state):
    """The state after reading a row as it is, token by token, with no lengths and no pads."""
    model, params = pair
    layers, seen = state.layers, np.array(state.seen)
    for token in row:
        logits, layers = _last_logits(model, params, np.array([[token]], np.int32), layers)
    seen[0, row] = True
    return TextState(layers, logits, seen, np.array(row[-1:], np.int32))


_last_logits = jax.jit(
    lambda model, params, *args: model.apply({"params": params}, *args, method="last_logits"),
    static_argnums=0,
)


# --- prompts of every length ----------------------------------------------------------------------


def test_buckets():
    assert [bucket(n) for n in (1, 16, 17, 32, 33, 2048)] == [16, 16, 32, 32, 64, 2048]


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 129])
def test_a_padded_prompt_has_the_state_of_the_bare_one(pair, n):
    model, params = pair
    start = TextState.empty(model, 1)
    found = read_tokens(model, params, [ids(n)], start)
    assert_close(found.layers, unpadded(pair, ids(n), start).layers, 1e-6)
    assert_close(found, unpadded(pair, ids(n), start), 1e-5)
    again = read_tokens(model, params, [ids(n, 1)], found)  # and continuing
    assert_close(again.layers, unpadded(pair, ids(n, 1), found).layers, 1e-6)


def test_what_a_pad_holds_does_not_matter(pair):
    """Whatever token fills up the row: the same state, bit for bit."""
    model, params = pair
    lengths, start = np.array([5]), TextState.empty(model, 1)
    states = []
    for pad in (0, 200):
        tokens = np.full((1, 16), pad, np.int32)
        tokens[0, :5] = ids(5)
        states.append(mamba.prompt._read(model, params, tokens, lengths, start))
    for a, b in zip(jax.tree.leaves(states[0]), jax.tree.leaves(states[1]), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_ragged_batch_has_the_states_of_its_rows(pair):
    model, params = pair
    rows = [ids(n, n) for n in (1, 40, 3, 17, 16)]
    together = read_tokens(model, params, rows, TextState.empty(model, 5))
    for i, row in enumerate(rows):
        alone = read_tokens(model, params, [row], TextState.empty(model, 1))
        of_row = jax.tree.map(lambda v, i=i: np.asarray(v)[i : i + 1], together)
        assert_close(of_row, alone, 1e-5)


def test_a_long_prompt_is_read_in_pieces(pair, monkeypatch):
    model, params = pair
    rows, start = [ids(100), ids(20, 1), ids(33, 2)], TextState.empty(model, 3)
    whole = read_tokens(model, params, rows, start)
    sizes = []
    read = mamba.prompt._read

    def spy(model, params, tokens, lengths, state):
        sizes.append((tokens.shape[1], lengths.tolist()))
        return read(model, params, tokens, lengths, state)

    monkeypatch.setattr(mamba.prompt, "_read", spy)
    monkeypatch.setattr(mamba.prompt, "PIECE", 32)
    assert_close(read_tokens(model, params, rows, start), whole, 1e-5)
    assert sizes == [(32, [32, 20, 32]), (32, [32, 0, 1]), (32, [32, 0, 0]), (16, [4, 0, 0])]


def test_twenty_lengths_cause_few_compilations(tokenizer):
    model = Mamba(dataclasses.replace(CONFIG, n_layer=1, norm_eps=3e-5))  # not compiled before
    params = random_params(model)
    before = mamba.prompt._read._cache_size()
    for n in range(1, 61, 3):
        read_prompt(model, params=params, tokenizer=tokenizer, prompt="x" * n)
    assert mamba.prompt._read._cache_size() - before == 3  # 16, 32 and 64


# --- continuation -------------------------------------------------------------------------------


@pytest.mark.parametrize("split", [1, 2, 5, 16, 17, 30])
def test_reading_in_two_parts_is_reading_the_whole(read, split):
    text = "def main(argv): return 日本語 1"
    assert_close(read(text[split:], read(text[:split])), read(text), 1e-5)


def test_gradient_through_the_state(pair):
    """Of the loss on later tokens by what was read before, the state being all between the two."""
    model, params = pair
    row = jnp.array([ids(12)])
    expected = jax.nn.one_hot(jnp.array(ids(6, 1)), 264)

    def in_two(params):
        _, state = model.apply({"params": params}, row[:, :6], model.initial_state(1))
        logits, _ = model.apply({"params": params}, row[:, 6:], state)
        return -(jax.nn.log_softmax(logits[0]) * expected).sum()

    def in_one(params):
        logits = model.apply({"params": params}, row)[:, 6:]
        return -(jax.nn.log_softmax(logits[0]) * expected).sum()

    def cut(params):
        _, state = model.apply({"params": params}, row[:, :6], model.initial_state(1))
        logits, _ = model.apply({"params": params}, row[:, 6:], jax.lax.stop_gradient(state))
        return -(jax.nn.log_softmax(logits[0]) * expected).sum()

    ours, whole, part = jax.jit(lambda p: [jax.grad(f)(p) for f in (in_two, in_one, cut)])(params)
    assert_close(ours, whole, 1e-4)
    part, whole = (v["layers_0"]["mixer"]["A_log"] for v in (part, whole))
    assert relative_error(part, whole) > 1e-2  # it does carry some


def test_generating_from_a_state(read, go_on):
    for settings in ({"temperature": 0}, {}, {"top_p": 0.9}, {"repetition_penalty": 1.5}):
        whole = go_on("def main(日", **settings)
        assert go_on("", state=read("def main(日"), **settings) == whole[10:]
        assert go_on("main(日", state=read("def "), **settings) == whole[4:]


def test_streaming_from_a_state(read, go_on, pair, tokenizer):
    model, params = pair
    settings = {"params": params, "tokenizer": tokenizer, "key": KEY, "n_tokens_to_gen": 12}
    pieces = stream(model, prompt="", state=read("def main("), **settings)
    assert "".join(pieces) == go_on("def main(")[9:]


def test_many_continuations_of_one_state(read, go_on):
    state = read("def main(")
    texts = go_on(["", "a", "", "args, kwargs"], state=state, temperature=0)
    alone = [go_on(p, state=state, temperature=0) for p in ["", "a", "", "args, kwargs"]]
    assert texts == alone and texts[0] == texts[2]
    drawn = go_on(["", ""], state=state)
    assert drawn[0] != drawn[1] and drawn[0] == go_on("", state=state)
    two = read(["def main(", "日本"])
    assert go_on(["", "x"], state=two, temperature=0) == [
        texts[0],
        go_on("x", state=read("日本"), temperature=0),
    ]


def test_a_state_is_not_changed_by_use(read, go_on):
    state = read("def")
    before = jax.tree.map(np.array, state)
    go_on("x", state=state)
    jax.tree.map(np.testing.assert_array_equal, state, before)


def test_no_special_tokens_in_the_middle_of_a_text(pair, tokenizer):
    from tokenizers.processors import TemplateProcessing

    begins = Tokenizer.from_str(tokenizer.to_str())
    begins.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    model, params = pair
    arguments = {"params": params, "tokenizer": begins}
    state = read_prompt(model, prompt="ab", **arguments)
    state = read_prompt(model, prompt="cd", state=state, **arguments)
    assert_close(state, read_prompt(model, prompt="abcd", **arguments), 1e-5)


def test_errors_of_use(read, go_on, tokenizer):
    state = read(["a", "b"])
    with pytest.raises(ValueError, match="the state holds 2 texts: give as many prompts, not 3"):
        go_on(["a", "b", "c"], state=state)
    with pytest.raises(ValueError, match="the state holds 2 texts"):
        go_on("a", state=state)
    with pytest.raises(TypeError, match="as read_prompt returns it, got <class 'tuple'>"):
        go_on("a", state=state.layers)
    with pytest.raises(ValueError, match="the prompt '' has no tokens"):
        read("")
    other = Mamba(dataclasses.replace(CONFIG, d_state=5))
    params = random_params(other)
    with pytest.raises(ValueError, match="the state is that of a model of other sizes"):
        read_prompt(other, params=params, tokenizer=tokenizer, prompt="a", state=read("a"))


# --- size, and files ------------------------------------------------------------------------------


def test_size(read):
    short, long = read("a"), read("a" * 300)
    assert sum(v.nbytes for v in jax.tree.leaves(long.layers)) == state_bytes(CONFIG)
    assert jax.tree.map(jnp.shape, short) == jax.tree.map(jnp.shape, long)
    assert state_bytes(CONFIG) == 4 * 2 * 32 * (3 + 4)
    published = MambaConfig(d_model=768, n_layer=24, vocab_size=50277)
    assert state_bytes(published) == 4 * 24 * 1536 * 19


def test_to_disk_and_back(read, go_on, pair, tmp_path):
    state, path = read(["def main(", "日本"]), tmp_path / "text.safetensors"
    save_state(state, path)
    found = load_state(path, pair[0])
    assert type(found) is TextState and jax.tree.structure(found) == jax.tree.structure(state)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(state), strict=True):
        assert a.dtype == b.dtype and (a == b).all()
    assert [p.name for p in tmp_path.iterdir()] == ["text.safetensors"]
    settings = {"repetition_penalty": 2.0}
    assert go_on(["", "x"], state=found, **settings) == go_on(["", "x"], state=state, **settings)
    save_state(read("b"), path)  # over the old one
    assert load_state(path, pair[0]).last.shape == (1,)


def test_an_interrupted_save_leaves_the_old_file(read, pair, tmp_path, monkeypatch):
    path = tmp_path / "text.safetensors"
    save_state(read("a"), path)
    old = path.read_bytes()

    def full(descriptor):
        raise OSError("disk full")

    monkeypatch.setattr("mamba.state.os.fsync", full)
    with pytest.raises(OSError, match="disk full"):
        save_state(read("b"), path)
    assert path.read_bytes() == old
    assert [p.name for p in tmp_path.iterdir()] == ["text.safetensors"]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda a: a.pop("layers.1.ssm"), "missing: layers.1.ssm"),
        (lambda a: a.update(extra=a["last"]), "unexpected: extra"),
        (lambda a: a.pop("logits"), "missing: logits"),
        (
            lambda a: a.update({"layers.0.ssm": a["layers.0.ssm"][:, :-1]}),
            r"layers.0.ssm: expected float32 \(1, 32, 4\), found float32 \(1, 31, 4\)",
        ),
        (
            lambda a: a.update({"layers.0.conv": a["layers.0.conv"].astype(np.float16)}),
            r"layers.0.conv: expected float32 \(1, 3, 32\), found float16 \(1, 3, 32\)",
        ),
        (lambda a: a.update(seen=np.repeat(a["seen"], 2, 0)), r"seen: expected bool \(1, 264\)"),
        (lambda a: a.update(logits=np.array(3, np.float32)), "logits: expected float32"),
        (
            lambda a: a.update(last=np.array([264], np.int32)),
            r"last must hold token ids in 0 … 263",
        ),
        (lambda a: a.update(last=np.array([-1], np.int32)), "last must hold token ids"),
        (lambda a: a["layers.1.ssm"].fill(np.nan), "layers.1.ssm holds NaN or infinity"),
        (lambda a: a["logits"].fill(np.inf), "logits holds NaN or infinity"),
        (
            lambda a: a.update({k: v[:0] for k, v in a.items()}),
            "it holds no text at all: its arrays have 0 rows",
        ),
    ],
)
def test_files_that_do_not_fit(read, pair, tmp_path, change, message):
    path = tmp_path / "text.safetensors"
    save_state(read("a"), path)
    arrays = {name: array.copy() for name, array in safetensors.numpy.load_file(path).items()}
    change(arrays)
    safetensors.numpy.save_file(arrays, path)
    with pytest.raises(CheckpointError, match=message) as error:
        load_state(path, pair[0])
    assert str(path) in str(error.value)


def test_a_state_of_another_model(read, pair, tmp_path):
    path = tmp_path / "text.safetensors"
    save_state(read("a"), path)
    other = Mamba(dataclasses.replace(CONFIG, n_layer=3, d_state=8))
    with pytest.raises(CheckpointError) as error:
        load_state(path, other)
    for line in ("missing: layers.2.conv", "layers.0.ssm: expected float32 (1, 32, 8), found"):
        assert line in str(error.value)


def test_files_that_are_no_files_of_states(read, pair, tmp_path):
    path = tmp_path / "text.safetensors"
    with pytest.raises(FileNotFoundError):
        load_state(path, pair[0])
    save_state(read("a"), path)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="not a complete safetensors file"):
        load_state(path, pair[0])
    for function in (lambda p: save_state(read("a"), p), lambda p: load_state(p, pair[0])):
        with pytest.raises(ValueError, match="text.bin: a state is kept in a file .* .safetensors"):
            function(tmp_path / "text.bin")
