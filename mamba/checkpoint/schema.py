"""What a generation of models says about its checkpoints: keys of ``config.json``, and tensors."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

__all__ = [
    "COMMON_KEYS",
    "COMMON_SUPPORTED",
    "COMMON_IGNORED",
    "HYBRIDS",
    "ORIGINAL",
    "TRANSFORMERS",
    "UNCHECKED",
    "Key",
    "Schema",
    "TensorSpec",
    "convolution",
    "kept_in_float32",
    "projection",
]

ORIGINAL, TRANSFORMERS = "original", "transformers"  # the two naming schemes
UNCHECKED = object()  # stands for the value of an implied key that may be absent
HYBRIDS = {  # model_type: what such a model has beside state space layers
    "bamba": "attention layers between its Mamba-2 layers",
    "falcon_h1": "attention heads beside the Mamba-2 mixer of every layer",
    "granitemoehybrid": "attention and expert layers between its Mamba-2 layers",
    "jamba": "attention and expert layers between its Mamba layers",
    "nemotron_h": "attention and MLP layers between its Mamba-2 layers",
    "zamba": "an attention block, shared by many places, between its Mamba layers",
    "zamba2": "attention blocks, each shared by many places, between its Mamba-2 layers",
}


class Key(NamedTuple):
    """How a field of a configuration is spelled in ``config.json``."""

    kind: str  # what the value must be
    original: str | None  # "ssm_cfg.x" lies in the nested object ssm_cfg; None: it has no such key
    transformers: str | None  # None: it has none
    off_default: bool = False  # whether the original scheme has it only where it is no default


class TensorSpec(NamedTuple):
    """One tensor: where it is in our parameters, and its name and form in a checkpoint."""

    path: str  # in our parameters, such as "layers_0.mixer.A_log"
    name: str  # in a checkpoint
    shape: tuple[int, ...]  # in a checkpoint
    # PyTorch keeps a matrix as (out, in) and the convolution as (channels, 1, d_conv); ours are
    # (in, out) and (d_conv, channels).
    transpose: bool = False  # whether ours is the transpose
    float32: bool = False  # whether it stays in float32, whatever dtype the matrices have

    @property
    def our_shape(self):
        """The shape in our parameters."""
        return (self.shape[-1], self.shape[0]) if self.transpose else self.shape


class Schema(NamedTuple):
    """The checkpoints of one generation."""

    name: str  # in words
    config: type  # the configuration that they are read into
    model_type: str | None  # what transformers calls it; None: it has no such model
    layer: str | None  # what ssm_cfg.layer is in the original scheme; None: it has no such model
    keys: Mapping[str, Key]  # by field of the configuration
    absent: Mapping[str, Mapping]  # by scheme: fields whose value is not ours where they are absent
    supported: Mapping[str, tuple]  # by key: values that compute what we compute; first: if absent
    ignored: frozenset  # keys that do not change what is computed
    implied: Mapping[str, tuple]  # transformers' keys: (value if absent, config -> what it must be)
    mixer: Callable  # config -> the TensorSpecs of a layer's mixer, without "mixer."

    @property
    def original_keys(self):
        """All keys that this generation's files may have in the original naming."""
        keys = {key.original for key in self.keys.values()} - {None}
        return {*keys, *self.supported, *self.ignored, "model_type", "ssm_cfg.layer"}


# What every language model of the family has.
COMMON_KEYS = {
    "d_model": Key("positive integer", "d_model", "hidden_size"),
    "n_layer": Key("positive integer", "n_layer", "num_hidden_layers"),
    "vocab_size": Key("positive integer", "vocab_size", "vocab_size"),
    "d_state": Key("positive integer", "ssm_cfg.d_state", "state_size"),
    "d_conv": Key("positive integer", "ssm_cfg.d_conv", "conv_kernel"),
    "expand": Key("positive integer", "ssm_cfg.expand", "expand"),
    "dt_min": Key("positive number", "ssm_cfg.dt_min", "time_step_min"),
    "dt_max": Key("positive number", "ssm_cfg.dt_max", "time_step_max"),
    "dt_init_floor": Key("positive number", "ssm_cfg.dt_init_floor", "time_step_floor"),
    "conv_bias": Key("boolean", "ssm_cfg.conv_bias", "use_conv_bias"),
    "bias": Key("boolean", "ssm_cfg.bias", "use_bias"),
    "norm_eps": Key("positive number", "norm_epsilon", "layer_norm_epsilon", off_default=True),
    "tie_embeddings": Key("boolean", "tie_embeddings", "tie_word_embeddings"),
    "pad_vocab_size_multiple": Key("positive integer", "pad_vocab_size_multiple", None),
}
# With any other value of these keys, the model computes something else than ours. The first value
# is the one that holds where the key is absent.
COMMON_SUPPORTED = {
    "attn_layer_idx": ([], None),
    "d_intermediate": (0,),
    "rms_norm": (True,),
    "hidden_act": ("silu", "swish"),
}
# These keys do not change what we compute. They say how to initialize, which kernel to run, where
# to round the residual stream (ours is always float32), or what wrote the file.
COMMON_IGNORED = frozenset(
    {
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
        "tokenizer_class",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)


def projection(name, rows, columns, bias=False):
    """The TensorSpecs of a linear layer ``name``: (out, in) in a checkpoint, (in, out) here."""
    specs = [TensorSpec(f"{name}.kernel", f"{name}.weight", (rows, columns), transpose=True)]
    return specs + [TensorSpec(f"{name}.bias", f"{name}.bias", (rows,))] * bias


def convolution(channels, config):
    """The TensorSpecs of the causal convolution."""
    shape = (channels, 1, config.d_conv)
    specs = [TensorSpec("conv1d.kernel", "conv1d.weight", shape, transpose=True)]
    return specs + [TensorSpec("conv1d.bias", "conv1d.bias", (channels,))] * config.conv_bias


def kept_in_float32(**shapes):
    """The TensorSpecs of parameters that have the same name and form here, and stay in float32."""
    return [TensorSpec(name, name, shape, float32=True) for name, shape in shapes.items()]
