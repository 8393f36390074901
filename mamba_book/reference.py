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


def _turn(v, angle, pairs):
    """v (b, h, r, n), its first s pairs turned by angle (b, h, s), and the places of the pairs."""
    s, n = angle.shape[-1], v.shape[-1]
    first = 2 * np.arange(s) if pairs == "interleaved" else np.arange(s)
    second = first + (1 if pairs == "interleaved" else n // 2)
    cos, sin = np.cos(angle)[:, :, None], np.sin(angle)[:, :, None]  # (b, h, 1, s)
    out = np.array(v)
    out[..., first] = cos * v[..., first] - sin * v[..., second]
    out[..., second] = sin * v[..., first] + cos * v[..., second]
    return out, (first, second)


def _write(x, B):
    """Σ_r x_r ⊗ B_r: (b, h, r, p), (b, h, r, n) -> (b, h, p, n)."""
    return np.einsum("bhrp,bhrn->bhpn", x, B)


def trapezoid_loop(
    x, delta, A, lam, B, C, theta, D, state, pairs="interleaved", resets=None, kept=None
):
    """Mamba-3's recurrence in float64, token by token.

    Args: as ``mamba.trapezoid.trapezoidal_scan`` has them; state: angle, h, B, x. Where Δ = 0,
        there is no token. kept: a list that receives the state before each token, the token's
        angle, B̃ and C̃.

    Returns:
        y (b, l, h, r, p), and the state after the last token.
    """
    angle, h, last_B, last_x = (np.array(v, np.float64) for v in state)
    y = np.zeros(x.shape)
    for t in range(x.shape[1]):
        if resets is not None:
            new = resets[:, t, None, None]  # (b, 1, 1)
            angle = np.where(new, 0.0, angle)
            h, last_B, last_x = (np.where(new[..., None], 0.0, v) for v in (h, last_B, last_x))
        before = angle, h, last_B, last_x
        real = delta[:, t, :, None, None] != 0  # (b, h, 1, 1)
        angle = np.where(real[..., 0], angle + theta[:, t], angle)
        B_t, C_t = (_turn(v[:, t], angle, pairs)[0] for v in (B, C))
        if kept is not None:
            kept.append((*before, angle, B_t, C_t))
        step, share = delta[:, t, :, None, None], lam[:, t, :, None, None]
        alpha = np.exp(step * A[:, t, :, None, None])
        beta, gamma = (1 - share) * step * alpha, share * step
        h_t = alpha * h + beta * _write(last_x, last_B) + gamma * _write(x[:, t], B_t)
        h = np.where(real, h_t, h)
        y_t = np.einsum("bhpn,bhrn->bhrp", h, C_t) + D[:, None, None] * x[:, t]
        y[:, t] = np.where(real, y_t, 0.0)
        last_B, last_x = np.where(real, B_t, last_B), np.where(real, x[:, t], last_x)
    return y, (angle, h, last_B, last_x)


def trapezoid_gradients(
    dy, dstate, x, delta, A, lam, B, C, theta, D, state, pairs="interleaved", resets=None
):
    """Gradients of Σ dy y + Σ dstate state by the adjoint recurrence, in float64.

    -> dict by argument; "state": four arrays. Padding (Δ = 0) has no gradient.
    """
    kept = []
    trapezoid_loop(x, delta, A, lam, B, C, theta, D, state, pairs, resets, kept)
    inputs = {"x": x, "delta": delta, "A": A, "lam": lam, "B": B, "C": C, "theta": theta, "D": D}
    grads = {name: np.zeros(v.shape) for name, v in inputs.items()}
    dangle, dh, dB_last, dx_last = (np.array(v, np.float64) for v in dstate)
    for t in reversed(range(x.shape[1])):
        _, h, last_B, last_x, angle, B_t, C_t = kept[t]
        real = delta[:, t, :, None, None] != 0  # (b, h, 1, 1)
        step, share, rate = (v[:, t, :, None, None] for v in (delta, lam, A))
        alpha = np.exp(step * rate)
        beta, gamma = (1 - share) * step * alpha, share * step
        earlier, own = _write(last_x, last_B), _write(x[:, t], B_t)
        h_t = np.where(real, alpha * h + beta * earlier + gamma * own, h)

        dy_t = np.where(real, dy[:, t], 0.0)
        grads["D"] += (dy_t * x[:, t]).sum((0, 2, 3))
        dC = np.einsum("bhpn,bhrp->bhrn", h_t, dy_t)
        dh = dh + _write(dy_t, C_t)
        g = np.where(real, dh, 0.0)  # of h_t, where there is a token
        dalpha, dbeta, dgamma = ((g * v).sum((2, 3)) for v in (h, earlier, own))  # (b, h)
        # α = e^{ΔA}, β = (1 − λ) Δ α, γ = λ Δ
        s, k, r, a = step[..., 0, 0], share[..., 0, 0], rate[..., 0, 0], alpha[..., 0, 0]
        dalpha = dalpha + dbeta * (1 - k) * s
        grads["A"][:, t] = dalpha * a * s
        grads["lam"][:, t] = s * (dgamma - dbeta * a)
        grads["delta"][:, t] = dalpha * a * r + dbeta * (1 - k) * a + dgamma * k

        at_x, at_B = np.einsum("bhpn,bhrn->bhrp", g, B_t), np.einsum("bhpn,bhrp->bhrn", g, x[:, t])
        grads["x"][:, t] = D[:, None, None] * dy_t + gamma * at_x + np.where(real, dx_last, 0.0)
        dB = gamma * at_B + np.where(real, dB_last, 0.0)
        # d/dθ of a turned pair (a, b) is (−b, a); back to B and C by the opposite turn.
        for name, turned, d in (("B", B_t, dB), ("C", C_t, dC)):
            grads[name][:, t], (i, j) = _turn(d, -angle, pairs)
            dangle += (d[..., j] * turned[..., i] - d[..., i] * turned[..., j]).sum(2)
        grads["theta"][:, t] = np.where(real[..., 0], dangle, 0.0)

        dB_last = np.where(real, 0.0, dB_last) + beta * np.einsum("bhpn,bhrp->bhrn", g, last_x)
        dx_last = np.where(real, 0.0, dx_last) + beta * np.einsum("bhpn,bhrn->bhrp", g, last_B)
        dh = np.where(real, alpha * dh, dh)
        if resets is not None:
            new = resets[:, t, None, None]
            dangle = np.where(new, 0.0, dangle)
            dh, dB_last, dx_last = (
                np.where(new[..., None], 0.0, v) for v in (dh, dB_last, dx_last)
            )
    return grads | {"state": (dangle, dh, dB_last, dx_last)}
