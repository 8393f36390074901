"""Parameters become a checkpoint, whatever happens meanwhile."""

import dataclasses
import json
import os
import shutil
import stat
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from mamba import Mamba, MambaConfig
from mamba.checkpoint import save
from mamba.checkpoint.names import tensor_table
from tests.helpers.checkpoints import (
    CONFIGS,
    IN_TRANSFORMERS,
    TINY,
    assert_same_bits,
    random_model,
    transformers_config,
    write_folder,
)


@pytest.mark.parametrize("name", CONFIGS)
def test_there_and_back_bit_for_bit(tmp_path, name):
    model, params = random_model(CONFIGS[name])
    model.save_pretrained(params, tmp_path / "new" / "folder")
    again, read = Mamba.from_pretrained(tmp_path / "new" / "folder")
    assert again == model
    assert_same_bits(read, params)
    assert sorted(p.name for p in (tmp_path / "new" / "folder").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]


@pytest.mark.parametrize("name", ["defaults", "falcon", "mamba2, all", "mamba3, all"])
def test_half_precision_there_and_back(tmp_path, name):
    folder = write_folder(tmp_path / "a", CONFIGS[name])
    model, params = Mamba.from_pretrained(folder, dtype=jnp.bfloat16)
    model.save_pretrained(params, tmp_path / "b")
    stored = load_file(tmp_path / "b" / "model.safetensors")
    embedding = "embeddings" if name == "falcon" else "embedding"
    assert stored[f"backbone.{embedding}.weight"].dtype == ml_dtypes.bfloat16
    again, read = Mamba.from_pretrained(tmp_path / "b", dtype=jnp.bfloat16)
    assert again == model
    assert_same_bits(read, params)


def test_saved_in_the_original_naming(tmp_path):
    model, params = random_model(TINY)
    model.save_pretrained(params, tmp_path)
    arrays = load_file(tmp_path / "model.safetensors")
    assert {name: a.shape for name, a in arrays.items()} == {
        spec.name: spec.shape for spec in tensor_table(TINY)
    }
    assert "lm_head.weight" not in arrays
    conv = arrays["backbone.layers.0.mixer.conv1d.weight"]
    np.testing.assert_array_equal(conv[:, 0, :].T, params["layers_0"]["mixer"]["conv1d"]["kernel"])


@pytest.mark.parametrize("name", IN_TRANSFORMERS)
def test_saved_in_transformers_naming(tmp_path, name):
    """The same parameters come back; the vocabulary then counts its padding, as theirs does."""
    model, params = random_model(CONFIGS[name])
    model.save_pretrained(params, tmp_path, naming="transformers")
    data = json.loads((tmp_path / "config.json").read_text())
    expected = transformers_config(model.config)
    optional = {"residual_in_fp32", "initializer_range", "norm_before_gate"}
    expected = {key: v for key, v in expected.items() if key not in optional}
    if "time_step_rank" in expected and model.config.dt_rank is None:
        expected["time_step_rank"] = "auto"
    expected = json.loads(json.dumps(expected))
    assert {key: data[key] for key in expected} == expected
    again, read = Mamba.from_pretrained(tmp_path)
    assert again.config.padded_vocab_size == model.config.padded_vocab_size
    assert type(again.config) is type(model.config)
    assert_same_bits(read, params)
    assert "backbone.embeddings.weight" in load_file(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("name", "naming", "message"),
    [
        ("mamba3", "transformers", "the transformers naming has no Mamba-3"),
        ("falcon", "original", "the original naming has no Falcon-Mamba"),
        ("defaults", "hf", "naming must be one of 'original', 'transformers', got 'hf'"),
    ],
)
def test_a_naming_that_does_not_have_the_model(tmp_path, name, naming, message):
    model, params = random_model(CONFIGS[name])
    with pytest.raises(ValueError, match=message):
        model.save_pretrained(params, tmp_path / "folder", naming=naming)
    assert not (tmp_path / "folder").exists()


def test_float32_parameters_of_a_bfloat16_model(tmp_path):
    """They are written as they are; the dtype given when reading decides whether to round."""
    model, params = random_model(dataclasses.replace(TINY, dtype=jnp.bfloat16))
    model.save_pretrained(params, tmp_path)
    assert_same_bits(Mamba.from_pretrained(tmp_path)[1], params)
    rounded = Mamba.from_pretrained(tmp_path, dtype=jnp.bfloat16)[1]
    kernel = rounded["layers_0"]["mixer"]["in_proj"]["kernel"]
    assert kernel.dtype == jnp.bfloat16
    np.testing.assert_array_equal(
        kernel, params["layers_0"]["mixer"]["in_proj"]["kernel"].astype(jnp.bfloat16)
    )


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_folder_in_the_place_of_a_file(tmp_path, name):
    model, params = random_model(TINY)
    (tmp_path / name).mkdir()
    with pytest.raises(IsADirectoryError, match=f"{name} is a folder: save into another one"):
        model.save_pretrained(params, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_saved_files_are_readable_by_those_whom_the_umask_allows(tmp_path):
    model, params = random_model(TINY)
    model.save_pretrained(params, tmp_path)
    (tmp_path / "other").write_text("")
    expected = stat.S_IMODE((tmp_path / "other").stat().st_mode)
    for name in ("config.json", "model.safetensors"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == expected


def test_only_this_models_params_are_saved(tmp_path):
    model, params = random_model(TINY)
    _, wider = random_model(CONFIGS["untied"])
    for wrong, message in [
        ({"params": params}, "missing: embedding.embedding (16, 8)"),
        (wider, "unexpected: 'lm_head.kernel' (8, 16)"),
        (jax.tree.map(lambda leaf: leaf[..., None], params), "wrong shape: norm_f.scale"),
        (jax.tree.map(lambda leaf: leaf.astype(int), params), "wrong dtype: norm_f.scale"),
    ]:
        with pytest.raises(ValueError) as info:
            model.save_pretrained(wrong, tmp_path / "folder")
        assert message in str(info.value)
    assert not (tmp_path / "folder").exists()


def test_weights_in_another_form_are_not_contradicted(tmp_path):
    model, params = random_model(TINY)
    (tmp_path / "pytorch_model.bin").write_bytes(b"precious")
    with pytest.raises(FileExistsError, match=r"pytorch_model\.bin"):
        model.save_pretrained(params, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["pytorch_model.bin"]


@pytest.mark.parametrize("before", ["nothing", "another model"])
def test_interrupted_at_any_moment(tmp_path, monkeypatch, before):
    """A copy of the folder after every step on disk: what kill -9 would have left there."""
    old, old_params = random_model(CONFIGS["eps, dt"], seed=1)
    new, new_params = random_model(MambaConfig(d_model=4, n_layer=1, vocab_size=8), seed=2)
    folder = tmp_path / "folder"
    if before == "another model":
        old.save_pretrained(old_params, folder)

    moments = []

    def watched(function):
        def wrapper(*arguments, **options):
            for when in ("before", "after"):
                if when == "after":
                    result = function(*arguments, **options)
                copy = tmp_path / f"{len(moments):02} {when} {function.__name__}"
                shutil.copytree(folder, copy)
                moments.append(copy)
            return result

        return wrapper

    for name in ("write_tensors", "write_config"):
        monkeypatch.setattr(save, name, watched(getattr(save, name)))
    for name in ("fsync", "replace"):
        monkeypatch.setattr(os, name, watched(getattr(os, name)))
    monkeypatch.setattr(Path, "unlink", watched(Path.unlink))
    new.save_pretrained(new_params, folder)
    monkeypatch.undo()

    outcomes = []
    for copy in moments:
        try:
            model, params = Mamba.from_pretrained(copy)
        except FileNotFoundError as error:
            assert "config.json" in str(error)
            outcomes.append("refused")
            continue
        outcomes.append("old" if model == old else "new")
        assert model in (old, new)
        assert_same_bits(params, old_params if model == old else new_params)
    order = ["refused", "new"] if before == "nothing" else ["old", "refused", "new"]
    assert [o for i, o in enumerate(outcomes) if i == 0 or o != outcomes[i - 1]] == order
    assert_same_bits(Mamba.from_pretrained(folder)[1], new_params)


@pytest.mark.parametrize("step", range(7))
def test_an_exception_leaves_no_debris(tmp_path, monkeypatch, step):
    """Ctrl-C (or a full disk) in each of the six waits for the disk."""
    old, old_params = random_model(CONFIGS["eps, dt"], seed=1)
    new, new_params = random_model(TINY)
    old.save_pretrained(old_params, tmp_path)
    steps = iter(range(100))

    def interrupt(_):
        if next(steps) == step:
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    try:
        new.save_pretrained(new_params, tmp_path)
    except KeyboardInterrupt:
        assert step < 6
    else:
        assert step == 6
    monkeypatch.undo()
    assert not list(tmp_path.glob("*.part"))

    if step == 0:  # the weights are not on the disk yet: the old model must still be whole
        model, params = Mamba.from_pretrained(tmp_path)
        assert model == old
        assert_same_bits(params, old_params)
    elif step >= 5:
        model, params = Mamba.from_pretrained(tmp_path)
        assert model == new
        assert_same_bits(params, new_params)
    else:
        with pytest.raises(FileNotFoundError, match=r"expected config\.json"):
            Mamba.from_pretrained(tmp_path)


def test_swapped_arguments_of_save_pretrained(tmp_path):
    model = Mamba(MambaConfig(d_model=16, n_layer=1, vocab_size=8))
    for params in (str(tmp_path), tmp_path, None):
        with pytest.raises(TypeError, match=r"save_pretrained\(params, folder\): params must be"):
            model.save_pretrained(params, {})
