"""One batch on several devices, also of several processes: who holds what, and the gradient."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mamba.collectives import vary_alike
from mamba.parallel import cut_axes, make_mesh, over_mesh

__all__ = ["any_process", "collect", "gradient_over_devices", "row_mesh", "spread"]


def row_mesh(rows):
    """As many of JAX's devices as can share ``rows`` equally -> a mesh with its axis "data".

    Where there are several processes, each must have a part: all devices.
    """
    n = jax.device_count()
    if jax.process_count() == 1:
        n = max(n for n in range(1, n + 1) if rows % n == 0)
    return make_mesh(data=n)


def spread(tree, mesh, *axes):
    """Lay arrays, which every process has whole, out on a mesh, cut along its named axes."""
    sharding = NamedSharding(mesh, P(*axes))
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)

    def put(v):
        v = np.asarray(v)
        return jax.make_array_from_callback(v.shape, sharding, lambda part: v[part])

    return jax.tree.map(put, tree)


def collect(tree, mesh):
    """The arrays of a mesh, whole in every process -> the same tree, in NumPy."""
    if jax.process_count() > 1:
        tree = jax.jit(lambda tree: tree, out_shardings=NamedSharding(mesh, P()))(tree)
    return jax.device_get(tree)


def any_process(happened):
    """Whether something has happened in any process; all of them must ask."""
    if jax.process_count() == 1:
        return happened
    return bool(multihost_utils.process_allgather(np.array(happened)).any())


def gradient_over_devices(loss, mesh, *, accumulate=1):
    """The gradient of a loss that is a sum: each device differentiates its own part of the batch.

    Left to itself, the compiler would gather all rows on every device for the backward pass of the
    scan, which goes through the rows one by one.

    Args:
        loss: (params, carried, batch) -> (loss, (sums (3,), carried)), where ``sums`` are added up
            over the devices, as the gradient is, and what is carried stays with its rows.
        mesh: from ``make_mesh``: rows are cut along "data", and texts along "sequence".
        accumulate: number of parts into which each device's rows are divided. They are
            differentiated one after the other, so that memory holds one part.

    Returns:
        a function (params, carried, batch) -> (gradient, sums, carried)
    """

    def on_one_device(params, carried, batch):
        params, carried, batch = vary_alike(params, carried, batch)  # or JAX adds up layer by layer
        differentiate = jax.grad(loss, has_aux=True)
        if accumulate == 1:
            gradient, (sums, carried) = differentiate(params, carried, batch)
        else:

            def add(total, part):
                gradient, (sums, carried) = differentiate(params, *part)
                return jax.tree.map(jnp.add, total, (gradient, sums)), carried

            parts = jax.tree.map(
                lambda v: v.reshape(accumulate, -1, *v.shape[1:]), (carried, batch)
            )
            zeros = jax.tree.map(jnp.zeros_like, params), jnp.zeros(3)
            zeros, _ = vary_alike(zeros, batch)
            (gradient, sums), carried = jax.lax.scan(add, zeros, parts)
            carried = jax.tree.map(lambda v: v.reshape(-1, *v.shape[2:]), carried)
        total = jax.lax.psum((gradient, sums), cut_axes(mesh))
        return *total, jax.tree.map(lambda v: v[None], carried)  # (1, b, …)

    cut, rows, each = P("data", "sequence"), P("data"), P("sequence", "data")
    run = over_mesh(on_one_device, mesh, (P(), rows, cut), (P(), P(), each))

    def gradient_of(params, carried, batch):
        gradient, sums, carried = run(params, carried, batch)
        return gradient, sums, jax.tree.map(lambda v: v[-1], carried)  # after the last stretch

    return gradient_of
