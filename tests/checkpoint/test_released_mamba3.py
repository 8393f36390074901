"""The released 187M models of Mamba-3: every tensor and every key of their files is accounted for.

On the Hugging Face Hub they are ``state-spaces/mamba3-siso-187m`` and ``mamba3-mimo-187m``. What
their files hold is recorded in two files model_shape.json in the repository that
tests/test_kernel_records.py names. The tables here are made from rules, and `make kernel-records
RECORDS=folder` compares them with those files.
"""

import dataclasses
import json
import math
import os
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file

from mamba import Mamba
from mamba.checkpoint.names import read_config, tensor_table
from mamba.checkpoint.tensors import CheckpointError
from mamba.mamba3 import Mamba3Config
from tests.helpers import bin_files
from tests.helpers.checkpoints import (
    CONFIGS,
    abstract_params,
    random_arrays,
    random_model,
    write_folder,
)

RECORDS = os.environ.get("RECORDS")
MODELS = ("siso", "mimo")
PARAMETERS = {"siso": 186_849_600, "mimo": 187_291_968}  # the tied head counted once


def released_config(kind):
    """The content of config.json."""
    ssm_cfg = {"layer": "Mamba3", "d_state": 128, "expand": 2, "headdim": 64, "ngroups": 1}
    ssm_cfg |= {"rope_fraction": 0.5, "dt_min": 0.001, "dt_max": 0.1, "dt_init_floor": 0.0001}
    ssm_cfg |= {"A_floor": 0.0001, "is_outproj_norm": False}
    ssm_cfg |= {
        "siso": {"chunk_size": 64, "is_mimo": False},
        "mimo": {"chunk_size": 16, "is_mimo": True, "mimo_rank": 4},
    }[kind]
    return {
        "d_model": 768,
        "d_intermediate": {"siso": 1536, "mimo": 1264}[kind],
        "n_layer": 12,
        "vocab_size": 128256,
        "ssm_cfg": ssm_cfg,
        "attn_layer_idx": [],
        "attn_cfg": {},
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": kind == "siso",
        "pad_vocab_size_multiple": 16,
        "tie_embeddings": True,
    }


def released_shapes(kind):
    """The name and shape of every tensor, without the copy of the tied head."""
    rank, width = {"siso": (1, 1536), "mimo": (4, 1280)}[kind]  # 1264 up to a multiple of 128
    rows = 1536 + 1536 + 2 * 128 * rank + 3 * 24 + 32  # z and x, B and C, three for a head, angles
    layer = {
        "norm.weight": [768],
        "mixer.dt_bias": [24],
        "mixer.B_bias": [24, rank, 128],
        "mixer.C_bias": [24, rank, 128],
        "mixer.D": [24],
        "mixer.in_proj.weight": [rows, 768],
        "mixer.B_norm.weight": [128],
        "mixer.C_norm.weight": [128],
        "mixer.out_proj.weight": [768, 1536],
        "norm2.weight": [768],
        "mlp.fc1.weight": [2 * width, 768],
        "mlp.fc2.weight": [768, width],
    }
    if kind == "mimo":
        layer |= {f"mixer.mimo_{name}": [24, 4, 64] for name in "xzo"}
    shapes = {f"backbone.layers.{i}.{name}": v for i in range(12) for name, v in layer.items()}
    return shapes | {"backbone.embedding.weight": [128256, 768], "backbone.norm_f.weight": [768]}


def config_of(folder, kind):
    (folder / "config.json").write_text(json.dumps(released_config(kind)))
    return read_config(folder / "config.json", jnp.bfloat16)


@pytest.mark.parametrize("kind", MODELS)
def test_the_configuration(tmp_path, kind):
    mimo = kind == "mimo"
    assert config_of(tmp_path, kind) == Mamba3Config(
        d_model=768,
        n_layer=12,
        vocab_size=128256,
        d_intermediate=1264 if mimo else 1536,
        is_mimo=mimo,
        dtype=jnp.bfloat16,
    )


@pytest.mark.parametrize("kind", MODELS)
def test_every_tensor(tmp_path, kind):
    """Names and shapes, those of our parameters too, and their number, without their memory."""
    config, shapes = config_of(tmp_path, kind), released_shapes(kind)
    specs = tensor_table(config)
    assert {spec.name: list(spec.shape) for spec in specs} == shapes
    ours = {k: v.shape for k, v in flatten_dict(abstract_params(config), sep=".").items()}
    assert {spec.path: spec.our_shape for spec in specs} == ours
    assert sum(map(math.prod, ours.values())) == PARAMETERS[kind]


@pytest.mark.parametrize("name", ["mamba3", "mamba3, nothing turns"])
def test_a_file_as_they_are_published(tmp_path, name):
    """pytorch_model.bin, in bfloat16, the tied head a second time, read without PyTorch."""
    config = CONFIGS[name]
    folder = write_folder(tmp_path, config, arrays={})
    (folder / "model.safetensors").unlink()
    arrays = random_arrays(config, dtype=ml_dtypes.bfloat16)
    arrays["lm_head.weight"] = arrays["backbone.embedding.weight"]
    bin_files.write_bin(folder / "pytorch_model.bin", arrays)
    model, params = Mamba.from_pretrained(folder, dtype=jnp.bfloat16)
    assert model.config == dataclasses.replace(config, dtype=jnp.dtype(jnp.bfloat16))
    params = flatten_dict(params, sep=".")
    for spec in tensor_table(config):
        found = params[spec.path]
        assert found.dtype == (jnp.float32 if spec.float32 else jnp.bfloat16), spec.path
        expected = arrays[spec.name].astype(np.float32)
        np.testing.assert_array_equal(np.float32(found), expected.T if spec.transpose else expected)


def test_a_port_without_the_mlp_is_told_what_is_missing(tmp_path):
    arrays = random_arrays(CONFIGS["mamba3"])
    arrays = {name: array for name, array in arrays.items() if ".mlp." not in name}
    folder = write_folder(tmp_path, CONFIGS["mamba3"], arrays=arrays)
    with pytest.raises(CheckpointError, match="missing: backbone.layers.0.mlp.fc1.weight"):
        Mamba.from_pretrained(folder)


@pytest.mark.parametrize("name", ["mamba3", "mamba3, all"])
def test_what_is_saved_is_what_the_original_code_reads(tmp_path, name):
    """Its keys, and the names of its tensors; a key of ours where it would stop, so as to be seen.

    In ssm_cfg it would drop a key that it does not know.
    """
    model, params = random_model(CONFIGS[name])
    model.save_pretrained(params, tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    released = released_config("mimo")
    ours = {"heavy_tail", "norm_epsilon"} if name == "mamba3, all" else set()
    assert written.keys() - released.keys() == ours
    assert written["ssm_cfg"].keys() <= released["ssm_cfg"].keys()
    assert written["ssm_cfg"]["layer"] == "Mamba3"
    held = {name for name in load_file(tmp_path / "model.safetensors") if ".layers.0." in name}
    expected = {n for n in released_shapes("mimo" if ours else "siso") if ".layers.0." in n}
    if ours:  # that model has no MLP
        expected = {n for n in expected if ".mlp." not in n and ".norm2." not in n}
    assert held == expected


# --- against the recorded files -------------------------------------------------------------------


@pytest.mark.kernel_records
@pytest.mark.parametrize("kind", MODELS)
def test_the_recorded_files(kind):
    path = Path(RECORDS or "") / kind / "model_shape.json"
    if not RECORDS or not path.exists():
        pytest.skip("no RECORDS=folder with model_shape.json: see tests/test_kernel_records.py")
    recorded = json.loads(path.read_text())
    assert recorded["config"] == released_config(kind)
    assert recorded["parameters"] == released_shapes(kind)
