"""The checkpoints of Mamba-3: state-spaces/mamba3-siso-* and mamba3-mimo-*."""

from mamba.checkpoint.schema import (
    COMMON_IGNORED,
    COMMON_KEYS,
    COMMON_SUPPORTED,
    ORIGINAL,
    Key,
    Schema,
    TensorSpec,
    kept_in_float32,
    projection,
)
from mamba.mamba3 import Mamba3Config

__all__ = ["MAMBA3", "mamba3_mixer"]

_ABSENT = {"d_conv", "conv_bias", "bias"}  # keys of the others that Mamba-3 does not have


def mamba3_mixer(config):
    """The tensors of Mamba3Block -> list of TensorSpecs.

    in_proj's rows are those of z, x, B, C, dt, the rates, the shares and the angles, in this order;
    those of B and C are laid out (R, G, N).
    """
    c, h = config, config.n_heads
    group = c.rank * c.n_groups * c.d_state
    biases = dict.fromkeys(("B_bias", "C_bias"), (h, c.rank, c.d_state))
    mimo = dict.fromkeys(("mimo_x", "mimo_z", "mimo_o"), (h, c.rank, c.head_dim))
    norms = [
        TensorSpec(f"{name}.scale", f"{name}.weight", (c.d_state,), float32=True)
        for name in ("B_norm", "C_norm")
    ]
    return [
        *projection("in_proj", 2 * c.d_inner + 2 * group + 3 * h + c.n_angles, c.d_model),
        *kept_in_float32(dt_bias=(h,), D=(h,), **biases, **(mimo if c.is_mimo else {})),
        *norms,
        *projection("out_proj", c.d_model, c.d_inner),
    ]


MAMBA3 = Schema(
    name="Mamba-3",
    config=Mamba3Config,
    model_type=None,
    layer="Mamba3",
    keys={field: key for field, key in COMMON_KEYS.items() if field not in _ABSENT}
    | {
        "d_intermediate": Key("positive integer or 0", "d_intermediate", None),
        "head_dim": Key("positive integer", "ssm_cfg.headdim", None),
        "n_groups": Key("positive integer", "ssm_cfg.ngroups", None),
        "is_mimo": Key("boolean", "ssm_cfg.is_mimo", None),
        "mimo_rank": Key("positive integer", "ssm_cfg.mimo_rank", None),
        # The original code takes 0.5 and 1.0 only, and stops at another.
        "rope_fraction": Key("positive number or 0", "ssm_cfg.rope_fraction", None),
        "A_floor": Key("positive number", "ssm_cfg.A_floor", None),
        # Ours. The original code knows no other rates than heavy_tail's. It stops at a key that it
        # does not know, but not in ssm_cfg: there it would ignore it.
        "heavy_tail": Key("boolean", "heavy_tail", None, off_default=True),
    },
    absent={ORIGINAL: {"pad_vocab_size_multiple": 8}},
    supported={key: values for key, values in COMMON_SUPPORTED.items() if key != "d_intermediate"}
    | {"ssm_cfg.is_outproj_norm": (False,)},
    ignored=COMMON_IGNORED
    | {"ssm_cfg.chunk_size", "ssm_cfg.dropout", "ssm_cfg.fuse_pregate_headwise_norm"},
    implied={},
    mixer=mamba3_mixer,
)
