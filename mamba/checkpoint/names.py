"""How checkpoints name the sizes and the tensors of a model.

The same model is published under two naming schemes: the original one (state-spaces/mamba-*) and
that of Hugging Face's transformers (state-spaces/mamba-*-hf). ``read_config`` reads both spellings
of ``config.json``. ``tensor_table`` lists every tensor that a checkpoint of a configuration holds,
and where in our parameters it belongs. Both loading and saving follow that table. What differs from
one generation of models to the next stands in its ``Schema``.
"""

import json
import math
import re

import jax.numpy as jnp

from mamba.checkpoint.files import read_json
from mamba.checkpoint.mamba1_schema import FALCON_MAMBA, MAMBA
from mamba.checkpoint.mamba2_schema import MAMBA2
from mamba.checkpoint.mamba3_schema import MAMBA3
from mamba.checkpoint.schema import (
    HYBRIDS,
    ORIGINAL,
    TRANSFORMERS,
    UNCHECKED,
    TensorSpec,
    projection,
)
from mamba.checkpoint.tensors import CheckpointError, abridged, quote

__all__ = ["naming_of", "read_config", "schema_of", "tensor_table", "write_config"]

SCHEMAS = (MAMBA, FALCON_MAMBA, MAMBA2, MAMBA3)
REQUIRED = ("d_model", "n_layer", "vocab_size")  # fields without a default


# ------------------------------------------------------------------------------ config.json


def read_config(path, dtype=jnp.float32):
    """Read a ``config.json`` in either naming scheme -> the configuration of its generation.

    A key that changes the computation is honoured; with a value that we do not support, it is
    refused. In the original scheme ``vocab_size`` may be unpadded, and the key ``norm_epsilon``
    gives an eps other than 1e-5 (the original code has that argument; its published files do not
    have the key). In transformers' scheme ``vocab_size`` counts the rows of the embedding.

    Args:
        path: of the file.
        dtype: of the matrix products, which the file does not decide.

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
    scheme = TRANSFORMERS if "hidden_size" in data else ORIGINAL
    nested = {} if data.get("ssm_cfg") is None else data["ssm_cfg"]
    if not isinstance(nested, dict):
        raise CheckpointError(f"{path}: ssm_cfg must be an object, found {quote(nested)}")
    data |= {f"ssm_cfg.{key}": value for key, value in nested.items()}

    schema = _find_schema(path, scheme, data)
    if scheme == TRANSFORMERS and "intermediate_size" not in schema.implied:
        data = _with_expand(path, data)
    keys = {field: getattr(key, scheme) for field, key in schema.keys.items()}
    keys = {field: key for field, key in keys.items() if key is not None}
    if scheme == ORIGINAL:  # the original code refuses keys that it does not know, and so do we
        unknown = sorted(data.keys() - schema.original_keys)
        unknown = [quote(key) for key in unknown if not key.startswith("_")]
        if unknown:
            found = f"{path}: unknown keys: {', '.join(abridged(unknown, 10))}"
            raise CheckpointError(found + _looks_like(schema, data))
    missing = [keys[field] for field in REQUIRED if keys[field] not in data]
    if missing:
        raise CheckpointError(f"{path}: missing keys: {', '.join(missing)}")
    values = dict(schema.absent.get(scheme, {})) | {
        field: _checked(path, schema.keys[field].kind, key, data[key])
        for field, key in keys.items()
        if key in data
    }
    try:
        config = schema.config(**values, dtype=dtype)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    if scheme == TRANSFORMERS:
        for key, (absent, size_of) in schema.implied.items():
            value, implied = data.get(key, absent), size_of(config)
            if value is not UNCHECKED and value != implied:
                raise CheckpointError(
                    f"{path}: {key} = {quote(value)} does not fit the other sizes, which make it "
                    f"{implied}"
                )
    return config


def _looks_like(schema, data):
    """What to say of unknown keys that another generation has, where the file does not name it."""
    keys = {key for key in data if not key.startswith("_")}
    fits = [s for s in SCHEMAS if s.layer and s.original_keys >= keys]
    if "ssm_cfg.layer" in data or not fits:
        return ""
    return f". If this is {fits[0].name}, set ssm_cfg.layer to {quote(fits[0].layer)}"


def _with_expand(path, data):
    """The keys, with expand = intermediate_size / hidden_size: where it is given, the width wins.

    Falcon-Mamba's files say ``"expand": 16`` beside a width of twice ``hidden_size``.
    """
    if "intermediate_size" not in data:
        return data
    width, d_model = (
        _checked(path, "positive integer", key, data[key])
        for key in ("intermediate_size", "hidden_size")
    )
    if width % d_model:
        raise CheckpointError(
            f"{path}: intermediate_size = {width} is not supported: it must be a multiple of "
            f"hidden_size = {d_model}"
        )
    return data | {"expand": width // d_model}


def _find_schema(path, scheme, data):
    """The Schema of the model that a ``config.json`` describes. Refuses other models by name."""
    model_type = data.get("model_type", MAMBA.model_type)
    layer = data.get("ssm_cfg.layer", MAMBA.layer)
    if type(model_type) is str and model_type in HYBRIDS:
        raise CheckpointError(
            f"{path}: model_type = {quote(model_type)} is a hybrid, which has "
            f"{HYBRIDS[model_type]}: attention is not supported"
        )
    if data.get("attn_layer_idx"):
        raise CheckpointError(
            f"{path}: attn_layer_idx = {quote(data['attn_layer_idx'])} makes a hybrid, which has "
            "attention in these layers: attention is not supported"
        )
    if "model_type" not in data and data.keys() & {"mixer_rms_eps", "num_heads", "n_groups"}:
        raise CheckpointError(f"{path}: has no model_type, and keys of another model than Mamba-1")
    if scheme == TRANSFORMERS:
        known = {s.model_type: s for s in SCHEMAS if s.model_type}
        key, value = "model_type", model_type
    else:
        known = {s.layer: s for s in SCHEMAS if s.layer}
        key, value = "ssm_cfg.layer", layer
    if type(value) is not str or value not in known:
        raise CheckpointError(
            f"{path}: {key} = {quote(value)} is not supported, but {', '.join(map(quote, known))}"
        )
    schema = known[value]
    # A file that names its generation twice must name the same one.
    named = {"model_type": (schema.model_type or schema.layer.lower(),)}
    named |= {"ssm_cfg.layer": (schema.layer,)} if schema.layer else {}
    for key, supported in (named | schema.supported).items():
        value = data.get(key, supported[0])
        if not any(type(value) is type(other) and value == other for other in supported):
            raise CheckpointError(
                f"{path}: {key} = {quote(value)} is not supported: in {schema.name} it is "
                f"{quote(supported[0])}"
            )
    return schema


def _checked(path, kind, key, value):
    """The value of a key, if it is of its kind (JSON's true and "16" are not numbers)."""
    if "auto" in kind and type(value) is str and value == "auto":
        return None
    if kind.endswith(" or 0") and (value is None or type(value) in (int, float) and value == 0):
        return None
    if kind == "pair of numbers":
        if type(value) is list and len(value) == 2:
            pair = tuple(_number(v) for v in value)
            if None not in pair:
                return pair
        valid = False
    elif kind == "boolean":
        valid = type(value) is bool
    elif kind.startswith("positive number"):
        valid = type(value) in (int, float) and 0 < value < 1e9
    else:
        valid = type(value) is int and 0 < value < 2**31
    if not valid:
        raise CheckpointError(f"{path}: {key} must be a {kind}, found {quote(value)}")
    return value


def _number(value):
    """A number, maybe infinite, also in the form in which transformers writes that; or None."""
    if value == {"__float__": "Infinity"}:
        return math.inf
    number = type(value) in (int, float) and (0 <= value < 1e9 or value == math.inf)
    return float(value) if number else None


def naming_of(config, naming=None):
    """The naming scheme to save a model in: the one asked for, or the original one if it has it.

    Raises ValueError for another name, and for a scheme that does not have the model.
    """
    schema = schema_of(config)
    names = {ORIGINAL: schema.layer, TRANSFORMERS: schema.model_type}
    if naming not in (None, *names):
        raise ValueError(f"naming must be one of {', '.join(map(repr, names))}, got {naming!r}")
    if naming and names[naming] is None:
        raise ValueError(f"the {naming} naming has no {schema.name}")
    return naming or (ORIGINAL if schema.layer else TRANSFORMERS)


def write_config(path, config, naming=None):
    """Write a ``config.json`` that ``read_config`` reads, in a naming as ``naming_of`` takes it.

    The dtype is not written, because the reader chooses it. In the original naming ``norm_epsilon``
    is written only if it is not 1e-5, and ``heavy_tail`` only if it is not True. The original code
    does not know these keys: it refuses such a file, and so does not compute something else.
    ``dt_limit`` is written there only if there is one. In transformers' naming ``vocab_size``
    counts the padding too, and what only initializes (``A_init_range``) has no key.
    """
    schema, scheme = schema_of(config), naming_of(config, naming)
    values = {field: getattr(config, field) for field in schema.keys}
    if scheme == TRANSFORMERS:
        title = "".join(word.capitalize() for word in schema.model_type.split("_"))
        data = {"model_type": schema.model_type, "architectures": [f"{title}ForCausalLM"]}
        data |= {"hidden_act": "silu", "intermediate_size": config.d_inner}
        data |= {key: size_of(config) for key, (_, size_of) in schema.implied.items()}
        values["vocab_size"] = config.padded_vocab_size
    else:
        data = {"rms_norm": True, "residual_in_fp32": True, "fused_add_norm": True, "ssm_cfg": {}}
        if schema is not MAMBA:  # which the first files, and the code of their time, do not name
            data["ssm_cfg"]["layer"] = schema.layer
        for field, key in schema.keys.items():
            if key.off_default and values[field] == getattr(type(config), field):
                del values[field]
    for field, value in values.items():
        key = getattr(schema.keys[field], scheme)
        if key is not None:
            target = data["ssm_cfg"] if key.startswith("ssm_cfg.") else data
            if value is None:
                value = "auto" if "auto" in schema.keys[field].kind else 0
            target[key.removeprefix("ssm_cfg.")] = value
    text = json.dumps(data, indent=2, sort_keys=True)
    # Valid JSON has no infinity. Every reader makes one of this number.
    path.write_text(re.sub(r"\bInfinity\b", "1e999", text) + "\n")


# ------------------------------------------------------------------------------ tensors


def schema_of(config):
    """The Schema of a configuration's checkpoints.

    Raises:
        ValueError: checkpoints have no names for the tensors of this type of configuration.
    """
    falcon = getattr(config, "select_norm_eps", None) is not None
    for schema in SCHEMAS:
        if type(config) is schema.config and (schema is FALCON_MAMBA) == falcon:
            return schema
    raise ValueError(
        f"a model of {type(config).__name__} has no checkpoint format: published checkpoints name "
        "the tensors of MambaConfig, Mamba2Config and Mamba3Config only"
    )


def tensor_table(config, embedding="embedding"):
    """Every tensor of a Mamba of this configuration, and no other -> list of TensorSpecs.

    A tied checkpoint may also hold ``lm_head.weight``, equal to the embedding.

    Args:
        config: a MambaConfig, Mamba2Config or Mamba3Config.
        embedding: "embedding" in the original scheme, "embeddings" in transformers'. All other
            names are the same in both.

    Raises:
        ValueError: checkpoints have no names for the tensors of this type of configuration.
    """
    c, schema = config, schema_of(config)
    layer = [TensorSpec("norm.scale", "norm.weight", (c.d_model,), float32=True)]
    layer += [
        spec._replace(path=f"mixer.{spec.path}", name=f"mixer.{spec.name}")
        for spec in schema.mixer(c)
    ]
    table = (c.padded_vocab_size, c.d_model)
    if c.mlp_width:
        layer.append(TensorSpec("norm2.scale", "norm2.weight", (c.d_model,), float32=True))
        layer += projection("mlp.fc1", 2 * c.mlp_width, c.d_model)
        layer += projection("mlp.fc2", c.d_model, c.mlp_width)
    specs = [TensorSpec("embedding.embedding", f"backbone.{embedding}.weight", table)]
    for i in range(c.n_layer):
        ours, theirs = f"layers_{i}.", f"backbone.layers.{i}."
        specs += [spec._replace(path=ours + spec.path, name=theirs + spec.name) for spec in layer]
    specs.append(TensorSpec("norm_f.scale", "backbone.norm_f.weight", (c.d_model,), float32=True))
    return specs if c.tie_embeddings else [*specs, *projection("lm_head", *table)]
