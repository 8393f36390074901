"""The selective scan and its gradients in float64 NumPy: what every method is compared with.

The tests use it, and so does the page of the book that shows the whole chain of agreement.
"""

import jax
import numpy as np


def selective_scan_loop(x, delta, A, B, C, D, z=None, h0=None, resets=None):
    """-> y: (b, l, d), h: (b, d, n), straight from the equations, token by token."""
    x, delta, A, B, C, D = (np.asarray(v, np.float64) for v in (x, delta, A, B, C, D))
    b, l, d = x.shape
    n = A.shape[1]
    h = np.zeros((b, d, n)) if h0 is None else np.array(h0, np.float64)
    y = np.zeros((b, l, d))
    for i in range(b):
        for t in range(l):
            if resets is not None and resets[i, t]:
                h[i] = 0
            decay = np.exp(delta[i, t, :, None] * A)  # (d, n)
            h[i] = decay * h[i] + (delta[i, t] * x[i, t])[:, None] * B[i, t]  # (d, n)
            y[i, t] = h[i] @ C[i, t] + D * x[i, t]
    if z is not None:
        z = np.asarray(z, np.float64)
        y = y * z / (1 + np.exp(-z))
    return y, h


def selective_scan_gradients(dy, dh, x, delta, A, B, C, D, z=None, h0=None, resets=None):
    """Gradients of Σ dy ⊙ y + Σ dh ⊙ h by the chain rule, time step by time step. -> dict

    All states are kept: nothing is recomputed and nothing is cut into chunks.
    """
    b, l, d = x.shape
    n = A.shape[1]
    h0 = np.zeros((b, d, n)) if h0 is None else h0
    keep = np.ones((b, l)) if resets is None else 1.0 - resets
    before, states, h = np.zeros((l, b, d, n)), np.zeros((l, b, d, n)), h0
    for t in range(l):
        before[t] = keep[:, t, None, None] * h
        decay = np.exp(delta[:, t, :, None] * A)  # (b, d, n)
        h = decay * before[t] + (delta * x)[:, t, :, None] * B[:, t, None]  # (b, d, n)
        states[t] = h
    dz = None
    if z is not None:
        sigmoid = 1 / (1 + np.exp(-z))
        ungated = np.einsum("lbdn,bln->bld", states, C) + D * x  # (b, l, d)
        dz = dy * ungated * sigmoid * (1 + z * (1 - sigmoid))
        dy = dy * z * sigmoid
    grads = {"x": dy * D, "delta": np.zeros_like(x), "A": np.zeros_like(A)}
    grads |= {"B": np.zeros_like(B), "C": np.einsum("lbdn,bld->bln", states, dy)}
    grads |= {"D": (dy * x).sum((0, 1)), "z": dz}
    g = dh
    for t in reversed(range(l)):
        g = g + dy[:, t, :, None] * C[:, t, None]  # (b, d, n)
        decay = np.exp(delta[:, t, :, None] * A)
        dexponent = g * decay * before[t]  # gradient of Δ_t A
        du = (g * B[:, t, None]).sum(2)  # (b, d): gradient of Δ_t x_t
        grads["A"] += (dexponent * delta[:, t, :, None]).sum(0)
        grads["delta"][:, t] = (dexponent * A).sum(2) + du * x[:, t]
        grads["x"][:, t] += du * delta[:, t]
        grads["B"][:, t] = np.einsum("bdn,bd->bn", g, (delta * x)[:, t])
        g = g * decay * keep[:, t, None, None]
    return grads | {"h0": g}


def relative_error(actual, expected):
    """max |actual − expected| / max |expected|, in float64: the largest over all arrays.

    Args:
        actual: an array, or a tree of arrays.
        expected: what it should be. Where it is 0 everywhere, only 0 has no error.

    Returns:
        The error, NaN if a difference is NaN.

    Raises:
        ValueError: the two have another number of arrays, or arrays of other shapes.
    """
    actual, expected = (
        [np.asarray(v, np.float64) for v in jax.tree.leaves(tree)] for tree in (actual, expected)
    )
    shapes = [[v.shape for v in arrays] for arrays in (actual, expected)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"shapes {shapes[0]}, not {shapes[1]}")
    pairs = zip(actual, expected, strict=True)
    # np.max, since Python's max may drop a NaN.
    return np.max([np.abs(a - e).max() / max(np.abs(e).max(), 1e-30) for a, e in pairs])
