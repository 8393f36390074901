"""Recorded calls of the released Mamba-3 kernels, and ways to get them wrong on purpose.

The records are not part of this repository. They are public, MIT-licensed: https://github.com/
AdityaP9116/ARMHackathon at commit 1830440, in tests/golden/mamba3 and tests/golden/mamba3_mimo. A
folder of them has siso/case_*.npz and mimo/case_*.npz.
"""

from typing import NamedTuple

import numpy as np

__all__ = ["PUBLIC", "WRONG", "RecordedCall", "read_call", "root_mean_square_error"]

PUBLIC = "https://github.com/AdityaP9116/ARMHackathon, tests/golden/mamba3 and mamba3_mimo"


class RecordedCall(NamedTuple):
    """One call of a kernel, as arguments of ``mamba.trapezoid.trapezoidal_scan``."""

    inputs: dict  # its arrays
    pairs: str  # its pairing
    biases: tuple  # of B and of C, (h, r, n) each; they are in the inputs' B and C
    out: np.ndarray  # (b, l, h, p) what the kernel returned, in bfloat16's values
    z: np.ndarray  # (b, l, h, r, p) the gates
    mix: np.ndarray | None  # (h, r, p) weights of the r outputs; None for SISO

    def output(self, y):
        """What the kernel returns for the scan's y: gated, and for MIMO summed."""
        y = y * self.z / (1 + np.exp(-self.z))  # (b, l, h, r, p)
        return y[:, :, :, 0] if self.mix is None else (y * self.mix).sum(3)


def read_call(path):
    """Read a recorded call -> RecordedCall."""
    kw = {k.removeprefix("kw_"): np.float64(v) for k, v in np.load(path).items()}
    mimo = "MIMO_V" in kw
    B, C = (v if mimo else v[:, :, None] for v in (kw["K"], kw["Q"]))  # (b, l, r, g, n)
    h, r = kw["V"].shape[2], B.shape[2]
    heads = lambda v: np.repeat(v, h // v.shape[3], axis=3).swapaxes(2, 3)  # noqa: E731
    biases = tuple(kw[f"{name}_bias"].reshape(h, r, -1) for name in "KQ")
    delta, log_a = (kw[k].swapaxes(1, 2) for k in ("DT", "ADT"))  # (b, l, h)
    x, z = kw["V"][:, :, :, None], kw["Z"][:, :, :, None]  # (b, l, h, 1, p)
    if mimo:
        x, z = x * kw["MIMO_V"], z * kw["MIMO_Z"]
    inputs = {
        "x": x,
        "delta": delta,
        "A": log_a / delta,
        "lam": 1 / (1 + np.exp(-kw["Trap"].swapaxes(1, 2))),
        "B": heads(B) + biases[0],
        "C": heads(C) + biases[1],
        "theta": delta[..., None] * np.pi * np.tanh(kw["Angles"]),
        "D": kw["D"],
    }
    pairs = "halves" if mimo else "interleaved"
    return RecordedCall(inputs, pairs, biases, kw["out"], z, kw["MIMO_Out"] if mimo else None)


def root_mean_square_error(actual, expected):
    """Root mean square of the difference, relative to that of ``expected``."""
    return float(np.sqrt(np.mean((actual - expected) ** 2) / np.mean(expected**2)))


# --- the same call, wrong in one respect ----------------------------------------------------------


def other_pairing(call):
    """MIMO's pairs for SISO, and the reverse."""
    other = {"halves": "interleaved", "interleaved": "halves"}
    return call._replace(pairs=other[call.pairs])


def without_alpha(call):
    """β = (1 − λ) Δ, without the factor α. Other Δ, A and λ have that β, and the same α and γ."""
    delta, A, lam = (call.inputs[k] for k in ("delta", "A", "lam"))
    now, before = lam * delta, (1 - lam) * delta * np.exp(-delta * A)
    total = now + before
    return _with(call, delta=total, A=delta * A / total, lam=now / total)


def bias_after_rotation(call):
    """B and C turned first, then biased: as if the biases were turned back before."""
    angle = np.cumsum(call.inputs["theta"], 1)[:, :, :, None]  # (b, l, h, 1, s)
    s, half = angle.shape[-1], call.biases[0].shape[-1] // 2
    at = np.arange(s)
    first, second = (at, at + half) if call.pairs == "halves" else (2 * at, 2 * at + 1)
    changed = {}
    for name, bias in zip("BC", call.biases, strict=True):
        back = np.broadcast_to(bias, call.inputs[name].shape).copy()
        a, b = bias[..., first], bias[..., second]
        back[..., first] = a * np.cos(angle) + b * np.sin(angle)
        back[..., second] = b * np.cos(angle) - a * np.sin(angle)
        changed[name] = call.inputs[name] - bias + back
    return _with(call, **changed)


def one_point(call):
    """λ = 1: Mamba's rule, which does not look at the token before."""
    return _with(call, lam=np.ones_like(call.inputs["lam"]))


def _with(call, **inputs):
    return call._replace(inputs=call.inputs | inputs)


WRONG = {
    "the other pairing": other_pairing,
    "β without α": without_alpha,
    "bias after rotation": bias_after_rotation,
    "one point (λ = 1)": one_point,
}
