"""The selective scan as a float64 NumPy loop: what every method is held against."""

import numpy as np


def selective_scan_loop(x, delta, A, B, C, D, z=None, h0=None):
    """-> y: (b, l, d), h: (b, d, n), straight from the equations, channel by channel."""
    x, delta, A, B, C, D = (np.asarray(v, np.float64) for v in (x, delta, A, B, C, D))
    b, l, d = x.shape
    n = A.shape[1]
    h = np.zeros((b, d, n)) if h0 is None else np.array(h0, np.float64)
    y = np.zeros((b, l, d))
    for i in range(b):
        for t in range(l):
            for c in range(d):
                decay = np.exp(delta[i, t, c] * A[c])  # (n,)
                h[i, c] = decay * h[i, c] + delta[i, t, c] * B[i, t] * x[i, t, c]  # (n,)
                y[i, t, c] = h[i, c] @ C[i, t] + D[c] * x[i, t, c]
    if z is not None:
        z = np.asarray(z, np.float64)
        y = y * z / (1 + np.exp(-z))
    return y, h


def relative_error(actual, expected):
    """max |actual − expected| / max |expected|, in float64."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    return np.abs(actual - expected).max() / max(np.abs(expected).max(), 1e-30)
