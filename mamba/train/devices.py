"""One batch on several devices: each device takes an equal part of the rows."""

import jax
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from mamba.collectives import vary_alike

__all__ = ["gradient_over_devices", "row_mesh"]


def row_mesh(rows):
    """As many of JAX's devices as can share ``rows`` equally -> a mesh with one axis, "rows"."""
    devices = jax.devices()
    n = max(n for n in range(1, len(devices) + 1) if rows % n == 0)
    return Mesh(np.array(devices[:n]), ("rows",))


def gradient_over_devices(loss, mesh):
    """The gradient of a loss that is a sum over rows: each device differentiates its own rows.

    Left to itself, the compiler would gather all rows on every device for the backward pass of the
    scan, which goes through the rows one by one.

    loss: (params, carried, batch) -> (loss, (sums, carried)), where ``sums`` are added up over the
    devices, as the gradient is, and what is carried stays with its rows.
    -> a function (params, carried, batch) -> (gradient, sums, carried)
    """

    def on_one_device(params, carried, batch):
        params, _ = vary_alike(params, batch)  # or JAX would add up the gradient layer by layer
        gradient, (sums, carried) = jax.grad(loss, has_aux=True)(params, carried, batch)
        return *jax.lax.psum((gradient, sums), "rows"), carried

    return jax.shard_map(
        on_one_device,
        mesh=mesh,
        in_specs=(P(), P("rows"), P("rows")),
        out_specs=(P(), P(), P("rows")),
    )
