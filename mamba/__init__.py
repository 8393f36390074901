"""Mamba, the selective state space model, in JAX: the module that the book is about."""

from mamba.model import LayerState, Mamba, MambaBlock, MambaConfig, ResidualBlock, RMSNorm
from mamba.scan import selective_scan

__version__ = "0.1.0"

__all__ = [
    "LayerState",
    "Mamba",
    "MambaBlock",
    "MambaConfig",
    "RMSNorm",
    "ResidualBlock",
    "selective_scan",
]
