"""The configuration and the table of tensors: every key and every tensor is accounted for."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from mamba import MambaConfig
from mamba.checkpoint.names import read_config, tensor_table, write_config
from mamba.checkpoint.tensors import CheckpointError
from mamba.mamba2 import Mamba2Config
from tests.helpers.checkpoints import (
    CONFIGS,
    IN_TRANSFORMERS,
    TINY,
    abstract_params,
    transformers_config,
    write_folder,
)

# ---------------------------------------------------------------------------- the table


@pytest.mark.parametrize("name", CONFIGS)
def test_the_table_is_the_models_parameters(name):
    config = CONFIGS[name]
    expected = {
        path: leaf.shape for path, leaf in flatten_dict(abstract_params(config), sep=".").items()
    }
    assert {spec.path: spec.our_shape for spec in tensor_table(config)} == expected


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
    specs = tensor_table(MambaConfig(d_model=d_model, n_layer=n_layer, vocab_size=50277))
    assert sum(np.prod(spec.shape) for spec in specs) == parameters
    assert specs[0].shape == (50280, d_model)


def test_a_configuration_of_another_type_has_no_table():
    @dataclasses.dataclass(frozen=True)
    class OtherConfig(MambaConfig):
        pass

    with pytest.raises(ValueError, match="OtherConfig has no checkpoint format"):
        tensor_table(OtherConfig(d_model=8, n_layer=1, vocab_size=8))


# ------------------------------------------------------------------------- config.json


def config_of(folder, naming="original", config=TINY, **changes):
    written = write_folder(folder, config, naming=naming, arrays={}, **changes)
    return read_config(written / "config.json")


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
    """As in state-spaces/mamba-130m-hf, which repeats the original keys. They have no effect."""
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
    "naming, key, value, message",
    [
        ("original", "ssm_cfg", {"layer": "Mamba4"}, "ssm_cfg.layer = 'Mamba4'"),
        ("original", "ssm_cfg", {"layer": None}, "ssm_cfg.layer = None"),
        ("original", "ssm_cfg", {"layer": ["Mamba1"]}, "ssm_cfg.layer = ['Mamba1']"),
        ("original", "ssm_cfg", {"headdim": 64}, "'ssm_cfg.headdim'"),
        ("original", "ssm_cfg", [], "ssm_cfg must be an object"),
        ("original", "attn_layer_idx", [3], "attn_layer_idx = [3]"),
        ("original", "d_intermediate", 64, "d_intermediate = 64"),
        ("original", "d_intermediate", False, "d_intermediate = False"),
        ("original", "rms_norm", False, "rms_norm = False"),
        ("original", "rms_norm", 1, "rms_norm = 1"),
        ("original", "model_type", "mamba2", "model_type = 'mamba2'"),
        ("original", "rotary", 3, "'rotary'"),
        ("original", "x" * 10**5, 3, "'xxxxx"),
        ("transformers", "model_type", "mamba3", "model_type = 'mamba3'"),
        ("transformers", "model_type", "jamba", "model_type = 'jamba' is a hybrid"),
        (
            "transformers",
            "model_type",
            "zamba2",
            "'zamba2' is a hybrid",
        ),
        ("transformers", "model_type", "bamba", "'bamba' is a hybrid"),
        ("transformers", "model_type", "falcon_h1", "'falcon_h1' is a hybrid"),
        ("transformers", "model_type", "nemotron_h", "'nemotron_h' is a hybrid"),
        ("transformers", "model_type", "granitemoehybrid", "'granitemoehybrid' is a hybrid"),
        ("transformers", "model_type", ["mamba"], "model_type = ['mamba']"),
        ("transformers", "hidden_act", "gelu", "hidden_act = 'gelu'"),
        ("transformers", "intermediate_size", 17, "intermediate_size = 17"),
        ("transformers", "intermediate_size", 0, "intermediate_size must be a positive integer"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(tmp_path, naming, key, value, message):
    with pytest.raises(CheckpointError) as info:
        config_of(tmp_path, naming, **{key: value})
    assert "config.json" in str(info.value) and message in str(info.value)
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


def test_the_width_wins_over_expand(tmp_path):
    """As in the 7B of Falcon-Mamba: expand is 16 beside a width of twice hidden_size."""
    data = {
        "model_type": "falcon_mamba",
        "hidden_size": 4096,
        "intermediate_size": 8192,
        "expand": 16,
        "num_hidden_layers": 64,
        "vocab_size": 65024,
        "state_size": 16,
        "conv_kernel": 4,
        "time_step_rank": 256,
        "tie_word_embeddings": False,
    }
    (tmp_path / "config.json").write_text(json.dumps(data))
    config = read_config(tmp_path / "config.json")
    assert (config.d_inner, config.rank, config.padded_vocab_size) == (8192, 256, 65024)
    assert config.select_norm_eps == 1e-6 and not config.tie_embeddings
    assert config_of(tmp_path, "transformers", expand=3).d_inner == TINY.d_inner


# --------------------------------------------------------------------------------- Mamba-2


def test_the_published_mamba2_config(tmp_path):
    """As in state-spaces/mamba2-130m."""
    data = {
        "d_model": 768,
        "d_intermediate": 0,
        "n_layer": 24,
        "vocab_size": 50277,
        "ssm_cfg": {"layer": "Mamba2"},
        "attn_layer_idx": [],
        "attn_cfg": {},
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": 16,
        "tie_embeddings": True,
    }
    (tmp_path / "config.json").write_text(json.dumps(data))
    config = read_config(tmp_path / "config.json")
    assert config == Mamba2Config(d_model=768, n_layer=24, vocab_size=50277)
    assert (config.padded_vocab_size, config.n_heads, config.d_conv_channels) == (50288, 24, 1792)
    del data["pad_vocab_size_multiple"]  # then it is 8, whatever the generation
    (tmp_path / "config.json").write_text(json.dumps(data))
    assert read_config(tmp_path / "config.json").padded_vocab_size == 50280


def test_the_published_codestral_config(tmp_path):
    """As in mistralai/Mamba-Codestral-7B-v0.1, which transformers reads; what it leaves out too."""
    data = {
        "model_type": "mamba2",
        "hidden_size": 4096,
        "num_hidden_layers": 64,
        "vocab_size": 32768,
        "norm_before_gate": True,
        "rms_norm": True,
        "time_step_limit": [0.0, {"__float__": "Infinity"}],
    }
    (tmp_path / "config.json").write_text(json.dumps(data))
    config = read_config(tmp_path / "config.json")
    assert (config.n_heads, config.n_groups, config.head_dim, config.d_state) == (128, 8, 64, 128)
    assert not config.tie_embeddings and config.dt_limit == (0, float("inf"))
    rows = {spec.name: spec.shape for spec in tensor_table(config)}
    assert rows["backbone.layers.63.mixer.in_proj.weight"] == (18560, 4096)
    assert rows["lm_head.weight"] == (32768, 4096)


@pytest.mark.parametrize(
    "naming, key, value, message",
    [
        ("original", "ssm_cfg", {"D_has_hdim": True}, "ssm_cfg.D_has_hdim = True"),
        ("original", "ssm_cfg", {"d_ssm": 4}, "ssm_cfg.d_ssm = 4"),
        ("original", "ssm_cfg", {"rmsnorm": False}, "ssm_cfg.rmsnorm = False"),
        ("original", "ssm_cfg", {"norm_before_gate": True}, "ssm_cfg.norm_before_gate = True"),
        ("original", "ssm_cfg", {"dt_rank": 4}, "'ssm_cfg.dt_rank'"),
        ("original", "ssm_cfg", {"dt_limit": [0.1]}, "ssm_cfg.dt_limit must be a pair of numbers"),
        ("original", "ssm_cfg", {"dt_limit": [1, 0.1]}, "dt_limit must hold two numbers"),
        ("original", "ssm_cfg", {"dt_limit": [float("nan"), 1]}, "must be a pair of numbers"),
        ("original", "attn_layer_idx", [3], "attn_layer_idx = [3] makes a hybrid"),
        ("original", "d_intermediate", 64, "d_intermediate = 64"),
        ("transformers", "num_heads", 5, "num_heads = 5 does not fit the other sizes"),
        ("transformers", "num_heads", None, "num_heads = 128 does not fit"),
        ("transformers", "head_dim", 5, "heads of 5 channels do not divide"),
        ("transformers", "n_groups", 3, "3 groups do not divide 4 heads"),
        ("transformers", "n_groups", None, "8 groups do not divide 4 heads"),
        ("transformers", "time_step_limit", [0, "Infinity"], "must be a pair of numbers"),
        ("transformers", "time_step_limit", [0, 10**400], "must be a pair of numbers"),
        ("transformers", "hidden_act", "gelu", "in Mamba-2 it is 'silu'"),
    ],
)
def test_what_mamba2_does_not_support_is_refused_by_name(tmp_path, naming, key, value, message):
    if key == "ssm_cfg":
        value = {"layer": "Mamba2", "headdim": 4} | value
    with pytest.raises(CheckpointError) as info:
        config_of(tmp_path, naming, CONFIGS["mamba2"], **{key: value})
    assert "config.json" in str(info.value) and message in str(info.value)


@pytest.mark.parametrize("name", IN_TRANSFORMERS)
def test_transformers_naming_says_the_same(tmp_path, name):
    """But for the padding of the vocabulary, and for the initialization that it does not know."""
    config = CONFIGS[name]
    found = config_of(tmp_path, "transformers", config)
    initial = ("dt_min", "dt_max", "dt_init_floor", "A_init_range", "dt_rank", "vocab_size")
    for field in dataclasses.fields(config):
        if field.name not in (*initial, "pad_vocab_size_multiple"):
            assert getattr(found, field.name) == getattr(config, field.name), field.name
    assert found.padded_vocab_size == config.padded_vocab_size


@pytest.mark.parametrize("name", CONFIGS)
def test_configurations_there_and_back(tmp_path, name):
    write_config(tmp_path / "config.json", CONFIGS[name])
    assert read_config(tmp_path / "config.json") == CONFIGS[name]


def test_an_unusual_eps_is_written_and_the_usual_one_is_not(tmp_path):
    """The original code does not know the key: it refuses the file rather than ignore the eps."""
    for config, expected in [(TINY, False), (CONFIGS["eps, dt"], True)]:
        write_config(tmp_path / "config.json", config)
        assert ("norm_epsilon" in json.loads((tmp_path / "config.json").read_text())) is expected


@pytest.mark.parametrize("naming", [None, "transformers"])
@pytest.mark.parametrize("name", ["defaults", "falcon", "mamba2", "mamba2, a lower limit"])
def test_what_is_written_is_json(tmp_path, name, naming):
    """Infinity, the usual upper limit of the time steps, is not: only Python reads that word."""
    lower = dataclasses.replace(CONFIGS["mamba2"], dt_limit=(0.01, float("inf")))
    config = (CONFIGS | {"mamba2, a lower limit": lower})[name]
    path = tmp_path / "config.json"
    write_config(path, config, naming)

    def refuse(constant):
        raise AssertionError(constant)

    json.loads(path.read_text(), parse_constant=refuse)
    if isinstance(config, Mamba2Config):
        assert read_config(path).dt_limit == config.dt_limit


def test_falcon_mamba_is_written_with_its_padding(tmp_path):
    """transformers' naming has no unpadded size. The shapes of the parameters are the same."""
    config = dataclasses.replace(CONFIGS["falcon"], vocab_size=13, pad_vocab_size_multiple=8)
    write_config(tmp_path / "config.json", config)
    found = read_config(tmp_path / "config.json")
    assert found == dataclasses.replace(config, vocab_size=16, pad_vocab_size_multiple=1)
    assert tensor_table(found) == tensor_table(config)


@pytest.mark.parametrize("key", ["mixer_rms_eps", "num_heads", "n_groups"])
def test_a_file_without_model_type_is_no_other_generation(tmp_path, key):
    """Such a file is Mamba-1's, unless it has keys that Mamba-1 does not have."""
    path = tmp_path / "config.json"
    data = {"hidden_size": 8, "num_hidden_layers": 1, "vocab_size": 16}
    path.write_text(json.dumps(data))
    assert type(read_config(path)) is MambaConfig
    path.write_text(json.dumps(data | {key: 1}))
    with pytest.raises(CheckpointError, match="has no model_type"):
        read_config(path)


def test_a_mamba3_file_that_does_not_name_its_generation(tmp_path):
    """Without ssm_cfg.layer it would be Mamba-1's: the error says what it looks like."""
    path = tmp_path / "config.json"
    write_config(path, CONFIGS["mamba3, all"])
    data = json.loads(path.read_text())
    del data["ssm_cfg"]["layer"]
    path.write_text(json.dumps(data))
    message = "unknown keys: .*ssm_cfg.is_mimo.* If this is Mamba-3, set ssm_cfg.layer to 'Mamba3'"
    with pytest.raises(CheckpointError, match=message):
        read_config(path)
    path.write_text(json.dumps(data | {"speed": 1}))
    with pytest.raises(CheckpointError, match="unknown keys: .*'speed'") as info:
        read_config(path)
    assert "If this is" not in str(info.value)  # no generation has this key


@pytest.mark.parametrize(
    ("name", "naming", "change", "message"),
    [
        ("mamba3", "original", {"model_type": "mamba"}, "model_type = 'mamba' is not .* Mamba-3"),
        ("mamba2", "original", {"model_type": "mamba"}, "model_type = 'mamba' is not .* Mamba-2"),
        ("defaults", "original", {"model_type": "mamba2"}, "'mamba2' is not .* in Mamba-1"),
        ("defaults", "transformers", {"ssm_cfg": {"layer": "Mamba2"}}, "'Mamba2' is not supported"),
        ("mamba2", "transformers", {"ssm_cfg": {"layer": "Mamba1"}}, "'Mamba1' is not supported"),
    ],
)
def test_a_generation_named_twice_is_one(tmp_path, name, naming, change, message):
    with pytest.raises(CheckpointError, match=message):
        config_of(tmp_path, naming, CONFIGS[name], **change)


def test_a_generation_named_twice_alike(tmp_path):
    for i, (name, kind) in enumerate([("mamba3", "mamba3"), ("mamba2", "mamba2")]):
        config = CONFIGS[name]
        assert config_of(tmp_path / str(i), "original", config, model_type=kind) == config


@pytest.mark.parametrize("none", [0, None])
def test_what_a_mamba3_file_lacks(tmp_path, none):
    path = tmp_path / "config.json"
    write_config(path, CONFIGS["mamba3"])
    data = json.loads(path.read_text()) | {"d_intermediate": none}
    data["ssm_cfg"]["rope_fraction"] = none
    path.write_text(json.dumps(data))
    expected = dataclasses.replace(CONFIGS["mamba3"], d_intermediate=0, rope_fraction=0)
    assert read_config(path) == expected
