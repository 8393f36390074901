"""Parameters for tests, drawn without compiling a program for it."""

import numpy as np
from scipy import stats

from mamba_book.reference_models import (  # noqa: F401  # for tests
    FLOAT32,
    in_bfloat16,
    random_params,
)


def assert_uniform(values, low, high):
    """The numbers are drawn uniformly between low and high."""
    values, width = np.asarray(values, np.float64).ravel(), high - low
    edge = 20 * width / values.size  # probability e^-20 that nothing falls so near an end
    assert low <= values.min() < low + edge and high - edge < values.max() <= high
    assert stats.kstest(values, stats.uniform(low, width).cdf).pvalue > 1e-3
