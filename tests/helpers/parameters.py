"""Parameters for tests, drawn without compiling a program for it."""

import math

import jax
import jax.numpy as jnp
import numpy as np


def random_params(model, seed=0):
    """Parameters that are all random, as if trained: norms, D, biases and constants too."""
    tree = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    rng = np.random.default_rng(seed)

    def draw(path, p):
        module, name = path[-2].key, path[-1].key
        values = rng.normal(size=p.shape)
        if name == "A_log":
            values = rng.uniform(-1, 3, p.shape)
        elif (module, name) == ("dt_proj", "bias") or name == "dt_bias":
            values = rng.uniform(-6, 0, p.shape)  # Δ between 0.0025 and 0.7
        elif name in ("scale", "D", "bias"):
            values = (name != "bias") + 0.3 * values
        elif name == "kernel":
            values = values / math.sqrt(p.shape[0])
        return jnp.asarray(values, p.dtype)

    return jax.tree_util.tree_map_with_path(draw, tree)
