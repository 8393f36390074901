"""trapezoidal_scan gives the outputs of the released Mamba-3 kernels, recorded on a GPU.

Deselected by default: the recorded calls are not part of this repository. They are public,
MIT-licensed, in https://github.com/AdityaP9116/ARMHackathon at commit 1830440, in the folders
tests/golden/mamba3 and tests/golden/mamba3_mimo. `make kernel-records RECORDS=folder` reads
folder/siso/case_*.npz and folder/mimo/case_*.npz.
"""

import os
from pathlib import Path

import jax
import numpy as np
import pytest

from mamba.trapezoid import METHODS, trapezoidal_scan

pytestmark = pytest.mark.kernel_records

scan = jax.jit(trapezoidal_scan, static_argnames=("pairs", "method"))
PUBLIC = "https://github.com/AdityaP9116/ARMHackathon, tests/golden/mamba3 and mamba3_mimo"
FOLDER = os.environ.get("RECORDS")
PATHS = sorted(Path(FOLDER).glob("*/case_*.npz")) if FOLDER else []


def recorded_call(path):
    """A recorded call as arguments of trapezoidal_scan, and what turns y into its output."""
    kw = {k.removeprefix("kw_"): v for k, v in np.load(path).items()}
    mimo = "MIMO_V" in kw
    B, C = (v if mimo else v[:, :, None] for v in (kw["K"], kw["Q"]))  # (b, l, r, g, n)
    h, r = kw["V"].shape[2], B.shape[2]
    heads = lambda v: np.repeat(v, h // v.shape[3], axis=3).swapaxes(2, 3)  # noqa: E731
    bias = {k: v.reshape(h, r, -1) for k, v in kw.items() if k.endswith("_bias")}
    delta, log_a = (kw[k].swapaxes(1, 2) for k in ("DT", "ADT"))  # (b, l, h)
    x, z = kw["V"][:, :, :, None], kw["Z"][:, :, :, None]  # (b, l, h, 1, p)
    if mimo:
        x, z = x * kw["MIMO_V"], z * kw["MIMO_Z"]
    inputs = {
        "x": x,
        "delta": delta,
        "A": log_a / delta,
        "lam": 1 / (1 + np.exp(-kw["Trap"].swapaxes(1, 2))),
        "B": heads(B) + bias["K_bias"],
        "C": heads(C) + bias["Q_bias"],
        "theta": delta[..., None] * np.pi * np.tanh(kw["Angles"]),
        "D": kw["D"],
    }

    def output(y):
        y = y * z / (1 + np.exp(-z))
        return (y * kw["MIMO_Out"]).sum(3) if mimo else y[:, :, :, 0]

    return inputs, "halves" if mimo else "interleaved", output, kw["out"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("path", PATHS or [None], ids=lambda p: p and f"{p.parent.name}-{p.stem}")
def test_outputs_of_the_released_kernels(path, method):
    """Recorded on a GPU, in bfloat16.

    A number rounded to bfloat16 is off by 2^-9 at most: by 0.17 %, root mean square, if it is the
    output, as rounding ours shows. The kernels also round what is inside: B̃, C̃, the masked product
    and the state, of which B̃ and C̃ alone are worth up to 0.13 % in ours; in MIMO, each of r outputs
    and their sum. Six such errors of 0.2 % add up to 0.5 % as independent ones, and to 1.2 % at the
    very worst. 1 % lies between. Ours differ by 0.15 to 0.42 %.
    """
    if path is None:
        where = f"there is no */case_*.npz in {FOLDER}" if FOLDER else "RECORDS names no folder"
        pytest.skip(f"{where}; the recorded calls are public: {PUBLIC}")
    inputs, pairs, output, expected = recorded_call(path)
    y = output(np.asarray(scan(**inputs, pairs=pairs, method=method)))
    assert np.sqrt(np.mean((y - expected) ** 2) / np.mean(expected**2)) < 1e-2
