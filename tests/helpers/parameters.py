"""Parameters for tests, drawn without compiling a program for it."""

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from mamba_book.reference_models import random_params  # noqa: F401  # which tests import from here

# The parameters, with dt_proj's bias, that stay in float32 whatever the dtype of the matrices.
FLOAT32 = {"A_log", "B_bias", "C_bias", "D", "dt_bias", "mimo_o", "mimo_x", "mimo_z", "scale"}


def in_bfloat16(params):
    """The matrices and convolutions in bfloat16, as ``from_pretrained`` leaves them."""

    def convert(path, p):
        module, name = path[-2].key, path[-1].key
        keep = name in FLOAT32 or (module, name) == ("dt_proj", "bias")
        return p if keep else p.astype(jnp.bfloat16)

    return jax.tree_util.tree_map_with_path(convert, params)


def assert_uniform(values, low, high):
    """The numbers are drawn uniformly between low and high."""
    values, width = np.asarray(values, np.float64).ravel(), high - low
    edge = 20 * width / values.size  # probability e^-20 that nothing falls so near an end
    assert low <= values.min() < low + edge and high - edge < values.max() <= high
    assert stats.kstest(values, stats.uniform(low, width).cdf).pvalue > 1e-3
