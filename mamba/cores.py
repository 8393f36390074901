"""Every core of a CPU: XLA runs a scan's loop on one core of a device, so each core is made one.

``use_every_core`` does so, before JAX starts. From then on, what is split among JAX's devices uses
all cores: the rows of a training step (``mamba.train``), or a scan's channels (``over_channels``).
"""

import functools
import inspect
import os

import jax
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

__all__ = ["over_channels", "use_every_core"]

# Which axis of each argument has the channels, or the heads. Arguments that are not listed have
# none; every result has them where x or the state has.
CHANNELS = {
    "selective_scan": {"x": 2, "delta": 2, "z": 2, "A": 0, "D": 0, "h0": 1},
    "ssd": {"x": 2, "delta": 2, "A": 0, "B": 2, "C": 2, "D": 0, "h0": 1},
    "trapezoidal_scan": dict.fromkeys("x delta A lam B C theta".split(), 2) | {"D": 0, "state": 1},
}
SETTINGS = ("method", "chunk", "pairs", "return_state")  # arguments that are no arrays


def use_every_core(n=None):
    """Make JAX see every core of this machine's CPU as a device, before its first computation.

        import mamba
        mamba.use_every_core()

    A setting of yours is left as it is: XLA's flag ``--xla_force_host_platform_device_count``, or
    JAX's ``jax_num_cpu_devices``. Other devices, GPUs or TPUs, are not concerned.

    Args:
        n: number of devices; None: one for each core that this process may use.

    Raises:
        RuntimeError: JAX has started already, with another number of devices.
    """
    if n is None:
        if jax.config.jax_num_cpu_devices > 0 or "device_count" in os.environ.get("XLA_FLAGS", ""):
            return
        counted = hasattr(os, "sched_getaffinity")  # not on every system
        n = len(os.sched_getaffinity(0)) if counted else os.cpu_count() or 1
    try:
        jax.config.update("jax_num_cpu_devices", n)
    except RuntimeError as error:
        there = len(jax.devices("cpu"))
        if there != n:
            raise RuntimeError(
                f"JAX has started already, with {there} CPU devices instead of {n}: call "
                "use_every_core() before the first computation"
            ) from error


def over_channels(scan):
    """A scan whose channels, or heads, are shared out among all of JAX's devices.

        y = jax.jit(over_channels(selective_scan))(x, delta, A, B, C, D)

    The channels do not depend on each other, so the devices exchange nothing; in the backward pass
    they add up the gradients of what all channels share. Arrays that lie on one device are first
    copied to all of them, each its part.

    Args:
        scan: ``selective_scan``, ``ssd`` or ``trapezoidal_scan``.

    Returns:
        A function with the same arguments and results as ``scan``. It raises ValueError where the
        devices cannot share the channels (of ``ssd``, also the groups of B and C) equally.
    """
    axes, signature = CHANNELS[scan.__name__], inspect.signature(scan)

    @functools.wraps(scan)
    def shared(*args, **kwargs):
        given = signature.bind(*args, **kwargs).arguments
        settings = {name: given.pop(name) for name in SETTINGS if name in given}
        arrays = {name: value for name, value in given.items() if value is not None}
        mesh = Mesh(np.array(jax.devices()), ("channels",))

        def spec(name):
            shape = getattr(arrays[name], "shape", None)
            one_group = scan.__name__ == "ssd" and name in ("B", "C") and shape[2:3] == (1,)
            if name not in axes or one_group:
                return P()
            if shape and len(shape) > axes[name] and shape[axes[name]] % mesh.size:
                raise ValueError(
                    f"{mesh.size} devices cannot share the {shape[axes[name]]} channels of {name} "
                    "equally"
                )
            return P(*[None] * axes[name], "channels")

        y, state = P(None, None, "channels"), P(None, "channels")
        on_each = jax.shard_map(
            lambda arrays: scan(**arrays, **settings),
            mesh=mesh,
            in_specs=({name: spec(name) for name in arrays},),
            out_specs=(y, state) if settings.get("return_state") else y,
        )
        return on_each(arrays)

    return shared
