"""The block in which some of Δ, B and C do not depend on the input: the paper's Table 7."""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from mamba.layers import dt_bias_init, linear
from mamba.mamba1 import MambaBlock, MambaConfig

__all__ = ["SELECTIVE", "AblatedBlock", "AblatedConfig"]

SELECTIVE = ("delta", "B", "C")  # what Mamba computes from its input


@dataclasses.dataclass(frozen=True)
class AblatedConfig(MambaConfig):
    """A MambaConfig that says which of Δ ("delta"), B and C depend on the input.

    With all three, the model is Mamba. With none of them, (), each layer's SSM is time-invariant:
    S4D with real A.
    Raises ValueError for other names, and as MambaConfig does.
    """

    selective: tuple[str, ...] = dataclasses.field(kw_only=True)  # the others are constants

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.selective, str) or not set(self.selective) <= set(SELECTIVE):
            raise ValueError(
                f"selective must be a tuple of names of {SELECTIVE}, got {self.selective!r}"
            )
        # Configurations of the same model compare equal, in whatever order the names are given.
        in_order = tuple(name for name in SELECTIVE if name in self.selective)
        object.__setattr__(self, "selective", in_order)

    def block(self, name, axis=None):
        """The block of these sizes."""
        return AblatedBlock(self, axis, name=name)


class AblatedBlock(MambaBlock):
    """``MambaBlock`` with a learned constant for each of Δ, B, C that is not selective.

    The constant Δ is softplus(dt_bias), one time step per channel, initialized as in MambaBlock.
    The constant B and C are vectors (n,), shared by all channels as the selective ones are. B
    starts at one and C standard normal, as in S4D (Gu et al., 2022).
    """

    config: AblatedConfig  # the sizes, and what is selective

    def select(self, x):
        """Δ, B and C of each token -> Δ (b, l, d_inner), B and C (b, l, n)."""
        c = self.config
        dt, B, C = self._project(x)
        if B is None:
            B = self._constant("B", nn.initializers.ones, c.d_state, x)  # (b, l, n)
        if C is None:
            C = self._constant("C", nn.initializers.normal(1.0), c.d_state, x)  # (b, l, n)
        bias_init = dt_bias_init(c.dt_min, c.dt_max, c.dt_init_floor)
        if dt is None:
            dt = self._constant("dt_bias", bias_init, c.d_inner, x)  # (b, l, d_inner)
        else:
            dt_proj = linear(c.d_inner, name="dt_proj", bias_init=bias_init, dtype=jnp.float32)
            dt = dt_proj(dt)  # (b, l, d_inner)
        return nn.softplus(dt), B, C

    def _project(self, x):
        """x_proj, for what is selective -> dt (b, l, R), B and C (b, l, n); None for the others."""
        c = self.config
        if not c.selective:
            return None, None, None
        width_of = {"delta": c.rank, "B": c.d_state, "C": c.d_state}
        widths = [width_of[name] for name in c.selective]
        x_proj = linear(sum(widths), name="x_proj", use_bias=False, dtype=c.dtype)
        parts = jnp.split(x_proj(x), np.cumsum(widths)[:-1], axis=-1)
        selected = dict(zip(c.selective, parts, strict=True))
        return tuple(selected.get(name) for name in SELECTIVE)

    def _constant(self, name, init, width, x):
        """A parameter (width,), the same for every token of x -> (b, l, width)."""
        return jnp.broadcast_to(self.param(name, init, (width,)), (*x.shape[:2], width))
