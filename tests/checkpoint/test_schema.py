"""Every key of the official configurations changes the model, is refused by name, or has no effect.

The keys are those of the original code (``MambaConfig`` and the constructors of ``Mamba``,
``Mamba2`` and ``Mamba3``) and of transformers (``MambaConfig``, ``FalconMambaConfig``,
``Mamba2Config``). Each is set to a value other than its default.
"""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mamba import Mamba, MambaConfig
from mamba.checkpoint.names import read_config, tensor_table
from mamba.checkpoint.tensors import CheckpointError
from mamba.mamba2 import Mamba2Config
from mamba.mamba3 import Mamba3Config
from tests.helpers.checkpoints import abstract_params

CHANGES, REFUSED, NO_EFFECT = "changes the model", "is refused by name", "has no effect"

ORIGINAL = {  # MambaConfig of the original code
    "d_model": (24, CHANGES),
    "d_intermediate": (64, REFUSED),
    "n_layer": (3, CHANGES),
    "vocab_size": (99, CHANGES),
    "attn_layer_idx": ([1], REFUSED),
    "attn_cfg": ({"num_heads": 4}, NO_EFFECT),  # without attn_layer_idx, nothing reads it
    "rms_norm": (False, REFUSED),
    "residual_in_fp32": (False, NO_EFFECT),  # ours is always float32
    "fused_add_norm": (False, NO_EFFECT),
    "pad_vocab_size_multiple": (32, CHANGES),
    "tie_embeddings": (False, CHANGES),
}
ORIGINAL_3 = {  # what the constructors of all three have
    "ssm_cfg.d_state": (7, CHANGES),
    "ssm_cfg.expand": (4, CHANGES),
    "ssm_cfg.dt_min": (0.01, CHANGES),
    "ssm_cfg.dt_max": (0.5, CHANGES),
    "ssm_cfg.dt_init_floor": (0.05, CHANGES),
    "ssm_cfg.layer_idx": (3, REFUSED),
    "ssm_cfg.device": ("cuda", REFUSED),
    "ssm_cfg.dtype": ("float16", REFUSED),
    "ssm_cfg.something_new": (1, REFUSED),
}
ORIGINAL_MIXER = ORIGINAL_3 | {  # what those of the first two have
    "ssm_cfg.d_conv": (3, CHANGES),
    "ssm_cfg.conv_bias": (False, CHANGES),
    "ssm_cfg.bias": (True, CHANGES),
}
# Mamba3's constructor drops keys that it does not know. They would come from another model.
MAMBA_3 = (
    ORIGINAL
    | ORIGINAL_3
    | {
        "d_intermediate": (64, CHANGES),
        "ssm_cfg.headdim": (4, CHANGES),
        "ssm_cfg.ngroups": (2, CHANGES),
        "ssm_cfg.rope_fraction": (1.0, CHANGES),
        "ssm_cfg.A_floor": (0.01, CHANGES),
        "ssm_cfg.mimo_rank": (2, CHANGES),
        "ssm_cfg.is_outproj_norm": (True, REFUSED),
        # A fused kernel for is_outproj_norm.
        "ssm_cfg.fuse_pregate_headwise_norm": (False, NO_EFFECT),
        "ssm_cfg.chunk_size": (16, NO_EFFECT),  # how it is computed
        "ssm_cfg.dropout": (0.1, NO_EFFECT),  # nothing reads it
        "ssm_cfg.n_layer": (3, REFUSED),
        "ssm_cfg.d_conv": (3, REFUSED),
        "ssm_cfg.conv_bias": (False, REFUSED),
        "ssm_cfg.bias": (True, REFUSED),
        "ssm_cfg.A_init_range": ([2, 3], REFUSED),
        "heavy_tail": (False, CHANGES),  # ours
        "ssm_cfg.heavy_tail": (False, REFUSED),  # not there, where the original code would drop it
    }
)
TRANSFORMERS = {  # what all three of transformers have
    "vocab_size": (99, CHANGES),
    "hidden_size": (64, CHANGES),
    "state_size": (7, CHANGES),
    "num_hidden_layers": (3, CHANGES),
    "layer_norm_epsilon": (1e-3, CHANGES),
    "pad_token_id": (3, NO_EFFECT),
    "bos_token_id": (3, NO_EFFECT),
    "eos_token_id": ([3, 4], NO_EFFECT),
    "expand": (4, CHANGES),
    "conv_kernel": (3, CHANGES),
    "use_bias": (True, CHANGES),
    "use_conv_bias": (False, CHANGES),
    "hidden_act": ("gelu", REFUSED),
    "initializer_range": (0.5, NO_EFFECT),  # transformers' initialization is not ours
    "residual_in_fp32": (False, NO_EFFECT),
    "time_step_min": (0.01, CHANGES),
    "time_step_max": (0.5, CHANGES),
    "time_step_floor": (0.05, CHANGES),
    "rescale_prenorm_residual": (True, NO_EFFECT),  # initialization
    "use_cache": (False, NO_EFFECT),
}
TRANSFORMERS_1 = TRANSFORMERS | {
    "time_step_rank": (5, CHANGES),
    "time_step_scale": (2.0, NO_EFFECT),  # initialization
    "time_step_init_scheme": ("constant", NO_EFFECT),  # initialization
    "use_mambapy": (True, NO_EFFECT),  # which kernel runs
    "use_associative_scan": (False, NO_EFFECT),  # which kernel runs
    "intermediate_size": (96, CHANGES),
    "tie_word_embeddings": (False, CHANGES),
}
# (model, scheme): the least that a file holds; the table.
OFFICIAL = {
    "Mamba, original": (
        {"d_model": 16, "n_layer": 2, "vocab_size": 20},
        ORIGINAL
        | ORIGINAL_MIXER
        | {
            "ssm_cfg.dt_rank": (5, CHANGES),
            "ssm_cfg.dt_init": ("constant", NO_EFFECT),  # initialization
            "ssm_cfg.dt_scale": (2.0, NO_EFFECT),  # initialization
            "ssm_cfg.use_fast_path": (False, NO_EFFECT),  # which kernel runs
        },
    ),
    "Mamba, transformers": (
        {"model_type": "mamba", "hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 20},
        TRANSFORMERS_1,
    ),
    "Falcon-Mamba": (
        {"model_type": "falcon_mamba", "hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 20},
        TRANSFORMERS_1 | {"mixer_rms_eps": (1e-3, CHANGES)},
    ),
    "Mamba-2, original": (
        {
            "d_model": 16,
            "n_layer": 2,
            "vocab_size": 20,
            "ssm_cfg.layer": "Mamba2",
            "ssm_cfg.headdim": 8,
        },
        ORIGINAL
        | ORIGINAL_MIXER
        | {
            "ssm_cfg.conv_init": (0.5, NO_EFFECT),  # initialization
            "ssm_cfg.headdim": (4, CHANGES),
            "ssm_cfg.d_ssm": (16, REFUSED),
            "ssm_cfg.ngroups": (2, CHANGES),
            "ssm_cfg.A_init_range": ([2, 3], CHANGES),
            "ssm_cfg.D_has_hdim": (True, REFUSED),
            "ssm_cfg.rmsnorm": (False, REFUSED),
            "ssm_cfg.norm_before_gate": (True, REFUSED),
            "ssm_cfg.dt_limit": ([0.01, 0.02], CHANGES),
            "ssm_cfg.chunk_size": (64, NO_EFFECT),  # how it is computed
            "ssm_cfg.use_mem_eff_path": (False, NO_EFFECT),  # which kernel runs
            "ssm_cfg.process_group": (1, REFUSED),
            "ssm_cfg.sequence_parallel": (False, REFUSED),
        },
    ),
    "Mamba-3, SISO": (
        {
            "d_model": 16,
            "n_layer": 2,
            "vocab_size": 20,
            "ssm_cfg.layer": "Mamba3",
            "ssm_cfg.headdim": 8,
        },
        MAMBA_3 | {"ssm_cfg.is_mimo": (True, CHANGES)},
    ),
    "Mamba-3, MIMO": (
        {
            "d_model": 16,
            "n_layer": 2,
            "vocab_size": 20,
            "ssm_cfg.layer": "Mamba3",
            "ssm_cfg.headdim": 8,
            "ssm_cfg.is_mimo": True,
        },
        MAMBA_3 | {"ssm_cfg.is_mimo": (False, CHANGES)},
    ),
    "Mamba-2, transformers": (
        {
            "model_type": "mamba2",
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "vocab_size": 20,
            "num_heads": 8,
            "head_dim": 8,
        },
        TRANSFORMERS
        | {
            "num_heads": (4, REFUSED),
            "head_dim": (4, REFUSED),  # which would make another number of heads
            "hidden_size": (64, REFUSED),
            "expand": (4, REFUSED),
            "n_groups": (2, CHANGES),
            "time_step_rank": (5, NO_EFFECT),  # a key without a meaning in Mamba-2
            "time_step_limit": ([0.01, 0.02], CHANGES),
            "chunk_size": (64, NO_EFFECT),  # how it is computed
            "tie_word_embeddings": (True, CHANGES),
            "intermediate_size": (96, REFUSED),  # other than expand · hidden_size
            "rms_norm": (False, REFUSED),  # of older files
            "norm_before_gate": (True, NO_EFFECT),  # of older files; no code reads it
        },
    ),
}
# What a refusal says where it does not repeat the key: the sizes that contradict each other.
CONTRADICTIONS = {"head_dim": "num_heads", "hidden_size": "num_heads", "expand": "num_heads"}


def read(folder, flat):
    """The configuration of a ``config.json`` with these keys; "ssm_cfg.x" is nested."""
    data = {key: value for key, value in flat.items() if not key.startswith("ssm_cfg.")}
    nested = {k.removeprefix("ssm_cfg."): v for k, v in flat.items() if k.startswith("ssm_cfg.")}
    data |= {"ssm_cfg": nested} if nested else {}
    (folder / "config.json").write_text(json.dumps(data))
    return read_config(folder / "config.json")


CASES = [(name, key) for name, (_, table) in OFFICIAL.items() for key in table]


@pytest.mark.parametrize(("name", "key"), CASES)
def test_every_key_is_accounted_for(tmp_path, name, key):
    least, table = OFFICIAL[name]
    value, outcome = table[key]
    before = read(tmp_path, least)
    if outcome == REFUSED:
        with pytest.raises(CheckpointError) as info:
            read(tmp_path, least | {key: value})
        named = CONTRADICTIONS.get(key, key) if "transformers" in name else key
        assert named in str(info.value)
    else:
        assert (read(tmp_path, least | {key: value}) != before) is (outcome == CHANGES)


def first_logits(config):
    """Of a model as it is initialized."""
    tokens, model = np.arange(12, dtype=np.int32)[None] % 4, Mamba(config)
    params = model.init(jax.random.key(0), tokens)["params"]
    # Every number above 0, and large steps: no setting is hidden by a zero.
    params = jax.tree.map(lambda v: v + 0.1, params)
    return np.asarray(model.apply({"params": params}, tokens))


SMALL = {"d_model": 8, "n_layer": 1, "vocab_size": 33, "d_state": 3}
BASE = {
    MambaConfig: MambaConfig(**SMALL),
    Mamba2Config: Mamba2Config(**SMALL, head_dim=4),
    Mamba3Config: Mamba3Config(**SMALL | {"d_state": 4}, head_dim=4, is_mimo=True),
}
OTHER = {  # fields that do not change the shape of any parameter
    "dt_min": 0.01,
    "dt_max": 0.5,
    "dt_init_floor": 0.05,
    "A_init_range": (2.0, 3.0),
    "dt_limit": (0.01, 0.02),
    "norm_eps": 0.1,
    "select_norm_eps": 0.1,
    "A_floor": 3.0,
    "heavy_tail": False,
    "dtype": jnp.bfloat16,
}


@pytest.mark.parametrize("kind", BASE)
def test_every_field_changes_the_model(kind):
    """What is read is also used: another shape of a parameter, or other logits."""
    base = BASE[kind]
    shapes, logits = abstract_params(base), first_logits(base)
    for field in dataclasses.fields(kind):
        name = field.name
        value = getattr(base, name)
        if name in OTHER:
            changed = dataclasses.replace(base, **{name: OTHER[name]})
            assert np.abs(first_logits(changed) - logits).max() > 1e-4, name
            continue
        value = not value if isinstance(value, bool) else 2 * (value or 3)
        changed = abstract_params(dataclasses.replace(base, **{name: value}))
        assert jax.tree.map(jnp.shape, changed) != jax.tree.map(jnp.shape, shapes), name


# ----------------------------------------------------------------- files as they are published

FALCON_7B = {  # tiiuae/falcon-mamba-7b
    "_name_or_path": "./",
    "architectures": ["FalconMambaForCausalLM"],
    "bos_token_id": 0,
    "conv_kernel": 4,
    "eos_token_id": 11,
    "expand": 16,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.1,
    "intermediate_size": 8192,
    "layer_norm_epsilon": 1e-05,
    "model_type": "falcon_mamba",
    "num_hidden_layers": 64,
    "pad_token_id": 11,
    "rescale_prenorm_residual": False,
    "residual_in_fp32": True,
    "state_size": 16,
    "tie_word_embeddings": False,
    "time_step_floor": 0.0001,
    "time_step_init_scheme": "random",
    "time_step_max": 0.1,
    "time_step_min": 0.001,
    "time_step_rank": 256,
    "time_step_scale": 1.0,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.0.dev0",
    "use_bias": False,
    "use_cache": True,
    "use_conv_bias": True,
    "vocab_size": 65024,
}
CODESTRAL = {  # mistralai/Mamba-Codestral-7B-v0.1
    "_name_or_path": "codestral",
    "architectures": ["Mamba2ForCausalLM"],
    "bos_token_id": 0,
    "chunk_size": 256,
    "conv_kernel": 4,
    "eos_token_id": 0,
    "expand": 2,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.1,
    "intermediate_size": 8192,
    "layer_norm_epsilon": 1e-05,
    "model_type": "mamba2",
    "n_groups": 8,
    "norm_before_gate": True,
    "num_heads": 128,
    "num_hidden_layers": 64,
    "pad_token_id": 0,
    "rescale_prenorm_residual": False,
    "residual_in_fp32": True,
    "rms_norm": True,
    "state_size": 128,
    "tie_word_embeddings": False,
    "time_step_floor": 0.0001,
    "time_step_init_scheme": "random",
    "time_step_limit": [0.0, math.inf],
    "time_step_max": 0.1,
    "time_step_min": 0.001,
    "time_step_rank": 256,
    "time_step_scale": 1.0,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.44.0.dev0",
    "use_bias": False,
    "use_cache": True,
    "use_conv_bias": True,
    "vocab_size": 32768,
}


@pytest.mark.parametrize(
    ("data", "changes", "expected", "parameters"),
    [
        (
            FALCON_7B,
            {},
            MambaConfig(
                d_model=4096,
                n_layer=64,
                vocab_size=65024,
                select_norm_eps=1e-6,
                dt_rank=256,
                tie_embeddings=False,
                pad_vocab_size_multiple=1,
            ),
            7_272_665_088,
        ),
        (
            FALCON_7B,
            {"mixer_rms_eps": 1e-5, "use_mambapy": False},  # as Falcon3-Mamba
            MambaConfig(
                d_model=4096,
                n_layer=64,
                vocab_size=65024,
                select_norm_eps=1e-5,
                dt_rank=256,
                tie_embeddings=False,
                pad_vocab_size_multiple=1,
            ),
            7_272_665_088,
        ),
        (
            CODESTRAL,
            {},
            Mamba2Config(
                d_model=4096,
                n_layer=64,
                vocab_size=32768,
                n_groups=8,
                tie_embeddings=False,
                pad_vocab_size_multiple=1,
            ),
            7_285_403_648,
        ),
    ],
    ids=["falcon-mamba-7b", "falcon3-mamba-7b", "codestral"],
)
def test_published_files(tmp_path, data, changes, expected, parameters):
    config = read(tmp_path, data | changes)
    assert config == expected
    assert sum(math.prod(spec.shape) for spec in tensor_table(config)) == parameters


@pytest.mark.parametrize(
    ("d_model", "n_layer", "parameters"),
    [(768, 24, 128_989_632), (2560, 64, 2_702_599_680)],
    ids=["mamba2-130m", "mamba2-2.7b"],
)
def test_sizes_of_published_mamba2(tmp_path, d_model, n_layer, parameters):
    data = {"d_model": d_model, "d_intermediate": 0, "n_layer": n_layer, "vocab_size": 50277}
    data |= {"ssm_cfg.layer": "Mamba2", "attn_layer_idx": [], "attn_cfg": {}, "rms_norm": True}
    data |= {"residual_in_fp32": True, "fused_add_norm": True, "tie_embeddings": True}
    config = read(tmp_path, data | {"pad_vocab_size_multiple": 16})
    assert config == Mamba2Config(d_model=d_model, n_layer=n_layer, vocab_size=50277)
    assert sum(math.prod(spec.shape) for spec in tensor_table(config)) == parameters


@pytest.mark.parametrize(
    ("model_type", "adds"),
    [
        ("bamba", "attention layers between its Mamba-2 layers"),
        ("falcon_h1", "attention heads beside the Mamba-2 mixer"),
        ("granitemoehybrid", "attention and expert layers"),
        ("jamba", "attention and expert layers"),
        ("nemotron_h", "attention and MLP layers"),
        ("zamba", "an attention block, shared by many places"),
        ("zamba2", "attention blocks, each shared by many places"),
    ],
)
def test_a_hybrid_is_refused_with_what_it_adds(tmp_path, model_type, adds):
    """Also where a width, as theirs mostly is, is no multiple of hidden_size."""
    data = {"model_type": model_type, "hidden_size": 4096, "intermediate_size": 14336}
    data |= {"num_hidden_layers": 32, "vocab_size": 65536, "mamba_d_state": 16}
    with pytest.raises(CheckpointError) as info:
        read(tmp_path, data)
    assert f"'{model_type}' is a hybrid, which has {adds}" in str(info.value)


def test_a_hybrid_of_the_original_code_is_refused_with_what_it_adds(tmp_path):
    """As in state-spaces/mamba2attn-2.7b."""
    data = {"d_model": 2560, "d_intermediate": 0, "n_layer": 64, "vocab_size": 50277}
    data |= {"ssm_cfg.layer": "Mamba2", "attn_layer_idx": [9, 18, 27, 36, 45, 56]}
    with pytest.raises(CheckpointError, match=r"attn_layer_idx = \[9, .* has attention in these"):
        read(tmp_path, data)


def test_a_model_of_another_kind_is_refused_by_its_name(tmp_path):
    data = {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008}
    with pytest.raises(CheckpointError, match="model_type = 'llama' is not supported"):
        read(tmp_path, data | {"num_hidden_layers": 32, "vocab_size": 32000})
