"""The checkpoints of Mamba-2: state-spaces/mamba2-*, and transformers' (Codestral's form)."""

from mamba.checkpoint.schema import (
    COMMON_IGNORED,
    COMMON_KEYS,
    COMMON_SUPPORTED,
    ORIGINAL,
    TRANSFORMERS,
    UNCHECKED,
    Key,
    Schema,
    TensorSpec,
    convolution,
    kept_in_float32,
    projection,
)
from mamba.mamba2 import Mamba2Config

__all__ = ["MAMBA2", "mamba2_mixer"]


def mamba2_mixer(config):
    """The tensors of Mamba2Block -> list of TensorSpecs.

    in_proj's rows are those of z, x, B, C and dt, in this order.
    """
    c, h = config, (config.n_heads,)
    return [
        *projection("in_proj", c.d_inner + c.d_conv_channels + c.n_heads, c.d_model, c.bias),
        *convolution(c.d_conv_channels, c),
        *kept_in_float32(dt_bias=h, A_log=h, D=h),
        TensorSpec("norm.scale", "norm.weight", (c.d_inner,), float32=True),
        *projection("out_proj", c.d_model, c.d_inner, c.bias),
    ]


MAMBA2 = Schema(
    name="Mamba-2",
    config=Mamba2Config,
    model_type="mamba2",
    layer="Mamba2",
    keys=COMMON_KEYS
    | {
        "head_dim": Key("positive integer", "ssm_cfg.headdim", "head_dim"),
        "n_groups": Key("positive integer", "ssm_cfg.ngroups", "n_groups"),
        "A_init_range": Key("pair of numbers", "ssm_cfg.A_init_range", None),
        "dt_limit": Key("pair of numbers", "ssm_cfg.dt_limit", "time_step_limit", off_default=True),
    },
    absent={
        ORIGINAL: {"pad_vocab_size_multiple": 8},
        TRANSFORMERS: {"pad_vocab_size_multiple": 1, "n_groups": 8, "tie_embeddings": False},
    },
    supported=COMMON_SUPPORTED
    | {
        "ssm_cfg.D_has_hdim": (False,),
        "ssm_cfg.d_ssm": (None,),
        "ssm_cfg.norm_before_gate": (False,),
        "ssm_cfg.rmsnorm": (True,),
    },
    ignored=COMMON_IGNORED
    | {"ssm_cfg.chunk_size", "ssm_cfg.conv_init", "ssm_cfg.use_mem_eff_path"},
    implied={
        "num_heads": (128, lambda config: config.n_heads),
        "intermediate_size": (UNCHECKED, lambda config: config.d_inner),  # its code reads expand
    },
    mixer=mamba2_mixer,
)
