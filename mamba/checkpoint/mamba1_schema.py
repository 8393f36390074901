"""The checkpoints of Mamba, and those of Falcon-Mamba, which has the same tensors."""

from mamba.checkpoint.schema import (
    COMMON_IGNORED,
    COMMON_KEYS,
    COMMON_SUPPORTED,
    TRANSFORMERS,
    Key,
    Schema,
    convolution,
    kept_in_float32,
    projection,
)
from mamba.mamba1 import MambaConfig

__all__ = ["FALCON_MAMBA", "MAMBA", "mamba1_mixer"]


def mamba1_mixer(config):
    """The tensors of MambaBlock -> list of TensorSpecs."""
    c = config
    d, di, r, n = c.d_model, c.d_inner, c.rank, c.d_state
    return [
        *projection("in_proj", 2 * di, d, c.bias),
        *convolution(di, c),
        *projection("x_proj", r + 2 * n, di),
        *projection("dt_proj", di, r),
        *kept_in_float32(**{"dt_proj.bias": (di,), "A_log": (di, n), "D": (di,)}),
        *projection("out_proj", d, di, c.bias),
    ]


MAMBA = Schema(
    name="Mamba-1",
    config=MambaConfig,
    model_type="mamba",
    layer="Mamba1",
    keys=COMMON_KEYS
    | {"dt_rank": Key("positive integer or 'auto'", "ssm_cfg.dt_rank", "time_step_rank")},
    absent={TRANSFORMERS: {"pad_vocab_size_multiple": 1}},
    supported=COMMON_SUPPORTED,
    ignored=COMMON_IGNORED | {"ssm_cfg.use_fast_path"},
    implied={},
    mixer=mamba1_mixer,
)

FALCON_MAMBA = MAMBA._replace(
    name="Falcon-Mamba",
    model_type="falcon_mamba",
    layer=None,
    keys=MAMBA.keys | {"select_norm_eps": Key("positive number", None, "mixer_rms_eps")},
    absent={TRANSFORMERS: {"pad_vocab_size_multiple": 1, "select_norm_eps": 1e-6}},
)
