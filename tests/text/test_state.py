"""The state as a value: what continues from it, its size, and files of it."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from mamba.checkpoint.tensors import CheckpointError
from mamba.mamba1 import MambaConfig
from mamba.mamba2 import Mamba2Config
from mamba.mamba3 import Mamba3Config
from mamba.model import Mamba
from mamba.text.generate import stream
from mamba.text.state import TextState, load_state, save_state, state_bytes


def test_generating_from_a_state(read, go_on):
    for settings in ({"temperature": 0}, {}, {"top_p": 0.9}, {"repetition_penalty": 1.5}):
        whole = go_on("def main(日", **settings)
        assert go_on("", state=read("def main(日"), **settings) == whole[10:]
        assert go_on("main(日", state=read("def "), **settings) == whole[4:]


def test_streaming_from_a_state(read, go_on, pair, tokenizer):
    model, params = pair
    settings = {"params": params, "tokenizer": tokenizer, "n_tokens_to_gen": 12}
    settings["key"] = jax.random.key(1)
    texts = stream(model, prompt="", state=read("def main("), **settings)
    assert "".join(texts) == go_on("def main(")[9:]


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


# --- size, and files ------------------------------------------------------------------------------


def test_size(read, pair):
    config = pair[0].config
    short, long = read("a"), read("a" * 300)
    assert sum(v.nbytes for v in jax.tree.leaves(long.layers)) == state_bytes(config)
    assert jax.tree.map(jnp.shape, short) == jax.tree.map(jnp.shape, long)
    beside = {  # numbers in a layer's state beside h
        MambaConfig: 3 * 32,
        Mamba2Config: 3 * (32 + 2 * 2 * 4),
        Mamba3Config: 4 * (1 + 2 * 4 + 2 * 8),  # a head's angle, B of two inputs, and x
    }
    assert state_bytes(config) == 4 * config.n_layer * (beside[type(config)] + 32 * 4)
    published = MambaConfig(d_model=768, n_layer=24, vocab_size=50277)
    assert state_bytes(published) == 4 * 24 * 1536 * 19


class OtherState(NamedTuple):
    """What a layer of another kind of block may remember."""

    window: tuple  # two arrays (b, 2)
    memory: jax.Array  # (b, 3, 5)


@dataclasses.dataclass(frozen=True)
class OtherConfig(MambaConfig):
    """The sizes of such a model."""

    def zero_state(self, batch):
        return OtherState((jnp.zeros((batch, 2)), jnp.ones((batch, 2))), jnp.zeros((batch, 3, 5)))


def test_the_state_of_another_kind_of_block(tmp_path):
    """A state may be any pytree: its size and its names in a file follow from it."""
    model = Mamba(OtherConfig(d_model=16, n_layer=2, vocab_size=257))
    assert state_bytes(model.config) == 4 * 2 * (2 + 2 + 15)
    state, path = TextState.empty(model, 3), tmp_path / "text.safetensors"
    state = state._replace(last=jnp.array([1, 2, 3]))
    save_state(state, path)
    of_layers = [
        f"layers.{i}.{name}" for i in (0, 1) for name in ("window.0", "window.1", "memory")
    ]
    held = safetensors.numpy.load_file(path)
    assert sorted(held) == sorted([*of_layers, "logits", "seen", "last"])
    found = load_state(path, model)
    assert jax.tree.structure(found) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, found, state)


def test_names_in_a_file(read, pair, tmp_path):
    """Files written before must stay readable."""
    save_state(read("a"), tmp_path / "text.safetensors")
    held = safetensors.numpy.load_file(tmp_path / "text.safetensors")
    third = isinstance(pair[0].config, Mamba3Config)
    of_layer = ("angle", "h", "B", "x") if third else ("conv", "ssm")
    of_layers = [f"layers.{i}.{name}" for i in range(pair[0].config.n_layer) for name in of_layer]
    assert sorted(held) == sorted([*of_layers, "logits", "seen", "last"])


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

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="disk full"):
        save_state(read("b"), path)
    assert path.read_bytes() == old
    assert [p.name for p in tmp_path.iterdir()] == ["text.safetensors"]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda a: a.pop("layers.0.SSM"), "missing: layers.0.SSM"),
        (lambda a: a.update(extra=a["last"]), "unexpected: 'extra'"),
        (lambda a: a.pop("logits"), "missing: logits"),
        (
            lambda a: a.update({"layers.0.SSM": a["layers.0.SSM"][:, :-1]}),
            r"wrong shape: layers.0.SSM: expected \(1, (32|4, 8), 4\), found \(1, (31|3, 8), 4\)",
        ),
        (
            lambda a: a.update({"layers.0.PAST": a["layers.0.PAST"].astype(np.float16)}),
            "wrong dtype: layers.0.PAST: expected float32, found float16",
        ),
        (
            lambda a: a.update(seen=np.repeat(a["seen"], 2, 0)),
            r"seen: expected \(1, 264\), found \(2, 264\)",
        ),
        (
            lambda a: a.update(logits=np.array(3, np.float32)),
            r"logits: expected \(1, 264\), found \(\)",
        ),
        (
            lambda a: a.update(last=np.array([264], np.int32)),
            r"last must hold token ids in 0 … 263",
        ),
        (lambda a: a.update(last=np.array([-1], np.int32)), "last must hold token ids"),
        (lambda a: a["layers.0.SSM"].fill(np.nan), "layers.0.SSM holds NaN or infinity"),
        (lambda a: a["logits"].fill(np.inf), "logits holds NaN or infinity"),
        (
            lambda a: a.update({k: v[:0] for k, v in a.items()}),
            "holds no text: its arrays have 0 rows",
        ),
    ],
)
def test_files_that_do_not_fit(read, pair, tmp_path, change, message):
    """SSM is the array of a layer's state that holds h, PAST one that holds the last inputs."""
    third = isinstance(pair[0].config, Mamba3Config)
    names = {"SSM": "h", "PAST": "x"} if third else {"SSM": "ssm", "PAST": "conv"}
    in_file = {f"layers.0.{k}": f"layers.0.{v}" for k, v in names.items()}
    path = tmp_path / "text.safetensors"
    save_state(read("a"), path)
    held = safetensors.numpy.load_file(path)
    arrays = {name: held.pop(found).copy() for name, found in in_file.items()} | held
    change(arrays)
    safetensors.numpy.save_file({in_file.get(k, k): v for k, v in arrays.items()}, path)
    for name, found in names.items():
        message = message.replace(name, found)
    with pytest.raises(CheckpointError, match=message) as error:
        load_state(path, pair[0])
    assert str(path) in str(error.value)


def test_a_state_of_another_model(read, pair, tmp_path):
    path = tmp_path / "text.safetensors"
    save_state(read("a"), path)
    other = Mamba(dataclasses.replace(pair[0].config, n_layer=3, d_state=8))
    with pytest.raises(CheckpointError) as error:
        load_state(path, other)
    layer = other.initial_state(1)[0]
    name = "h" if isinstance(other.config, Mamba3Config) else "ssm"
    shape = getattr(layer, name).shape
    for line in (f"missing: layers.2.{layer._fields[0]}", f"layers.0.{name}: expected {shape}, f"):
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
