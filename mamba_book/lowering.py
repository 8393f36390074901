"""Programs for machines that are not here: what JAX would send to them."""

from contextlib import nullcontext

import jax

__all__ = ["lowered_for"]


def lowered_for(platform, fn, *args):
    """The text (StableHLO) of ``fn(*args)``, compiled for a platform: "cuda", "tpu" or "cpu".

    The arguments may be arrays or ``jax.ShapeDtypeStruct``. Nothing runs, so no such machine is
    needed; but JAX 0.12 asks which GPU it is, and takes the answer from an abstract mesh.
    """
    place = nullcontext()
    if platform == "cuda" and hasattr(jax.sharding, "AbstractDevice"):
        gpu = jax.sharding.AbstractDevice("NVIDIA H100", num_cores=132, platform="gpu")
        explicit = (jax.sharding.AxisType.Explicit,)
        mesh = jax.sharding.AbstractMesh((1,), ("gpu",), explicit, abstract_device=gpu)
        place = jax.sharding.use_abstract_mesh(mesh)
    with place:
        return jax.jit(fn).trace(*args).lower(lowering_platforms=(platform,)).as_text()
