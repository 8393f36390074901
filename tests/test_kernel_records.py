"""trapezoidal_scan gives the outputs of the released Mamba-3 kernels, recorded on a GPU.

The tests that need the recorded calls are deselected by default: these files are not part of this
repository. mamba_book/kernel_records.py says where they are public. `make kernel-records
RECORDS=folder` reads folder/siso/case_*.npz and folder/mimo/case_*.npz. The other tests read calls
of the same form, made of random numbers.
"""

import os
from functools import cache
from pathlib import Path

import jax
import numpy as np
import pytest

from mamba.trapezoid import METHODS, trapezoidal_scan
from mamba_book.kernel_records import PUBLIC, WRONG, read_call, root_mean_square_error
from mamba_book.reference import relative_error, trapezoid_loop

TOLERANCE = 1e-2  # of a recorded output, relative, root mean square; derived below
FOLDER = os.environ.get("RECORDS")
PATHS = sorted(Path(FOLDER).glob("*/case_*.npz")) if FOLDER else []

scan = jax.jit(trapezoidal_scan, static_argnames=("pairs", "method"))
every_record = pytest.mark.parametrize(
    "path", PATHS or [None], ids=lambda p: p and f"{p.parent.name}-{p.stem}"
)


@cache
def recorded(path):
    """A recorded call; skip where there is none."""
    if path is None:
        where = f"there is no */case_*.npz in {FOLDER}" if FOLDER else "RECORDS names no folder"
        pytest.skip(f"{where}; the recorded calls are public: {PUBLIC}")
    return read_call(path)


def scanned(call, method="auto"):
    """The scan's output for a call, as the kernel returns it."""
    inputs = {name: np.float32(v) for name, v in call.inputs.items()}
    return call.output(np.asarray(scan(**inputs, pairs=call.pairs, method=method)))


def looped(call):
    """The y of the float64 loop for a call, not yet gated: (b, l, h, r, p)."""
    (b, _, h, r, p), n = call.inputs["x"].shape, call.inputs["B"].shape[-1]
    s = call.inputs["theta"].shape[-1]
    state = [np.zeros(shape) for shape in ((b, h, s), (b, h, p, n), (b, h, r, n), (b, h, r, p))]
    return trapezoid_loop(**call.inputs, state=state, pairs=call.pairs)[0]


# --- recorded calls -----------------------------------------------------------------------------


@pytest.mark.kernel_records
@every_record
@pytest.mark.parametrize("method", METHODS)
def test_outputs_of_the_released_kernels(path, method):
    """Recorded on a GPU, in bfloat16.

    A number rounded to bfloat16 is off by 2^-9 at most: by 0.17 %, root mean square, if it is the
    output, as rounding ours shows. The kernels also round what is inside: B̃, C̃, the masked product
    and the state, of which B̃ and C̃ alone are worth up to 0.13 % in ours; in MIMO, each of r outputs
    and their sum. Six such errors of 0.2 % add up to 0.5 % as independent ones, and to 1.2 % at the
    very worst. 1 % lies between. Ours differ by 0.15 to 0.42 %.
    """
    call = recorded(path)
    assert root_mean_square_error(scanned(call, method), call.out) < TOLERANCE


@pytest.mark.kernel_records
@every_record
def test_outputs_of_the_float64_loop(path):
    call = recorded(path)
    assert root_mean_square_error(call.output(looped(call)), call.out) < TOLERANCE


@pytest.mark.kernel_records
@every_record
@pytest.mark.parametrize("mistake", WRONG)
def test_every_mistake_is_seen(path, mistake):
    """With more than one token: a single one has no angle to another and no token before it."""
    call = recorded(path)
    seen = root_mean_square_error(scanned(WRONG[mistake](call)), call.out) > TOLERANCE
    assert seen or call.out.shape[1] == 1


# --- calls made of random numbers ---------------------------------------------------------------


def random_call(path, r, b=2, l=11, h=4, p=3, g=2, n=6, s=2):
    """Write a call in the form of a record; r = None: SISO -> its arrays."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    ranks = () if r is None else (r,)
    kw = {name: normal(b, l, *ranks, g, n) for name in "QK"}
    kw |= {name: normal(b, l, h, p) for name in "VZ"}
    kw |= {f"{name}_bias": normal(h, *ranks, n) for name in "QK"}
    kw |= {"Trap": normal(b, h, l), "Angles": normal(b, l, h, s), "D": normal(h)}
    kw["DT"] = np.float32(rng.uniform(0.1, 1, (b, h, l)))
    kw["ADT"] = np.float32(-rng.uniform(0.1, 2, (b, h, l)))
    if r is not None:
        kw |= {f"MIMO_{name}": normal(h, r, p) for name in ("V", "Z", "Out")}
    np.savez(path, out=normal(b, l, h, p), **{f"kw_{name}": v for name, v in kw.items()})
    return kw


@pytest.fixture(params=[None, 3], ids=["siso", "mimo"])
def written(request, tmp_path):
    """The arrays of a random call, and the call as it is read."""
    kw = random_call(tmp_path / "case_00.npz", request.param)
    return kw, read_call(tmp_path / "case_00.npz")


def test_a_call_is_read(written):
    kw, call = written
    r = 3 if "MIMO_V" in kw else 1
    assert call.pairs == ("halves" if r == 3 else "interleaved")
    shapes = {"x": (2, 11, 4, r, 3), "theta": (2, 11, 4, 2), "D": (4,)}
    shapes |= dict.fromkeys(("delta", "A", "lam"), (2, 11, 4))
    shapes |= dict.fromkeys("BC", (2, 11, 4, r, 6))
    assert {name: v.shape for name, v in call.inputs.items()} == shapes
    B, B_bias = kw["K"].reshape(2, 11, r, 2, 6), kw["K_bias"].reshape(4, r, 6)
    C, C_bias = kw["Q"].reshape(2, 11, r, 2, 6), kw["Q_bias"].reshape(4, r, 6)
    for i in range(4):  # head i is of group i // 2
        assert relative_error(call.inputs["B"][:, :, i], B[:, :, :, i // 2] + B_bias[i]) < 1e-6
        assert relative_error(call.inputs["C"][:, :, i], C[:, :, :, i // 2] + C_bias[i]) < 1e-6
        delta = call.inputs["delta"][:, :, i]
        assert relative_error(delta, kw["DT"][:, i]) == 0
        assert relative_error(delta * call.inputs["A"][:, :, i], kw["ADT"][:, i]) < 1e-6
        odds = np.exp(np.float64(kw["Trap"][:, i]))
        assert relative_error(call.inputs["lam"][:, :, i], odds / (1 + odds)) < 1e-6
        theta = delta[..., None] * np.pi * np.tanh(kw["Angles"][:, :, i])
        assert relative_error(call.inputs["theta"][:, :, i], theta) < 1e-6
        for q in range(r):
            x = kw["V"][:, :, i] * (kw["MIMO_V"][i, q] if r > 1 else 1)
            assert relative_error(call.inputs["x"][:, :, i, q], x) < 1e-6
    assert relative_error(call.inputs["D"], kw["D"]) == 0


def test_the_output_of_a_call(written):
    """Gated by SiLU(z), each of r outputs by its own; then their weighted sum."""
    kw, call = written
    y = np.random.default_rng(1).normal(size=call.inputs["x"].shape)
    expected = np.zeros(call.out.shape)
    for i in range(y.shape[3]):
        z = np.float64(kw["Z"]) * (kw["MIMO_Z"][:, i] if "MIMO_Z" in kw else 1)
        weight = kw["MIMO_Out"][:, i] if "MIMO_Out" in kw else 1
        expected += weight * y[:, :, :, i] * z / (1 + np.exp(-z))
    assert relative_error(call.output(y), expected) < 1e-6


def turned(v, angle, pairs):
    """v (b, l, h, r, n) as complex numbers times e^{iθ}: the pairs that turn, and the rest."""
    s, n = angle.shape[-1], v.shape[-1]
    places = (
        np.arange(n).reshape(-1, 2) if pairs == "interleaved" else np.arange(n).reshape(2, -1).T
    )
    z = (v[..., places[:s, 0]] + 1j * v[..., places[:s, 1]]) * np.exp(1j * angle)[:, :, :, None]
    out = v.copy()
    out[..., places[:s, 0]], out[..., places[:s, 1]] = z.real, z.imag
    return out


def by_hand(call, mistake=None):
    """y of the equations in float64, or of the equations with a mistake."""
    x, delta, A, lam, B, C, theta, D = call.inputs.values()
    pairs, angle, y = call.pairs, np.cumsum(theta, axis=1), np.zeros(x.shape)
    if mistake == "the other pairing":
        pairs = "interleaved" if pairs == "halves" else "halves"
    if mistake == "bias after rotation":
        unbiased = [v - bias for v, bias in zip((B, C), call.biases, strict=True)]
        B, C = (turned(v, angle, pairs) + w for v, w in zip(unbiased, call.biases, strict=True))
    else:
        B, C = (turned(v, angle, pairs) for v in (B, C))
    alpha, own = np.exp(delta * A), lam * delta
    weight = (1 - lam) * delta * (1 if mistake == "β without α" else alpha)
    if mistake == "one point (λ = 1)":
        own, weight = delta, 0 * delta
    written = np.einsum("blhrp,blhrn->blhpn", x, B)
    h = earlier = np.zeros_like(written[:, 0])
    for t in range(x.shape[1]):
        a, b, c = (v[:, t, :, None, None] for v in (alpha, weight, own))
        h, earlier = a * h + b * earlier + c * written[:, t], written[:, t]
        y[:, t] = np.einsum("bhpn,bhrn->bhrp", h, C[:, t]) + D[:, None, None] * x[:, t]
    return y


def test_the_equations_of_a_call(written):
    _, call = written
    assert relative_error(looped(call), by_hand(call)) < 1e-12
    assert relative_error(scanned(call), call.output(by_hand(call))) < 2e-5


@pytest.mark.parametrize("mistake", WRONG)
def test_a_mistake_is_the_one_it_is_called_after(written, mistake):
    _, call = written
    wrong = looped(WRONG[mistake](call))
    assert relative_error(wrong, by_hand(call, mistake)) < 1e-12
    assert root_mean_square_error(wrong, looped(call)) > TOLERANCE


def test_an_error_is_relative():
    expected = np.array([3.0, 4.0, 0.0, 0.0])
    assert root_mean_square_error(expected, expected) == 0
    assert root_mean_square_error(expected + [0.0, 0.0, 0.3, 0.4], expected) == pytest.approx(0.1)
