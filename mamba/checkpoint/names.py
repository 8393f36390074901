"""How checkpoints name the sizes and the tensors of a model.

The same model is published under two naming schemes: the original one (state-spaces/mamba-*) and
that of Hugging Face's transformers (state-spaces/mamba-*-hf). ``read_config`` reads both spellings
of ``config.json``. ``tensor_table`` lists every tensor that a checkpoint of a configuration holds,
and where in our parameters it belongs. Both loading and saving follow that table.
"""

import json
from typing import NamedTuple

import jax.numpy as jnp

from mamba.checkpoint.files import read_json
from mamba.checkpoint.tensors import CheckpointError, abridged, quote
from mamba.mamba1 import MambaConfig

__all__ = ["TensorSpec", "read_config", "tensor_table", "write_config"]


# ------------------------------------------------------------------------------ config.json


class _Key(NamedTuple):
    """How a field of MambaConfig is spelled in ``config.json``."""

    kind: str  # what the value must be
    original: str  # key in the original scheme; "ssm_cfg.x" lies in the nested object ssm_cfg
    transformers: str | None  # key in transformers' scheme; None: it has none


_KEYS = {
    "d_model": _Key("positive integer", "d_model", "hidden_size"),
    "n_layer": _Key("positive integer", "n_layer", "num_hidden_layers"),
    "vocab_size": _Key("positive integer", "vocab_size", "vocab_size"),
    "d_state": _Key("positive integer", "ssm_cfg.d_state", "state_size"),
    "d_conv": _Key("positive integer", "ssm_cfg.d_conv", "conv_kernel"),
    "expand": _Key("positive integer", "ssm_cfg.expand", "expand"),
    "dt_rank": _Key("positive integer or 'auto'", "ssm_cfg.dt_rank", "time_step_rank"),
    "dt_min": _Key("positive number", "ssm_cfg.dt_min", "time_step_min"),
    "dt_max": _Key("positive number", "ssm_cfg.dt_max", "time_step_max"),
    "dt_init_floor": _Key("positive number", "ssm_cfg.dt_init_floor", "time_step_floor"),
    "conv_bias": _Key("boolean", "ssm_cfg.conv_bias", "use_conv_bias"),
    "bias": _Key("boolean", "ssm_cfg.bias", "use_bias"),
    "norm_eps": _Key("positive number", "norm_epsilon", "layer_norm_epsilon"),
    "tie_embeddings": _Key("boolean", "tie_embeddings", "tie_word_embeddings"),
    "pad_vocab_size_multiple": _Key("positive integer", "pad_vocab_size_multiple", None),
}
_REQUIRED = ("d_model", "n_layer", "vocab_size")

# With any other value of these keys, the model computes something else than ours. The first value
# is the one that holds where the key is absent.
_SUPPORTED = {
    "model_type": ("mamba",),
    "ssm_cfg.layer": ("Mamba1",),
    "attn_layer_idx": ([], None),
    "d_intermediate": (0,),
    "rms_norm": (True,),
    "hidden_act": ("silu", "swish"),
}
# These keys do not change what we compute. They say how to initialize, which kernel to run, where
# to round the residual stream (ours is always float32), or what wrote the file.
_IGNORED = {
    "architectures",
    "attn_cfg",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "fused_add_norm",
    "pad_token_id",
    "residual_in_fp32",
    "ssm_cfg",
    "ssm_cfg.dt_init",
    "ssm_cfg.dt_scale",
    "ssm_cfg.use_fast_path",
    "tokenizer_class",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}


def read_config(path, dtype=jnp.float32):
    """Read a ``config.json`` in either naming scheme -> MambaConfig with the given compute dtype.

    A key that changes the computation is honoured; with a value that we do not support, it is
    refused. In the original scheme ``vocab_size`` may be unpadded, and the key ``norm_epsilon``
    gives an eps other than 1e-5 (the original code has that argument; its published files do not
    have the key). In transformers' scheme ``vocab_size`` counts the rows of the embedding.

    Raises:
        CheckpointError: names the file, the key and its value.
    """
    data = read_json(path)
    if not {"d_model", "hidden_size"} & data.keys():
        raise CheckpointError(
            f"{path}: has neither 'd_model' (the original naming) nor 'hidden_size' "
            "(transformers'): is this the configuration of a Mamba model?"
        )
    # Transformers' published files repeat the original keys, which its code does not read. So its
    # own key tells the two schemes apart.
    original = "hidden_size" not in data
    nested = {} if data.get("ssm_cfg") is None else data["ssm_cfg"]
    if not isinstance(nested, dict):
        raise CheckpointError(f"{path}: ssm_cfg must be an object, found {quote(nested)}")
    data |= {f"ssm_cfg.{key}": value for key, value in nested.items()}

    for key, supported in _SUPPORTED.items():
        value = data.get(key, supported[0])
        if not any(type(value) is type(other) and value == other for other in supported):
            raise CheckpointError(
                f"{path}: {key} = {quote(value)} is not supported: in Mamba-1 it is "
                f"{quote(supported[0])}"
            )
    keys = {field: key.original if original else key.transformers for field, key in _KEYS.items()}
    if original:  # the original code refuses keys that it does not know, and so do we
        known = set(keys.values()) | _SUPPORTED.keys() | _IGNORED
        unknown = [quote(key) for key in data if key not in known and not key.startswith("_")]
        if unknown:
            raise CheckpointError(f"{path}: unknown keys: {', '.join(abridged(unknown, 10))}")
    missing = [keys[field] for field in _REQUIRED if keys[field] not in data]
    if missing:
        raise CheckpointError(f"{path}: missing keys: {', '.join(missing)}")
    values = {
        field: _checked(path, _KEYS[field].kind, key, data[key])
        for field, key in keys.items()
        if key in data
    }
    if not original:
        values["pad_vocab_size_multiple"] = 1
    try:
        config = MambaConfig(**values, dtype=dtype)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    width = data.get("intermediate_size", config.d_inner)
    if not original and width != config.d_inner:
        raise CheckpointError(
            f"{path}: intermediate_size = {quote(width)} is not supported: it must be "
            f"expand · hidden_size = {config.d_inner}"
        )
    return config


def _checked(path, kind, key, value):
    """The value of a key, if it is of its kind (JSON's true and "16" are not numbers)."""
    if "auto" in kind and type(value) is str and value == "auto":
        return None
    if kind == "boolean":
        valid = type(value) is bool
    elif kind == "positive number":
        valid = type(value) in (int, float) and 0 < value < 1e9
    else:
        valid = type(value) is int and 0 < value < 2**31
    if not valid:
        raise CheckpointError(f"{path}: {key} must be a {kind}, found {quote(value)}")
    return value


def write_config(path, config):
    """Write a MambaConfig as a ``config.json`` in the original naming; ``read_config`` reads it.

    The dtype is not written, because the reader chooses it. ``norm_epsilon`` is written only if it
    is not 1e-5. The original code does not know the key: it refuses such a file, and so does not
    compute with another eps.
    """
    data = {"rms_norm": True, "residual_in_fp32": True, "fused_add_norm": True, "ssm_cfg": {}}
    for field, key in _KEYS.items():
        value = getattr(config, field)
        if field != "norm_eps" or value != MambaConfig.norm_eps:
            target = data["ssm_cfg"] if key.original.startswith("ssm_cfg.") else data
            target[key.original.removeprefix("ssm_cfg.")] = "auto" if value is None else value
    path.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n")


# ------------------------------------------------------------------------------ tensors


class TensorSpec(NamedTuple):
    """One tensor: where it is in our parameters, and its name and form in a checkpoint."""

    path: str  # in our parameters, such as "layers_0.mixer.A_log"
    name: str  # in a checkpoint
    shape: tuple[int, ...]  # in a checkpoint
    # PyTorch keeps a matrix as (out, in) and the convolution as (d_inner, 1, d_conv); ours are
    # (in, out) and (d_conv, d_inner).
    transpose: bool = False  # whether ours is the transpose
    float32: bool = False  # whether it stays in float32, whatever dtype the matrices have

    @property
    def our_shape(self):
        """The shape in our parameters."""
        return (self.shape[-1], self.shape[0]) if self.transpose else self.shape


def tensor_table(config, embedding="embedding"):
    """Every tensor of a Mamba of this configuration, and no other -> list of TensorSpecs.

    A tied checkpoint may also hold ``lm_head.weight``, equal to the embedding.

    Args:
        config: a MambaConfig.
        embedding: "embedding" in the original scheme, "embeddings" in transformers'. All other
            names are the same in both.

    Raises:
        ValueError: checkpoints have no names for the tensors of this type of configuration.
    """
    if type(config) is not MambaConfig:
        raise ValueError(
            f"a model of {type(config).__name__} has no checkpoint format: published checkpoints "
            "name the tensors of MambaConfig only"
        )
    d, di, r, n, k = config.d_model, config.d_inner, config.rank, config.d_state, config.d_conv
    vocab = config.padded_vocab_size
    layer = [
        TensorSpec("norm.scale", "norm.weight", (d,), float32=True),
        TensorSpec("mixer.in_proj.kernel", "mixer.in_proj.weight", (2 * di, d), transpose=True),
        TensorSpec("mixer.conv1d.kernel", "mixer.conv1d.weight", (di, 1, k), transpose=True),
        TensorSpec("mixer.x_proj.kernel", "mixer.x_proj.weight", (r + 2 * n, di), transpose=True),
        TensorSpec("mixer.dt_proj.kernel", "mixer.dt_proj.weight", (di, r), transpose=True),
        TensorSpec("mixer.dt_proj.bias", "mixer.dt_proj.bias", (di,), float32=True),
        TensorSpec("mixer.A_log", "mixer.A_log", (di, n), float32=True),
        TensorSpec("mixer.D", "mixer.D", (di,), float32=True),
        TensorSpec("mixer.out_proj.kernel", "mixer.out_proj.weight", (d, di), transpose=True),
    ]
    if config.conv_bias:
        layer.append(TensorSpec("mixer.conv1d.bias", "mixer.conv1d.bias", (di,)))
    if config.bias:
        layer.append(TensorSpec("mixer.in_proj.bias", "mixer.in_proj.bias", (2 * di,)))
        layer.append(TensorSpec("mixer.out_proj.bias", "mixer.out_proj.bias", (d,)))

    specs = [TensorSpec("embedding.embedding", f"backbone.{embedding}.weight", (vocab, d))]
    for i in range(config.n_layer):
        ours, theirs = f"layers_{i}.", f"backbone.layers.{i}."
        specs += [spec._replace(path=ours + spec.path, name=theirs + spec.name) for spec in layer]
    specs.append(TensorSpec("norm_f.scale", "backbone.norm_f.weight", (d,), float32=True))
    if not config.tie_embeddings:
        specs.append(TensorSpec("lm_head.kernel", "lm_head.weight", (vocab, d), transpose=True))
    return specs
