"""from_pretrained and save_pretrained: every key and every tensor is accounted for."""

import json
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import bin_files
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from hub_server import HubServer
from safetensors.numpy import load_file, save_file

from mamba import pretrained
from mamba.block import MambaConfig
from mamba.checkpoint import CheckpointError
from mamba.model import Mamba
from mamba.naming import read_config, tensor_table, write_config
from mamba.pretrained import from_pretrained, load_tokenizer, save_pretrained

ROOT = Path(__file__).parent.parent
TINY = MambaConfig(d_model=8, n_layer=2, vocab_size=13)
CONFIGS = {
    "defaults": TINY,
    "state 1": MambaConfig(d_model=8, n_layer=1, vocab_size=16, d_state=1, expand=1),
    "state 5": MambaConfig(d_model=6, n_layer=2, vocab_size=9, d_state=5, d_conv=3, expand=3),
    "conv 2": MambaConfig(d_model=4, n_layer=1, vocab_size=7, d_conv=2, conv_bias=False),
    "rank, biases": MambaConfig(d_model=8, n_layer=1, vocab_size=8, dt_rank=3, bias=True),
    "untied": MambaConfig(d_model=8, n_layer=1, vocab_size=11, tie_embeddings=False),
    "padding": MambaConfig(d_model=4, n_layer=1, vocab_size=13, pad_vocab_size_multiple=5),
    "eps, dt": MambaConfig(
        d_model=4,
        n_layer=1,
        vocab_size=8,
        norm_eps=3e-3,
        dt_min=1e-4,
        dt_max=0.5,
        dt_init_floor=2e-4,
    ),
}


def random_arrays(config, embedding="embedding", dtype=np.float32):
    """A checkpoint's tensors, in the checkpoint's names and shapes."""
    rng = np.random.default_rng(0)
    return {
        row.name: rng.normal(size=row.shape).astype(dtype)
        for row in tensor_table(config, embedding)
    }


def transformers_config(config):
    return {
        "model_type": "mamba",
        "architectures": ["MambaForCausalLM"],
        "hidden_size": config.d_model,
        "intermediate_size": config.d_inner,
        "num_hidden_layers": config.n_layer,
        "vocab_size": config.padded_vocab_size,
        "state_size": config.d_state,
        "conv_kernel": config.d_conv,
        "expand": config.expand,
        "time_step_rank": config.rank,
        "use_bias": config.bias,
        "use_conv_bias": config.conv_bias,
        "layer_norm_epsilon": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "hidden_act": "silu",
        "residual_in_fp32": True,
        "initializer_range": 0.1,
    }


def write_folder(folder, config=TINY, *, naming="original", arrays=None, **changes):
    """A checkpoint folder as others write it. ``changes`` to config.json; None deletes a key."""
    folder.mkdir(exist_ok=True)
    if naming == "original":
        write_config(folder / "config.json", config)
        data = json.loads((folder / "config.json").read_text())
    else:
        data = transformers_config(config)
    data = {key: value for key, value in (data | changes).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(data))
    if arrays is None:
        arrays = random_arrays(config, "embedding" if naming == "original" else "embeddings")
    save_file(arrays, folder / "model.safetensors")
    return folder


def same_bits(a, b):
    a, b = flatten_dict(a), flatten_dict(b)
    assert a.keys() == b.keys()
    for path in a:
        assert a[path].dtype == b[path].dtype and a[path].shape == b[path].shape, path
        assert np.asarray(a[path]).tobytes() == np.asarray(b[path]).tobytes(), path


def tree_of(config):
    tokens = jnp.zeros((1, 1), jnp.int32)
    return jax.eval_shape(Mamba(config).init, jax.random.key(0), tokens)["params"]


# ---------------------------------------------------------------------------- the table


@pytest.mark.parametrize("name", CONFIGS)
def test_the_table_is_the_models_parameters(name):
    config = CONFIGS[name]
    expected = {path: leaf.shape for path, leaf in flatten_dict(tree_of(config), sep=".").items()}
    assert {row.path: row.our_shape for row in tensor_table(config)} == expected


@pytest.mark.parametrize(
    "d_model, n_layer, parameters",
    [
        (768, 24, 129_135_360),
        (1024, 48, 371_516_416),
        (1536, 48, 793_204_224),
        (2048, 48, 1_372_178_432),
        (2560, 64, 2_768_345_600),
    ],
)
def test_the_table_has_the_published_sizes(d_model, n_layer, parameters):
    rows = tensor_table(MambaConfig(d_model=d_model, n_layer=n_layer, vocab_size=50277))
    assert sum(np.prod(row.shape) for row in rows) == parameters
    assert rows[0].shape == (50280, d_model)


# ------------------------------------------------------------------------ reading weights


@pytest.mark.parametrize("name", CONFIGS)
def test_both_namings_and_all_forms_give_the_same(tmp_path, name):
    config = CONFIGS[name]
    original = write_folder(tmp_path / "original", config)
    model, params = from_pretrained(original)
    assert model == Mamba(config)

    theirs = write_folder(tmp_path / "theirs", config, naming="transformers")
    other, other_params = from_pretrained(str(theirs))
    same_bits(other_params, params)
    assert other.config.padded_vocab_size == config.padded_vocab_size
    assert other.config.norm_eps == config.norm_eps and other.config.rank == config.rank

    arrays = load_file(original / "model.safetensors")
    (original / "model.safetensors").unlink()
    bin_files.write_bin(original / "pytorch_model.bin", arrays)
    same_bits(from_pretrained(original)[1], params)

    (original / "pytorch_model.bin").unlink()
    mapping = {key: f"model-{i % 3}.safetensors" for i, key in enumerate(arrays)}
    for file in set(mapping.values()):
        save_file({k: arrays[k] for k in arrays if mapping[k] == file}, original / file)
    index = {"weight_map": mapping}
    (original / "model.safetensors.index.json").write_text(json.dumps(index))
    same_bits(from_pretrained(original)[1], params)


def test_where_each_number_goes(tmp_path):
    """Spelled out: PyTorch's Linear is (out, in), its Conv1d (channels, 1, width)."""
    arrays = random_arrays(TINY)
    _, params = from_pretrained(write_folder(tmp_path, arrays=arrays))
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
def test_stored_in_another_dtype(tmp_path, stored):
    arrays = random_arrays(TINY, dtype=stored)
    _, params = from_pretrained(write_folder(tmp_path, arrays=arrays))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
    np.testing.assert_array_equal(
        params["embedding"]["embedding"], arrays["backbone.embedding.weight"].astype(np.float32)
    )


@pytest.mark.parametrize("dtype", [jnp.bfloat16, "bfloat16", np.float16])
def test_dtype_is_that_of_the_matrices(tmp_path, dtype):
    model, params = from_pretrained(write_folder(tmp_path), dtype=dtype)
    assert model.config.dtype == jnp.dtype(dtype)
    kept = {"scale", "A_log", "D"}
    for path, leaf in flatten_dict(params).items():
        float32 = path[-1] in kept or path[-2:] == ("dt_proj", "bias")
        assert leaf.dtype == (jnp.float32 if float32 else jnp.dtype(dtype)), path


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.float64, "complex64"])
def test_dtypes_that_make_no_model(tmp_path, dtype):
    with pytest.raises(ValueError, match="dtype must be"):
        from_pretrained(write_folder(tmp_path), dtype=dtype)


def test_params_do_not_depend_on_the_file(tmp_path):
    folder = write_folder(tmp_path / "a")
    arrays = load_file(folder / "model.safetensors")
    bin_files.write_bin(folder / "pytorch_model.bin", arrays)
    (folder / "model.safetensors").unlink()
    _, params = from_pretrained(folder)
    with open(folder / "pytorch_model.bin", "r+b") as file:
        file.write(bytes((folder / "pytorch_model.bin").stat().st_size))
    same_bits(params, from_pretrained(write_folder(tmp_path / "b", arrays=arrays))[1])


def test_safetensors_come_first(tmp_path):
    write_folder(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"broken")
    from_pretrained(tmp_path)


# --------------------------------------------------------------- every tensor accounted for


def test_all_that_is_wrong_is_named(tmp_path):
    arrays = random_arrays(TINY)
    del arrays["backbone.layers.0.mixer.D"], arrays["backbone.norm_f.weight"]
    arrays["backbone.layers.1.mixer.A_log"] = np.zeros((16, 15), np.float32)
    arrays["backbone.layers.1.norm.weight"] = np.zeros((8,), np.int64)
    arrays["backbone.layers.2.mixer.D"] = np.zeros((16,), np.float32)
    arrays["optimizer.step"] = np.zeros((), np.float32)
    with pytest.raises(CheckpointError) as info:
        from_pretrained(write_folder(tmp_path, arrays=arrays))
    lines = str(info.value).splitlines()
    assert "model.safetensors" in lines[0]
    assert {line.strip() for line in lines[1:]} == {
        "missing: backbone.layers.0.mixer.D (16,)",
        "missing: backbone.norm_f.weight (8,)",
        "wrong shape: backbone.layers.1.mixer.A_log: expected (16, 16), found (16, 15)",
        "wrong dtype: backbone.layers.1.norm.weight: expected floating point, found int64",
        "unexpected: backbone.layers.2.mixer.D (16,)",
        "unexpected: optimizer.step ()",
    }


@pytest.mark.parametrize("name", [row.name for row in tensor_table(CONFIGS["rank, biases"])])
def test_no_tensor_may_be_missing(tmp_path, name):
    config = CONFIGS["rank, biases"]
    arrays = random_arrays(config)
    del arrays[name]
    with pytest.raises(CheckpointError, match=f"missing: {re.escape(name)}"):
        from_pretrained(write_folder(tmp_path, config, arrays=arrays))


@pytest.mark.parametrize("name", [row.name for row in tensor_table(CONFIGS["rank, biases"])])
def test_a_transposed_tensor_has_the_wrong_shape(tmp_path, name):
    config = CONFIGS["rank, biases"]
    arrays = random_arrays(config)
    arrays[name] = arrays[name][None]
    with pytest.raises(CheckpointError, match=f"wrong shape: {re.escape(name)}: expected"):
        from_pretrained(write_folder(tmp_path, config, arrays=arrays))


@pytest.mark.parametrize("naming", ["original", "transformers"])
def test_a_tied_head_may_be_repeated(tmp_path, naming):
    embedding = "embedding" if naming == "original" else "embeddings"
    arrays = random_arrays(TINY, embedding)
    expected = from_pretrained(write_folder(tmp_path, naming=naming, arrays=arrays))[1]
    arrays["lm_head.weight"] = arrays[f"backbone.{embedding}.weight"].copy()
    same_bits(from_pretrained(write_folder(tmp_path, naming=naming, arrays=arrays))[1], expected)

    arrays["lm_head.weight"][3, 2] += 1
    for changes in [{}, {"tie_embeddings": None}, {"tie_word_embeddings": None}]:
        folder = write_folder(tmp_path, naming=naming, arrays=arrays, **changes)
        with pytest.raises(CheckpointError, match=r"lm_head.weight differs .* tie_embeddings"):
            from_pretrained(folder)
    arrays["lm_head.weight"] = arrays["lm_head.weight"][:-1]
    with pytest.raises(CheckpointError, match="lm_head.weight differs"):
        from_pretrained(write_folder(tmp_path, naming=naming, arrays=arrays))


def test_an_untied_head_must_be_there(tmp_path):
    with pytest.raises(CheckpointError, match=r"missing: lm_head.weight \(16, 8\)"):
        from_pretrained(write_folder(tmp_path, arrays=random_arrays(TINY), tie_embeddings=False))


def test_a_table_is_not_built_for_layers_that_cannot_be_there(tmp_path):
    with pytest.raises(CheckpointError, match="too few for the 2000000000 layers"):
        from_pretrained(write_folder(tmp_path, n_layer=2_000_000_000))


# ------------------------------------------------------------------------- config.json


def config_of(folder, naming="original", **changes):
    return read_config(write_folder(folder, naming=naming, arrays={}, **changes) / "config.json")


def test_the_published_original_config(tmp_path):
    """As in state-spaces/mamba-130m: unpadded vocabulary, nothing about the SSM or the head."""
    data = {
        "d_model": 768,
        "n_layer": 24,
        "vocab_size": 50277,
        "ssm_cfg": {},
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": 8,
    }
    (tmp_path / "config.json").write_text(json.dumps(data))
    config = read_config(tmp_path / "config.json")
    assert config == MambaConfig(d_model=768, n_layer=24, vocab_size=50277)
    assert (config.padded_vocab_size, config.rank, config.d_inner) == (50280, 48, 1536)


def test_the_published_transformers_config(tmp_path):
    """As in state-spaces/mamba-130m-hf: the original keys are carried along, and count nothing."""
    data = transformers_config(MambaConfig(d_model=768, n_layer=24, vocab_size=50280)) | {
        "d_model": 768,
        "d_inner": 1536,
        "n_layer": 24,
        "pad_vocab_size_multiple": 8,
        "ssm_cfg": {},
        "rms_norm": True,
        "fused_add_norm": True,
        "time_step_floor": 0.0001,
        "time_step_init_scheme": "random",
        "torch_dtype": "float32",
        "transformers_version": "4.39.0.dev0",
        "bos_token_id": 0,
    }
    del data["tie_word_embeddings"]
    (tmp_path / "config.json").write_text(json.dumps(data))
    config = read_config(tmp_path / "config.json", jnp.bfloat16)
    assert (config.d_model, config.n_layer, config.rank) == (768, 24, 48)
    assert config.vocab_size == config.padded_vocab_size == 50280
    assert config.dtype == jnp.bfloat16 and config.tie_embeddings


def test_transformers_vocabulary_is_not_padded_again(tmp_path):
    config = config_of(tmp_path, "transformers", vocab_size=13, pad_vocab_size_multiple=8)
    assert config.padded_vocab_size == config.vocab_size == 13


@pytest.mark.parametrize(
    "naming, key, value, field, expected",
    [
        ("original", "ssm_cfg", {"d_state": 5}, "d_state", 5),
        ("original", "ssm_cfg", {"d_conv": 2}, "d_conv", 2),
        ("original", "ssm_cfg", {"expand": 3}, "expand", 3),
        ("original", "ssm_cfg", {"dt_rank": 7}, "rank", 7),
        ("original", "ssm_cfg", {"dt_rank": "auto"}, "rank", 1),
        ("original", "ssm_cfg", {"bias": True}, "bias", True),
        ("original", "ssm_cfg", {"conv_bias": False}, "conv_bias", False),
        ("original", "ssm_cfg", {"dt_max": 0.5}, "dt_max", 0.5),
        ("original", "ssm_cfg", {"layer": "Mamba1", "use_fast_path": False}, "d_state", 16),
        ("original", "norm_epsilon", 1e-6, "norm_eps", 1e-6),
        ("original", "tie_embeddings", False, "tie_embeddings", False),
        ("original", "pad_vocab_size_multiple", 1, "padded_vocab_size", 13),
        ("original", "attn_layer_idx", [], "n_layer", 2),
        ("transformers", "state_size", 5, "d_state", 5),
        ("transformers", "conv_kernel", 2, "d_conv", 2),
        ("transformers", "time_step_rank", "auto", "rank", 1),
        ("transformers", "time_step_rank", 9, "rank", 9),
        ("transformers", "use_bias", True, "bias", True),
        ("transformers", "use_conv_bias", False, "conv_bias", False),
        ("transformers", "layer_norm_epsilon", 1e-6, "norm_eps", 1e-6),
        ("transformers", "tie_word_embeddings", False, "tie_embeddings", False),
        ("transformers", "hidden_act", "swish", "n_layer", 2),
    ],
)
def test_values_are_honoured(tmp_path, naming, key, value, field, expected):
    assert getattr(config_of(tmp_path, naming, **{key: value}), field) == expected


@pytest.mark.parametrize(
    "naming, key, value, told",
    [
        ("original", "ssm_cfg", {"layer": "Mamba2"}, 'ssm_cfg.layer = "Mamba2"'),
        ("original", "ssm_cfg", {"layer": None}, "ssm_cfg.layer = null"),
        ("original", "ssm_cfg", {"headdim": 64}, '"ssm_cfg.headdim"'),
        ("original", "ssm_cfg", [], "ssm_cfg must be an object"),
        ("original", "attn_layer_idx", [3], "attn_layer_idx = [3]"),
        ("original", "d_intermediate", 64, "d_intermediate = 64"),
        ("original", "d_intermediate", False, "d_intermediate = false"),
        ("original", "rms_norm", False, "rms_norm = false"),
        ("original", "rms_norm", 1, "rms_norm = 1"),
        ("original", "model_type", "mamba2", 'model_type = "mamba2"'),
        ("original", "rotary", 3, '"rotary"'),
        ("original", "x" * 10**5, 3, '"xxxxx'),
        ("transformers", "model_type", "mamba2", 'model_type = "mamba2"'),
        ("transformers", "model_type", "falcon_mamba", 'model_type = "falcon_mamba"'),
        ("transformers", "model_type", ["mamba"], 'model_type = ["mamba"]'),
        ("transformers", "hidden_act", "gelu", 'hidden_act = "gelu"'),
        ("transformers", "intermediate_size", 17, "intermediate_size = 17"),
        ("transformers", "expand", 3, "intermediate_size = 16"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(tmp_path, naming, key, value, told):
    with pytest.raises(CheckpointError) as info:
        config_of(tmp_path, naming, **{key: value})
    assert "config.json" in str(info.value) and told in str(info.value)
    assert len(str(info.value)) < 1000


SIZES = [0, -1, True, "16", 16.0, 1.5, [16], {}, 2**31, 10**400]


@pytest.mark.parametrize("value", SIZES)
@pytest.mark.parametrize("naming, key", [("original", "d_model"), ("transformers", "conv_kernel")])
def test_sizes_are_positive_integers(tmp_path, naming, key, value):
    with pytest.raises(CheckpointError, match=rf"config\.json: {key} must be a positive integer"):
        config_of(tmp_path, naming, **{key: value})


@pytest.mark.parametrize(
    "key, value",
    [
        *[("layer_norm_epsilon", v) for v in (0, -1e-5, "1e-5", True, float("nan"), float("inf"))],
        *[("use_bias", v) for v in (0, 1, "false", [])],
        *[("time_step_rank", v) for v in ("Auto", 0, True, 1.0)],
        ("time_step_min", 0.5),  # above time_step_max
    ],
)
def test_other_values_are_checked(tmp_path, key, value):
    with pytest.raises(CheckpointError, match=r"config\.json") as info:
        config_of(tmp_path, "transformers", **{key: value})
    assert key in str(info.value) or "dt_min" in str(info.value)


def test_missing_keys(tmp_path):
    with pytest.raises(CheckpointError, match="missing keys: n_layer, vocab_size"):
        config_of(tmp_path, n_layer=None, vocab_size=None)
    with pytest.raises(CheckpointError, match="neither 'd_model'"):
        config_of(tmp_path, d_model=None)


@pytest.mark.parametrize("name", CONFIGS)
def test_configurations_there_and_back(tmp_path, name):
    write_config(tmp_path / "config.json", CONFIGS[name])
    assert read_config(tmp_path / "config.json") == CONFIGS[name]


def test_an_unusual_eps_is_written_and_the_usual_one_is_not(tmp_path):
    """The original code knows no such key; it must refuse the file rather than miss it."""
    for config, expected in [(TINY, False), (CONFIGS["eps, dt"], True)]:
        write_config(tmp_path / "config.json", config)
        assert ("norm_epsilon" in json.loads((tmp_path / "config.json").read_text())) is expected


# --------------------------------------------------------------------------------- saving


def random_model(config, seed=0):
    rng = np.random.default_rng(seed)
    tree = tree_of(config)
    return Mamba(config), jax.tree.map(lambda x: jnp.float32(rng.normal(size=x.shape)), tree)


@pytest.mark.parametrize("name", CONFIGS)
def test_there_and_back_bit_for_bit(tmp_path, name):
    model, params = random_model(CONFIGS[name])
    save_pretrained(model, params, tmp_path / "new" / "folder")
    again, read = from_pretrained(tmp_path / "new" / "folder")
    assert again == model
    same_bits(read, params)
    assert sorted(p.name for p in (tmp_path / "new" / "folder").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]


def test_half_precision_there_and_back(tmp_path):
    model, params = from_pretrained(write_folder(tmp_path / "a"), dtype=jnp.bfloat16)
    model.save_pretrained(params, tmp_path / "b")
    stored = load_file(tmp_path / "b" / "model.safetensors")
    assert stored["backbone.embedding.weight"].dtype == ml_dtypes.bfloat16
    again, read = Mamba.from_pretrained(tmp_path / "b", dtype=jnp.bfloat16)
    assert again == model
    same_bits(read, params)


def test_saved_in_the_original_naming(tmp_path):
    model, params = random_model(TINY)
    Mamba.save_pretrained(model, params, tmp_path)
    arrays = load_file(tmp_path / "model.safetensors")
    assert {name: a.shape for name, a in arrays.items()} == {
        row.name: row.shape for row in tensor_table(TINY)
    }
    assert "lm_head.weight" not in arrays
    conv = arrays["backbone.layers.0.mixer.conv1d.weight"]
    np.testing.assert_array_equal(conv[:, 0, :].T, params["layers_0"]["mixer"]["conv1d"]["kernel"])


def test_saved_files_are_readable_by_those_whom_the_umask_allows(tmp_path):
    save_pretrained(*random_model(TINY), tmp_path)
    (tmp_path / "other").write_text("")
    expected = stat.S_IMODE((tmp_path / "other").stat().st_mode)
    for name in ("config.json", "model.safetensors"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == expected


def test_only_this_models_params_are_saved(tmp_path):
    model, params = random_model(TINY)
    _, wider = random_model(CONFIGS["untied"])
    for wrong, told in [
        ({"params": params}, "missing: embedding.embedding (16, 8)"),
        (wider, "unexpected: lm_head.kernel (8, 16)"),
        (jax.tree.map(lambda leaf: leaf[..., None], params), "wrong shape: norm_f.scale"),
        (jax.tree.map(lambda leaf: leaf.astype(int), params), "wrong dtype: norm_f.scale"),
    ]:
        with pytest.raises(ValueError) as info:
            save_pretrained(model, wrong, tmp_path / "folder")
        assert told in str(info.value)
    assert not (tmp_path / "folder").exists()


def test_weights_in_another_form_are_not_contradicted(tmp_path):
    model, params = random_model(TINY)
    (tmp_path / "pytorch_model.bin").write_bytes(b"precious")
    with pytest.raises(FileExistsError, match=r"pytorch_model\.bin"):
        save_pretrained(model, params, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["pytorch_model.bin"]


@pytest.mark.parametrize("before", ["nothing", "another model"])
def test_interrupted_at_any_moment(tmp_path, monkeypatch, before):
    """A copy of the folder after every step on disk: what kill -9 would have left there."""
    old, old_params = random_model(CONFIGS["eps, dt"], seed=1)
    new, new_params = random_model(MambaConfig(d_model=4, n_layer=1, vocab_size=8), seed=2)
    folder = tmp_path / "folder"
    if before == "another model":
        save_pretrained(old, old_params, folder)

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

    for name in ("write_tensors", "write_config", "_to_disk"):
        monkeypatch.setattr(pretrained, name, watched(getattr(pretrained, name)))
    monkeypatch.setattr(os, "replace", watched(os.replace))
    monkeypatch.setattr(Path, "unlink", watched(Path.unlink))
    save_pretrained(new, new_params, folder)
    monkeypatch.undo()

    outcomes = []
    for copy in moments:
        try:
            model, params = from_pretrained(copy)
        except FileNotFoundError as error:
            assert "config.json" in str(error)
            outcomes.append("refused")
            continue
        outcomes.append("old" if model == old else "new")
        assert model in (old, new)
        same_bits(params, old_params if model == old else new_params)
    order = ["refused", "new"] if before == "nothing" else ["old", "refused", "new"]
    assert [o for i, o in enumerate(outcomes) if i == 0 or o != outcomes[i - 1]] == order
    same_bits(from_pretrained(folder)[1], new_params)


@pytest.mark.parametrize("step", range(6))
def test_an_exception_leaves_no_debris(tmp_path, monkeypatch, step):
    model, params = random_model(TINY)
    steps = iter(range(100))

    def interrupt(*_):
        if next(steps) == step:
            raise KeyboardInterrupt

    monkeypatch.setattr(pretrained, "_to_disk", interrupt)
    try:
        save_pretrained(model, params, tmp_path)
    except KeyboardInterrupt:
        assert step < 5
    else:
        assert step == 5
    assert not list(tmp_path.glob("*.part"))


# ------------------------------------------------------------------------------ bad input


def test_names_that_are_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    for name, kind, told in [
        ("", ValueError, "empty"),
        ("./nothing", FileNotFoundError, "no such folder"),
        ("../a/b", FileNotFoundError, "no such folder"),
        ("/nowhere/at/all", FileNotFoundError, "no such folder"),
        ("a/b/c", FileNotFoundError, "no such folder"),
        ("two words", FileNotFoundError, "no such folder"),
        ("https://huggingface.co/a/b", FileNotFoundError, "no such folder"),
        (Path("a/b"), FileNotFoundError, "no such folder"),
        ("file", NotADirectoryError, "is a file"),
        ("a--b/c", ValueError, "neither a folder nor"),
    ]:
        with pytest.raises(kind, match=told):
            from_pretrained(name)


def test_folders_without_their_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected config\.json; the folder holds nothing"):
        from_pretrained(tmp_path)
    write_folder(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "flax_model.msgpack").write_text("")
    with pytest.raises(FileNotFoundError) as info:
        from_pretrained(tmp_path)
    for part in ("model.safetensors", "pytorch_model.bin", "holds config.json, flax_model.msgpack"):
        assert part in str(info.value)


def test_an_interrupted_save_is_recognized(tmp_path):
    write_folder(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="interrupted"):
        from_pretrained(tmp_path)


def test_broken_files(tmp_path):
    folder = write_folder(tmp_path)
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-10])
    with pytest.raises(CheckpointError, match="not a complete safetensors file"):
        from_pretrained(folder)
    (folder / "config.json").write_text('{"d_model": 8,')
    with pytest.raises(CheckpointError, match=r"config\.json: not valid JSON"):
        from_pretrained(folder)


def test_load_tokenizer(tmp_path):
    from tokenizers import Tokenizer, models

    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json.*EleutherAI/gpt-neox-20b"):
        load_tokenizer(write_folder(tmp_path))
    Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?")).save(
        str(tmp_path / "tokenizer.json")
    )
    assert load_tokenizer(tmp_path).encode("a").ids == [0]
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: not a tokenizer"):
        load_tokenizer(tmp_path)


# ------------------------------------------------------------------------ in a new process


def run(code, *arguments, **environment):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")} | environment
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


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
    assert run(code, folder) == 8


def test_import_brings_in_neither_torch_nor_transformers_nor_the_hub():
    code = """
import json, sys
import mamba
heavy = {"torch", "transformers", "huggingface_hub", "tokenizers"}
print(json.dumps(sorted(heavy & sys.modules.keys())))
"""
    assert run(code) == []


HUB = """
import json, sys, time
time.sleep = lambda seconds: None  # between the hub library's retries
import warnings; warnings.simplefilter("ignore")
from mamba.pretrained import from_pretrained, load_tokenizer
results = []
for function, name, revision in json.loads(sys.argv[1]):
    try:
        got = {"from_pretrained": from_pretrained, "load_tokenizer": load_tokenizer}[function](
            name, revision=revision, cache_dir=sys.argv[2]
        )
        results.append(["ok", got[0].config.n_layer if type(got) is tuple else got.get_vocab()])
    except Exception as error:
        results.append([type(error).__name__, str(error)])
print(json.dumps(results))
"""


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_hub(tmp_path):
    """Downloads, and what goes wrong with them: each error names the repository and the reason."""
    single = files_of(write_folder(tmp_path / "single"))
    sharded = {name: data for name, data in single.items() if name == "config.json"}
    arrays = load_file(tmp_path / "single" / "model.safetensors")
    names = [f"model-{i % 2}.safetensors" for i in range(len(arrays))]
    for name in set(names):
        part = {key: arrays[key] for key, other in zip(arrays, names, strict=True) if name == other}
        save_file(part, tmp_path / name)
        sharded[name] = (tmp_path / name).read_bytes()
    index = {"weight_map": dict(zip(arrays, names, strict=True))}
    sharded["model.safetensors.index.json"] = json.dumps(index).encode()
    bin_files.write_bin(tmp_path / "pytorch_model.bin", arrays)
    original = {
        "config.json": single["config.json"],
        "pytorch_model.bin": (tmp_path / "pytorch_model.bin").read_bytes(),
    }
    other = {"config.json": b'{"hidden_size": 8, "model_type": "llama"}', "model.safetensors": b""}
    tokenizer = b'{"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}'
    repositories = {
        "org/single": single,
        "org/sharded": sharded,
        "org/original": original,
        "org/incomplete": {"config.json": single["config.json"], "README.md": b"soon"},
        "org/other": other,
        "org/empty": {"README.md": b"soon"},
        "org/gated": single,
        "org/tokenizer": {"tokenizer.json": tokenizer},
        "EleutherAI/gpt-neox-20b": {"tokenizer.json": tokenizer.replace(b'"a"', b'"neox"')},
    }
    cases = [
        ("from_pretrained", "org/single", None, "ok", 2),
        ("from_pretrained", "org/single", "main", "ok", 2),
        ("from_pretrained", "org/sharded", None, "ok", 2),
        ("from_pretrained", "org/original", None, "ok", 2),
        ("from_pretrained", "org/single", "v9", "FileNotFoundError", "no revision 'v9'"),
        ("from_pretrained", "org/empty", None, "FileNotFoundError", "has no config.json"),
        ("from_pretrained", "org/incomplete", None, "FileNotFoundError", "or pytorch_model.bin"),
        ("from_pretrained", "org/nowhere", None, "FileNotFoundError", "no such repository"),
        ("from_pretrained", "org/gated", None, "PermissionError", "hf auth login"),
        ("from_pretrained", "org/other", None, "CheckpointError", 'model_type = "llama"'),
        ("load_tokenizer", "org/tokenizer", None, "ok", {"a": 0}),
        ("load_tokenizer", "org/original", None, "ok", {"neox": 0}),
        ("load_tokenizer", "org/other", None, "FileNotFoundError", "has no tokenizer.json"),
        ("load_tokenizer", "org/empty", None, "FileNotFoundError", "has no tokenizer.json"),
    ]

    def outcomes(cases, url, **environment):
        arguments = json.dumps([case[:3] for case in cases])
        return run(HUB, arguments, tmp_path / "cache", HF_ENDPOINT=url, **environment)

    def check(cases, results):
        for (_, name, _, kind, told), (found, message) in zip(cases, results, strict=True):
            assert found == kind, (name, message)
            if kind == "ok":
                assert message == told
            else:
                assert told in message
                assert name in message or name.replace("/", "--") in message  # its folder's name

    with HubServer(repositories, gated=["org/gated"]) as hub:
        check(cases, outcomes(cases, hub.url))
        loads = [line for line in hub.requests if "org/other" in line and "GET" in line]
        assert loads == ["GET /org/other/resolve/main/config.json"]  # refused before the weights
        gone = hub.url

    # the server is gone: what was loaded loads again; what was not gives the reason and a way out
    cases = [case for case in cases if case[3] == "ok" and case[2] is None] + [
        ("from_pretrained", "org/incomplete", None, "FileNotFoundError", "or pytorch_model.bin"),
        ("from_pretrained", "org/nowhere", None, "ConnectionError", "a local folder"),
        ("from_pretrained", "org/new", None, "ConnectionError", "cannot be reached"),
        ("load_tokenizer", "org/new", None, "ConnectionError", "tokenizer.json"),
    ]
    check(cases, outcomes(cases, gone))
    check(cases, outcomes(cases, gone, HF_HUB_OFFLINE="1"))


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
        row.name: noise[: np.prod(row.shape)].reshape(row.shape) for row in tensor_table(config)
    }
    arrays["lm_head.weight"] = arrays["backbone.embedding.weight"]
    write_config(tmp_path / "config.json", config)
    if form.endswith(".bin"):
        bin_files.write_bin(tmp_path / form, arrays)
    else:
        save_file(arrays, tmp_path / form)
    result = run(PEAK, tmp_path)
    print(result)
    assert result["megabytes"] > 190
    assert 0.9 < result["ratio"] < 2.3


def test_swapped_arguments_of_save_pretrained(tmp_path):
    model = Mamba(MambaConfig(d_model=16, n_layer=1, vocab_size=8))
    for params in (str(tmp_path), tmp_path, None):
        with pytest.raises(TypeError, match=r"save_pretrained\(params, folder\): params must be"):
            model.save_pretrained(params, {})


def test_a_large_folder_is_not_listed_whole(tmp_path):
    for i in range(100):
        (tmp_path / f"{i:02}").touch()
    with pytest.raises(FileNotFoundError, match=r"the folder holds 00, .*07, and 92 more$"):
        Mamba.from_pretrained(tmp_path)
