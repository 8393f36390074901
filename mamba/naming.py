"""What a checkpoint calls things: the two spellings of ``config.json``, and the table of tensors.

The same model is published under two naming schemes: the original one (state-spaces/mamba-*) and
that of Hugging Face's transformers (state-spaces/mamba-*-hf). ``read_config`` reads either.
``tensor_table`` lists, for a configuration, every tensor that a checkpoint must hold and where in
our parameters it goes. Reading and writing both follow that table.
"""

import json
from typing import NamedTuple

import jax.numpy as jnp

from mamba.block import MambaConfig
from mamba.checkpoint import CheckpointError, read_json

__all__ = ["Row", "read_config", "tensor_table", "write_config"]

# MambaConfig field -> (what its value must be, key in the original scheme, key in transformers').
# A key "ssm_cfg.x" lies in the nested object ssm_cfg.
_FIELDS = {
    "d_model": ("positive integer", "d_model", "hidden_size"),
    "n_layer": ("positive integer", "n_layer", "num_hidden_layers"),
    "vocab_size": ("positive integer", "vocab_size", "vocab_size"),
    "d_state": ("positive integer", "ssm_cfg.d_state", "state_size"),
    "d_conv": ("positive integer", "ssm_cfg.d_conv", "conv_kernel"),
    "expand": ("positive integer", "ssm_cfg.expand", "expand"),
    "dt_rank": ("positive integer or 'auto'", "ssm_cfg.dt_rank", "time_step_rank"),
    "dt_min": ("positive number", "ssm_cfg.dt_min", "time_step_min"),
    "dt_max": ("positive number", "ssm_cfg.dt_max", "time_step_max"),
    "dt_init_floor": ("positive number", "ssm_cfg.dt_init_floor", "time_step_floor"),
    "conv_bias": ("boolean", "ssm_cfg.conv_bias", "use_conv_bias"),
    "bias": ("boolean", "ssm_cfg.bias", "use_bias"),
    "norm_eps": ("positive number", "norm_epsilon", "layer_norm_epsilon"),
    "tie_embeddings": ("boolean", "tie_embeddings", "tie_word_embeddings"),
    "pad_vocab_size_multiple": ("positive integer", "pad_vocab_size_multiple", None),
}
_REQUIRED = ("d_model", "n_layer", "vocab_size")

# Any other value of these keys means another computation than ours.
_ONLY = {
    "model_type": ["mamba"],
    "ssm_cfg.layer": ["Mamba1"],
    "attn_layer_idx": [[], None],
    "d_intermediate": [0],
    "rms_norm": [True],
    "hidden_act": ["silu", "swish"],
}
# These change nothing here: how to initialize, which kernel to run, where the residual stream is
# rounded (ours is always float32), and what programs write about themselves.
_IGNORED = set(
    "ssm_cfg ssm_cfg.dt_init ssm_cfg.dt_scale ssm_cfg.use_fast_path attn_cfg residual_in_fp32 "
    "fused_add_norm architectures torch_dtype dtype transformers_version tokenizer_class use_cache "
    "bos_token_id eos_token_id pad_token_id".split()
)


def read_config(path, dtype=jnp.float32):
    """Read a ``config.json`` in either naming scheme -> MambaConfig with the given compute dtype.

    Everything that changes the computation is honoured or, where we do not support it, refused by
    name. In the original scheme ``vocab_size`` may be unpadded, and the key ``norm_epsilon`` gives
    an eps other than 1e-5 (its code has the argument, its published files never the key). In
    transformers' scheme ``vocab_size`` counts the rows of the embedding. Raises CheckpointError,
    which names file, key and value.
    """
    data = read_json(path)
    if not {"d_model", "hidden_size"} & data.keys():
        raise CheckpointError(
            f"{path}: has neither 'd_model' (the original naming) nor 'hidden_size' "
            "(transformers'): is this the configuration of a Mamba model?"
        )
    # transformers' published files carry the original keys along, unread: its own key decides
    original = "hidden_size" not in data
    nested = {} if data.get("ssm_cfg") is None else data["ssm_cfg"]
    if not isinstance(nested, dict):
        raise CheckpointError(f"{path}: ssm_cfg must be an object, found {_shown(nested)}")
    data |= {f"ssm_cfg.{key}": value for key, value in nested.items()}

    for key, allowed in _ONLY.items():
        value = data.get(key, allowed[0])
        if not any(type(value) is type(good) and value == good for good in allowed):
            raise CheckpointError(
                f"{path}: {key} = {_shown(value)} is not supported: we compute Mamba-1, "
                f"where it is {_shown(allowed[0])}"
            )
    keys = {field: row[1] if original else row[2] for field, row in _FIELDS.items()}
    if original:  # the original code refuses keys that it does not know, and so do we
        known = set(keys.values()) | _ONLY.keys() | _IGNORED
        unknown = [_shown(key) for key in data if key not in known and not key.startswith("_")]
        if unknown:
            raise CheckpointError(f"{path}: unknown keys: {', '.join(unknown)}")
    missing = [keys[field] for field in _REQUIRED if keys[field] not in data]
    if missing:
        raise CheckpointError(f"{path}: missing keys: {', '.join(missing)}")
    values = {f: _checked(path, f, keys[f], data[keys[f]]) for f in keys if keys[f] in data}
    if not original:
        values["pad_vocab_size_multiple"] = 1
    try:
        config = MambaConfig(**values, dtype=dtype)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    width = data.get("intermediate_size", config.d_inner)
    if not original and width != config.d_inner:
        raise CheckpointError(
            f"{path}: intermediate_size = {_shown(width)} is not supported: it must be "
            f"expand · hidden_size = {config.d_inner}"
        )
    return config


def _checked(path, field, key, value):
    """The value of a key, if it is what it must be (JSON's true and "16" are no numbers)."""
    kind = _FIELDS[field][0]
    if kind == "boolean":
        good = type(value) is bool
    elif kind == "positive number":
        good = type(value) in (int, float) and 0 < value < 1e9
    else:
        good = type(value) is int and 0 < value < 2**31
    if "auto" in kind and type(value) is str and value == "auto":
        return None
    if not good:
        raise CheckpointError(f"{path}: {key} must be a {kind}, found {_shown(value)}")
    return value


def _shown(value):
    text = json.dumps(value)
    return text if len(text) <= 100 else text[:100] + "…"


def write_config(path, config):
    """Write a MambaConfig as a ``config.json`` in the original naming; ``read_config`` reads it.

    Its dtype is not written: the reader chooses. ``norm_epsilon`` is written only where it is not
    1e-5: the original code would refuse the file rather than compute with another eps.
    """
    data = {"rms_norm": True, "residual_in_fp32": True, "fused_add_norm": True, "ssm_cfg": {}}
    for field, (_, key, _) in _FIELDS.items():
        value = getattr(config, field)
        if field != "norm_eps" or value != MambaConfig.norm_eps:
            target = data["ssm_cfg"] if key.startswith("ssm_cfg.") else data
            target[key.removeprefix("ssm_cfg.")] = "auto" if value is None else value
    path.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n")


class Row(NamedTuple):
    """One tensor: its path in our parameters, its name and shape in a checkpoint.

    ``transpose``: PyTorch keeps a matrix as (out, in) and the convolution as (d_inner, 1, d_conv);
    ours are (in, out) and (d_conv, d_inner). ``float32``: kept in float32 whatever the dtype asked.
    """

    path: str
    name: str
    shape: tuple[int, ...]
    transpose: bool = False
    float32: bool = False

    @property
    def our_shape(self):
        """The tensor's shape in our parameters."""
        return (self.shape[-1], self.shape[0]) if self.transpose else self.shape


def tensor_table(config, embedding="embedding"):
    """Every tensor of a Mamba of this configuration -> list of Rows: all of them, and no other.

    ``embedding``: "embedding" in the original scheme, "embeddings" in transformers'; every other
    name is the same. A tied checkpoint may hold ``lm_head.weight`` too, equal to the embedding.
    """
    d, di, r, n, k = config.d_model, config.d_inner, config.rank, config.d_state, config.d_conv
    vocab = config.padded_vocab_size
    layer = [
        Row("norm.scale", "norm.weight", (d,), float32=True),
        Row("mixer.in_proj.kernel", "mixer.in_proj.weight", (2 * di, d), transpose=True),
        Row("mixer.conv1d.kernel", "mixer.conv1d.weight", (di, 1, k), transpose=True),
        Row("mixer.x_proj.kernel", "mixer.x_proj.weight", (r + 2 * n, di), transpose=True),
        Row("mixer.dt_proj.kernel", "mixer.dt_proj.weight", (di, r), transpose=True),
        Row("mixer.dt_proj.bias", "mixer.dt_proj.bias", (di,), float32=True),
        Row("mixer.A_log", "mixer.A_log", (di, n), float32=True),
        Row("mixer.D", "mixer.D", (di,), float32=True),
        Row("mixer.out_proj.kernel", "mixer.out_proj.weight", (d, di), transpose=True),
    ]
    if config.conv_bias:
        layer.append(Row("mixer.conv1d.bias", "mixer.conv1d.bias", (di,)))
    if config.bias:
        layer.append(Row("mixer.in_proj.bias", "mixer.in_proj.bias", (2 * di,)))
        layer.append(Row("mixer.out_proj.bias", "mixer.out_proj.bias", (d,)))

    rows = [Row("embedding.embedding", f"backbone.{embedding}.weight", (vocab, d))]
    for i in range(config.n_layer):
        ours, theirs = f"layers_{i}.", f"backbone.layers.{i}."
        rows += [row._replace(path=ours + row.path, name=theirs + row.name) for row in layer]
    rows.append(Row("norm_f.scale", "backbone.norm_f.weight", (d,), float32=True))
    if not config.tie_embeddings:
        rows.append(Row("lm_head.kernel", "lm_head.weight", (vocab, d), transpose=True))
    return rows
