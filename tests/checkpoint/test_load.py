"""A checkpoint becomes parameters: every form of file, every tensor and every number."""

import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file

from mamba import Mamba, MambaConfig
from mamba.checkpoint.names import tensor_table, write_config
from mamba.checkpoint.tensors import CheckpointError
from tests.helpers import bin_files
from tests.helpers.checkpoints import (
    CONFIGS,
    IN_TRANSFORMERS,
    TINY,
    assert_same_bits,
    random_arrays,
    run_python,
    write_folder,
)
from tests.helpers.parameters import FLOAT32

# ------------------------------------------------------------------------ reading weights


@pytest.mark.parametrize("name", CONFIGS)
def test_both_namings_and_all_forms_give_the_same(tmp_path, name):
    config = CONFIGS[name]
    original = write_folder(tmp_path / "original", config)
    model, params = Mamba.from_pretrained(original)
    assert model == Mamba(config)

    if name in IN_TRANSFORMERS:
        theirs = write_folder(tmp_path / "theirs", config, naming="transformers")
        other, other_params = Mamba.from_pretrained(str(theirs))
        assert_same_bits(other_params, params)
        assert other.config.padded_vocab_size == config.padded_vocab_size
        assert other.config.norm_eps == config.norm_eps

    arrays = load_file(original / "model.safetensors")
    (original / "model.safetensors").unlink()
    bin_files.write_bin(original / "pytorch_model.bin", arrays)
    assert_same_bits(Mamba.from_pretrained(original)[1], params)

    (original / "pytorch_model.bin").unlink()
    mapping = {key: f"model-{i % 3}.safetensors" for i, key in enumerate(arrays)}
    for file in set(mapping.values()):
        save_file({k: arrays[k] for k in arrays if mapping[k] == file}, original / file)
    index = {"weight_map": mapping}
    (original / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_same_bits(Mamba.from_pretrained(original)[1], params)


def test_where_each_number_goes(tmp_path):
    """PyTorch's Linear is (out, in) and its Conv1d (channels, 1, width)."""
    arrays = random_arrays(TINY)
    _, params = Mamba.from_pretrained(write_folder(tmp_path, arrays=arrays))
    mixer, name = params["layers_1"]["mixer"], "backbone.layers.1.mixer."
    np.testing.assert_array_equal(mixer["in_proj"]["kernel"], arrays[name + "in_proj.weight"].T)
    conv = arrays[name + "conv1d.weight"]
    for tap in range(TINY.d_conv):
        np.testing.assert_array_equal(mixer["conv1d"]["kernel"][tap], conv[:, 0, tap])
    np.testing.assert_array_equal(mixer["A_log"], arrays[name + "A_log"])
    embedding = arrays["backbone.embedding.weight"]
    np.testing.assert_array_equal(params["embedding"]["embedding"], embedding)
    np.testing.assert_array_equal(params["norm_f"]["scale"], arrays["backbone.norm_f.weight"])


@pytest.mark.parametrize("stored", [np.float16, ml_dtypes.bfloat16, np.float64])
@pytest.mark.parametrize("name", ["defaults", "falcon", "mamba2", "mamba3"])
def test_stored_in_another_dtype(tmp_path, name, stored):
    arrays = random_arrays(CONFIGS[name], dtype=stored)
    _, params = Mamba.from_pretrained(write_folder(tmp_path, CONFIGS[name], arrays=arrays))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
    np.testing.assert_array_equal(
        params["embedding"]["embedding"], arrays["backbone.embedding.weight"].astype(np.float32)
    )


@pytest.mark.parametrize("dtype", [jnp.bfloat16, "bfloat16", np.float16])
@pytest.mark.parametrize("name", ["defaults", "falcon", "mamba2", "mamba2, all", "mamba3, all"])
def test_dtype_is_that_of_the_matrices(tmp_path, name, dtype):
    model, params = Mamba.from_pretrained(write_folder(tmp_path, CONFIGS[name]), dtype=dtype)
    assert model.config.dtype == jnp.dtype(dtype)
    for path, leaf in flatten_dict(params).items():
        float32 = path[-1] in FLOAT32 or path[-2:] == ("dt_proj", "bias")
        assert leaf.dtype == (jnp.float32 if float32 else jnp.dtype(dtype)), path


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.float64, "complex64"])
def test_dtypes_that_make_no_model(tmp_path, dtype):
    with pytest.raises(ValueError, match="dtype must be"):
        Mamba.from_pretrained(write_folder(tmp_path), dtype=dtype)


def test_params_do_not_depend_on_the_file(tmp_path):
    folder = write_folder(tmp_path / "a")
    arrays = load_file(folder / "model.safetensors")
    bin_files.write_bin(folder / "pytorch_model.bin", arrays)
    (folder / "model.safetensors").unlink()
    _, params = Mamba.from_pretrained(folder)
    with open(folder / "pytorch_model.bin", "r+b") as file:
        file.write(bytes((folder / "pytorch_model.bin").stat().st_size))
    assert_same_bits(params, Mamba.from_pretrained(write_folder(tmp_path / "b", arrays=arrays))[1])


def test_safetensors_come_first(tmp_path):
    write_folder(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"broken")
    Mamba.from_pretrained(tmp_path)


# --------------------------------------------------------------- every tensor accounted for


def test_all_that_is_wrong_is_named(tmp_path):
    arrays = random_arrays(TINY)
    del arrays["backbone.layers.0.mixer.D"], arrays["backbone.norm_f.weight"]
    arrays["backbone.layers.1.mixer.A_log"] = np.zeros((16, 15), np.float32)
    arrays["backbone.layers.1.norm.weight"] = np.zeros((8,), np.int64)
    arrays["backbone.layers.2.mixer.D"] = np.zeros((16,), np.float32)
    arrays["optimizer.step"] = np.zeros((), np.float32)
    with pytest.raises(CheckpointError) as info:
        Mamba.from_pretrained(write_folder(tmp_path, arrays=arrays))
    lines = str(info.value).splitlines()
    assert "model.safetensors" in lines[0]
    assert {line.strip() for line in lines[1:]} == {
        "missing: backbone.layers.0.mixer.D (16,)",
        "missing: backbone.norm_f.weight (8,)",
        "wrong shape: backbone.layers.1.mixer.A_log: expected (16, 16), found (16, 15)",
        "wrong dtype: backbone.layers.1.norm.weight: expected floating point, found int64",
        "unexpected: 'backbone.layers.2.mixer.D' (16,)",
        "unexpected: 'optimizer.step' ()",
    }


every_tensor = pytest.mark.parametrize(
    ("config", "name"),
    [
        (config, spec.name)
        for config in ("rank, biases", "mamba2, all", "falcon, untied", "mamba3", "mamba3, all")
        for spec in tensor_table(CONFIGS[config])
    ],
)


@every_tensor
def test_no_tensor_may_be_missing(tmp_path, config, name):
    config = CONFIGS[config]
    arrays = random_arrays(config)
    del arrays[name]
    with pytest.raises(CheckpointError, match=f"missing: {re.escape(name)}"):
        Mamba.from_pretrained(write_folder(tmp_path, config, arrays=arrays))


@every_tensor
def test_a_transposed_tensor_has_the_wrong_shape(tmp_path, config, name):
    config = CONFIGS[config]
    arrays = random_arrays(config)
    arrays[name] = arrays[name][None]
    with pytest.raises(CheckpointError, match=f"wrong shape: {re.escape(name)}: expected"):
        Mamba.from_pretrained(write_folder(tmp_path, config, arrays=arrays))


@pytest.mark.parametrize("naming", ["original", "transformers"])
def test_a_tied_head_may_be_repeated(tmp_path, naming):
    embedding = "embedding" if naming == "original" else "embeddings"
    arrays = random_arrays(TINY, embedding)
    expected = Mamba.from_pretrained(write_folder(tmp_path, naming=naming, arrays=arrays))[1]
    arrays["lm_head.weight"] = arrays[f"backbone.{embedding}.weight"].copy()
    assert_same_bits(
        Mamba.from_pretrained(write_folder(tmp_path, naming=naming, arrays=arrays))[1], expected
    )

    arrays["lm_head.weight"][3, 2] += 1
    for changes in [{}, {"tie_embeddings": None}, {"tie_word_embeddings": None}]:
        folder = write_folder(tmp_path, naming=naming, arrays=arrays, **changes)
        with pytest.raises(CheckpointError, match=r"lm_head.weight differs .* tie_embeddings"):
            Mamba.from_pretrained(folder)
    arrays["lm_head.weight"] = arrays["lm_head.weight"][:-1]
    with pytest.raises(CheckpointError, match="lm_head.weight differs"):
        Mamba.from_pretrained(write_folder(tmp_path, naming=naming, arrays=arrays))


def test_an_untied_head_must_be_there(tmp_path):
    with pytest.raises(CheckpointError, match=r"missing: lm_head.weight \(16, 8\)"):
        Mamba.from_pretrained(
            write_folder(tmp_path, arrays=random_arrays(TINY), tie_embeddings=False)
        )


def test_a_table_is_not_built_for_layers_that_cannot_be_there(tmp_path):
    with pytest.raises(CheckpointError, match="too few for the 2000000000 layers"):
        Mamba.from_pretrained(write_folder(tmp_path, n_layer=2_000_000_000))


def test_broken_files(tmp_path):
    folder = write_folder(tmp_path)
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-10])
    with pytest.raises(CheckpointError, match="not a complete safetensors file"):
        Mamba.from_pretrained(folder)
    (folder / "config.json").write_text('{"d_model": 8,')
    with pytest.raises(CheckpointError, match=r"config\.json: not valid JSON"):
        Mamba.from_pretrained(folder)


# ------------------------------------------------------------------------------ NaN and infinity


@pytest.mark.parametrize("form", ["safetensors", "bin"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_loaded_with_a_warning(tmp_path, form, value):
    config = MambaConfig(d_model=8, n_layer=1, vocab_size=16)
    write_config(tmp_path / "config.json", config)
    arrays = {spec.name: np.ones(spec.shape, np.float32) for spec in tensor_table(config)}
    bad = "backbone.layers.0.mixer.in_proj.weight"
    arrays[bad][3, 2] = value
    if form == "bin":
        bin_files.write_bin(tmp_path / "pytorch_model.bin", arrays)
    else:
        save_file(arrays, tmp_path / "model.safetensors")
    with pytest.warns(UserWarning, match=f"NaN or infinity in {bad}$") as record:
        _, params = Mamba.from_pretrained(tmp_path)
    assert len(record) == 1 and record[0].filename == __file__
    kernel = np.asarray(params["layers_0"]["mixer"]["in_proj"]["kernel"])
    np.testing.assert_array_equal(kernel[2, 3], np.float32(value))
    assert np.isfinite(kernel).sum() == kernel.size - 1


def test_a_number_too_large_for_the_dtype_is_named(tmp_path):
    config = MambaConfig(d_model=8, n_layer=1, vocab_size=16)
    write_config(tmp_path / "config.json", config)
    arrays = {spec.name: np.ones(spec.shape, np.float32) for spec in tensor_table(config)}
    arrays["backbone.embedding.weight"][0, 0] = 1e6
    save_file(arrays, tmp_path / "model.safetensors")
    with pytest.warns(UserWarning, match="NaN or infinity in backbone.embedding.weight"):
        Mamba.from_pretrained(tmp_path, dtype="float16")


# ------------------------------------------------------------------------ in a new process


def test_without_torch_and_transformers(tmp_path):
    folder = write_folder(tmp_path)
    bin_files.write_bin(folder / "pytorch_model.bin", load_file(folder / "model.safetensors"))
    (folder / "model.safetensors").unlink()
    code = """
import json, sys
sys.modules["torch"] = sys.modules["transformers"] = None
from mamba import Mamba
model, params = Mamba.from_pretrained(sys.argv[1])
print(json.dumps(model.config.d_model))
"""
    assert run_python(code, folder) == 8


def test_import_brings_in_neither_torch_nor_transformers_nor_the_hub():
    code = """
import json, sys
import mamba
heavy = {"torch", "transformers", "huggingface_hub", "tokenizers"}
print(json.dumps(sorted(heavy & sys.modules.keys())))
"""
    assert run_python(code) == []


PEAK = """
import json, sys
from mamba import Mamba
import jax.numpy as jnp

def status(key):
    for line in open("/proc/self/status"):
        if line.startswith(key):
            return int(line.split()[1]) * 1024

jnp.zeros(1).block_until_ready()
before = status("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # forget the peak so far
model, params = Mamba.from_pretrained(sys.argv[1])
peak = status("VmHWM") - before
import jax
weights = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
print(json.dumps({"ratio": peak / weights, "megabytes": weights / 2**20}))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("form", ["model.safetensors", "pytorch_model.bin"])
def test_peak_memory(tmp_path, form):
    """200 MB of weights, their tied head repeated as in the published files, load in < 460 MB."""
    config = MambaConfig(d_model=768, n_layer=8, vocab_size=30000)
    rng = np.random.default_rng(0)
    noise = rng.normal(size=30000 * 768).astype(np.float32)
    arrays = {
        spec.name: noise[: np.prod(spec.shape)].reshape(spec.shape) for spec in tensor_table(config)
    }
    arrays["lm_head.weight"] = arrays["backbone.embedding.weight"]
    write_config(tmp_path / "config.json", config)
    if form.endswith(".bin"):
        bin_files.write_bin(tmp_path / form, arrays)
    else:
        save_file(arrays, tmp_path / form)
    result = run_python(PEAK, tmp_path)
    print(result)
    assert result["megabytes"] > 190
    assert 0.9 < result["ratio"] < 2.3


def test_a_folder_has_no_revisions(tmp_path):
    folder = write_folder(tmp_path / "model", TINY)
    with pytest.raises(ValueError, match="is a folder here: it has no revision 'main'"):
        Mamba.from_pretrained(folder, revision="main")
