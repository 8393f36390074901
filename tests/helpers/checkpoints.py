"""Small checkpoints in the published forms, and ways to compare what is loaded from them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file

from mamba import Mamba, MambaConfig
from mamba.checkpoint.files import read_tensors
from mamba.checkpoint.names import tensor_table, write_config
from mamba.mamba2 import Mamba2Config
from mamba.mamba3 import Mamba3Config

ROOT = Path(__file__).parents[2]
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
    "falcon": MambaConfig(
        d_model=8, n_layer=1, vocab_size=16, select_norm_eps=2e-5, pad_vocab_size_multiple=1
    ),
    "falcon, untied": MambaConfig(
        d_model=8,
        n_layer=1,
        vocab_size=16,
        expand=3,
        select_norm_eps=1e-6,
        tie_embeddings=False,
        norm_eps=0.1,
        pad_vocab_size_multiple=1,
    ),
    "mamba2": Mamba2Config(d_model=8, n_layer=2, vocab_size=13, head_dim=4, d_state=3),
    "mamba2, all": Mamba2Config(
        d_model=8,
        n_layer=1,
        vocab_size=13,
        head_dim=3,
        expand=3,
        d_state=2,
        d_conv=3,
        n_groups=4,
        A_init_range=(0.5, 2.0),
        dt_limit=(0.01, 0.2),
        conv_bias=False,
        bias=True,
        norm_eps=0.02,
        tie_embeddings=False,
        pad_vocab_size_multiple=5,
    ),
    "mamba3": Mamba3Config(
        d_model=8, n_layer=2, vocab_size=13, head_dim=4, d_state=4, d_intermediate=9
    ),
    "mamba3, all": Mamba3Config(
        d_model=8,
        n_layer=1,
        vocab_size=13,
        head_dim=3,
        expand=3,
        d_state=2,
        n_groups=4,
        is_mimo=True,
        mimo_rank=3,
        rope_fraction=1.0,
        A_floor=0.01,
        heavy_tail=False,
        dt_min=1e-4,
        dt_max=0.5,
        dt_init_floor=2e-4,
        norm_eps=0.02,
        tie_embeddings=False,
        pad_vocab_size_multiple=5,
    ),
    "mamba3, nothing turns": Mamba3Config(
        d_model=8, n_layer=1, vocab_size=13, head_dim=16, d_state=3, rope_fraction=None
    ),
}
# Of those, the models that transformers has.
IN_TRANSFORMERS = [name for name, config in CONFIGS.items() if type(config) is not Mamba3Config]


def random_arrays(config, embedding="embedding", dtype=np.float32):
    """The tensors of a checkpoint, under the names and in the shapes that they have there."""
    rng = np.random.default_rng(0)
    return {
        spec.name: rng.normal(size=spec.shape).astype(dtype)
        for spec in tensor_table(config, embedding)
    }


def transformers_config(config):
    """The content of a ``config.json`` in transformers' naming."""
    data = {
        "model_type": "mamba",
        "architectures": ["MambaForCausalLM"],
        "hidden_size": config.d_model,
        "intermediate_size": config.d_inner,
        "num_hidden_layers": config.n_layer,
        "vocab_size": config.padded_vocab_size,
        "state_size": config.d_state,
        "conv_kernel": config.d_conv,
        "expand": config.expand,
        "use_bias": config.bias,
        "use_conv_bias": config.conv_bias,
        "layer_norm_epsilon": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "hidden_act": "silu",
        "residual_in_fp32": True,
        "initializer_range": 0.1,
    }
    if isinstance(config, Mamba2Config):
        return data | {
            "model_type": "mamba2",
            "architectures": ["Mamba2ForCausalLM"],
            "head_dim": config.head_dim,
            "num_heads": config.n_heads,
            "n_groups": config.n_groups,
            "time_step_limit": list(config.dt_limit),
            "norm_before_gate": True,  # as Codestral's file says; no code reads it
        }
    data["time_step_rank"] = config.rank
    if config.select_norm_eps is not None:
        data |= {"model_type": "falcon_mamba", "mixer_rms_eps": config.select_norm_eps}
        data["architectures"] = ["FalconMambaForCausalLM"]
    return data


def write_folder(folder, config=TINY, *, naming="original", arrays=None, **changes):
    """A checkpoint folder as others write it -> the folder.

    arrays: the tensors; random ones by default.   changes: to config.json; None deletes a key.
    """
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


def read_arrays(path):
    """All tensors of a weights file -> {name: array}."""
    return {name: tensor.read() for name, tensor in read_tensors(path).items()}


def assert_same_arrays(found, expected):
    """Two dicts have the same arrays: names, dtypes, shapes and every bit."""
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype, name
        assert found[name].shape == array.shape, name
        assert found[name].tobytes() == array.tobytes(), name


def assert_same_bits(a, b):
    """Two trees have the same leaves: paths, dtypes, shapes and every bit."""
    a, b = flatten_dict(a), flatten_dict(b)
    assert a.keys() == b.keys()
    for path in a:
        assert a[path].dtype == b[path].dtype and a[path].shape == b[path].shape, path
        assert np.asarray(a[path]).tobytes() == np.asarray(b[path]).tobytes(), path


def abstract_params(config):
    """The shapes and dtypes of a model's parameters."""
    tokens = jnp.zeros((1, 1), jnp.int32)
    return jax.eval_shape(Mamba(config).init, jax.random.key(0), tokens)["params"]


def random_model(config, seed=0):
    """A model and parameters that are all random."""
    rng = np.random.default_rng(seed)
    tree = abstract_params(config)
    return Mamba(config), jax.tree.map(lambda x: jnp.float32(rng.normal(size=x.shape)), tree)


def run_python(code, *arguments, **environment):
    """Run code in a new process -> what its last line prints, as JSON."""
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
