"""Inputs of the kernels, and what they should give, by loops in float64."""

import numpy as np

from mamba.kernels import CHUNK
from mamba_book.reference import selective_scan_gradients, selective_scan_loop


def random_inputs(b, l, d, n, gate=True, reset=False, seed=0):
    """In float64; with reset, every row has about l / 5 resets, one of them at a chunk's end."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.normal(size=shape)  # noqa: E731
    resets = None
    if reset:
        resets = rng.random((b, l)) < 0.2
        resets[:, min(CHUNK, l - 1)] = True
    return {
        "x": normal(b, l, d),
        "delta": np.exp(rng.uniform(np.log(1e-3), np.log(1.0), (b, l, d))),
        "A": -rng.uniform(0.1, 16, (n, d)),
        "B": normal(b, l, n),
        "C": normal(b, l, n),
        "D": normal(d),
        "z": normal(b, l, d) if gate else None,
        "h0": normal(b, n, d),
        "resets": resets,
    }


def as_float32(inputs):
    return {k: v if v is None or v.dtype == bool else np.float32(v) for k, v in inputs.items()}


def in_float64(inputs, dy, dh):
    """-> (y, h), and the gradients of Σ y dy + Σ h dh; A: (n, d), h: (b, n, d), as the kernel's."""
    turned = inputs | {"A": inputs["A"].T, "h0": inputs["h0"].swapaxes(1, 2)}
    y, h = selective_scan_loop(**turned)
    grads = selective_scan_gradients(dy, dh.swapaxes(1, 2), **turned)
    grads |= {"A": grads["A"].T, "h0": grads["h0"].swapaxes(1, 2)}
    return (y, h.swapaxes(1, 2)), {k: v for k, v in grads.items() if inputs[k] is not None}
