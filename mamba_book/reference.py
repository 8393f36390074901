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


def ssd_loop(x, delta, A, B, C, D, h0, resets=None):
    """Mamba-2's recurrence in float64, token by token -> y (b, l, h, p), h (b, h, p, n)."""
    l, k = x.shape[1], x.shape[2] // B.shape[2]
    B, C = np.repeat(B, k, axis=2), np.repeat(C, k, axis=2)  # (b, l, h, n)
    h, y = np.array(h0, np.float64), np.empty(x.shape)
    for t in range(l):
        if resets is not None:
            h = np.where(resets[:, t, None, None, None], 0.0, h)
        a = np.exp(delta[:, t] * A)[..., None, None]  # (b, h, 1, 1)
        h = a * h + (delta[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None]
        y[:, t] = np.einsum("bhpn,bhn->bhp", h, C[:, t]) + D[:, None] * x[:, t]
    return y, h


def ssd_gradients(dy, dh, x, delta, A, B, C, D, h0, resets=None):
    """Gradients of Σ dy y + Σ dh h by the adjoint recurrence, in float64 -> dict by argument."""
    (b, l, heads, _), g = x.shape, B.shape[2]
    k = heads // g
    Bs, Cs = np.repeat(B, k, axis=2), np.repeat(C, k, axis=2)  # (b, l, h, n)
    before, h = [], np.array(h0, np.float64)
    for t in range(l):
        if resets is not None:
            h = np.where(resets[:, t, None, None, None], 0.0, h)
        before.append(h)
        a = np.exp(delta[:, t] * A)[..., None, None]
        h = a * h + (delta[:, t, :, None] * x[:, t])[..., None] * Bs[:, t, :, None]
    grads = {"x": D[:, None] * dy, "delta": np.zeros(delta.shape), "A": np.zeros(A.shape)}
    dB, dC = np.zeros(Bs.shape), np.zeros(Cs.shape)
    gradient = np.array(dh, np.float64)  # of the state after t
    for t in reversed(range(l)):
        a = np.exp(delta[:, t] * A)[..., None, None]
        after = a * before[t] + (delta[:, t, :, None] * x[:, t])[..., None] * Bs[:, t, :, None]
        dC[:, t] = np.einsum("bhpn,bhp->bhn", after, dy[:, t])
        gradient = gradient + dy[:, t, ..., None] * Cs[:, t, :, None]
        du = np.einsum("bhpn,bhn->bhp", gradient, Bs[:, t])
        dB[:, t] = np.einsum("bhpn,bhp->bhn", gradient, delta[:, t, :, None] * x[:, t])
        exponent = (gradient * a * before[t]).sum((2, 3))  # (b, h)
        grads["x"][:, t] += delta[:, t, :, None] * du
        grads["delta"][:, t] = (du * x[:, t]).sum(-1) + exponent * A
        grads["A"] += (exponent * delta[:, t]).sum(0)
        gradient = a * gradient
        if resets is not None:
            gradient = np.where(resets[:, t, None, None, None], 0.0, gradient)
    n = B.shape[-1]
    grads |= {"B": dB.reshape(b, l, g, k, n).sum(3), "C": dC.reshape(b, l, g, k, n).sum(3)}
    return grads | {"D": (dy * x).sum((0, 1, 3)), "h0": gradient}
