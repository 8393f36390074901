"""The Mosaic GPU kernel: interpreted against float64, lowered for CUDA; run on no GPU here."""

import functools
import importlib.util
import inspect
import sys

import jax
import jax.experimental.pallas
import jax.numpy as jnp
import numpy as np
import pytest

from mamba.kernels import CHUNK
from mamba.scan import tree
from mamba_book.lowering import lowered_for
from mamba_book.reference import relative_error
from tests.helpers.book import ROOT
from tests.helpers.kernels import as_float32, in_float64, random_inputs

mosaic = pytest.importorskip("mamba.mosaic")
parameters = pytest.importorskip("jax._src.pallas.mosaic_gpu.interpret.params")
if "out_type" not in inspect.signature(mosaic.plgpu.kernel).parameters:
    pytest.skip("a JAX that still has Triton, and an older Mosaic GPU", allow_module_level=True)
INTERPRETED = parameters.InterpretGPUParams()


def padded(inputs):
    """In float32, with D and resets as the kernel takes them."""
    p = as_float32(inputs)
    resets = p.pop("resets")
    p["D"] = p["D"][None]
    shape = p["B"].shape
    p["keep"] = (
        None if resets is None else np.repeat(1 - np.float32(resets)[..., None], shape[2], 2)
    )
    return p


@pytest.mark.parametrize(
    ("b", "l", "d", "n", "gate", "reset"),
    [  # less than a buffer of tokens and several; one tile of channels and two; few states, more
        (2, 8, 128, 2, False, False),
        (1, 64, 128, 1, True, True),
        (2, 8, 256, 5, True, True),
    ],
)
def test_agrees_with_float64(b, l, d, n, gate, reset):
    inputs = random_inputs(b, l, d, n, gate, reset, seed=l)
    y, h, starts = mosaic.mosaic_forward(**padded(inputs), save=True, interpret=INTERPRETED)
    (y_ref, h_ref), _ = in_float64(inputs, np.zeros((b, l, d)), np.zeros((b, n, d)))
    assert y.shape == y_ref.shape and h.shape == h_ref.shape
    assert relative_error(y, y_ref) < 1e-5
    assert relative_error(h, h_ref) < 1e-5
    assert starts.shape == (b, l // CHUNK, n, d)
    along_time = ("x", "delta", "B", "C", "z", "resets")
    for k in range(l // CHUNK):  # each state that is kept is the last one of the tokens before it
        if k == 0:
            expected = inputs["h0"]
        else:
            cut = {
                name: v[:, : k * CHUNK] if name in along_time and v is not None else v
                for name, v in inputs.items()
            }
            (_, expected), _ = in_float64(cut, np.zeros(cut["x"].shape), np.zeros((b, n, d)))
        assert relative_error(starts[:, k], expected) < 1e-5


def test_the_gradients_agree_with_float64():
    """From the states that the kernel keeps, over more chunks than one of the backward pass."""
    b, l, d, n = 1, 72, 128, 1
    inputs = random_inputs(b, l, d, n, reset=True, seed=3)
    rng = np.random.default_rng(1)
    dy, dh = rng.normal(size=(b, l, d)), rng.normal(size=(b, n, d))
    p = padded(inputs)
    _, _, starts = mosaic.mosaic_forward(**p, save=True, interpret=INTERPRETED)
    del p["h0"]
    found = mosaic.mosaic_backward(
        **p, starts=starts, dy=jnp.float32(dy), dh=jnp.float32(dh), tree=tree, interpret=INTERPRETED
    )
    _, expected = in_float64(inputs, dy, dh)
    expected["D"] = expected["D"][None]
    for name, gradient in zip(("x", "delta", "A", "B", "C", "D", "z", "h0"), found, strict=True):
        assert relative_error(gradient, expected[name]) < 1e-4, name


def test_a_reset_discards_what_is_not_finite():
    clean = random_inputs(1, 16, 128, 2, reset=False)
    clean["resets"] = np.arange(16)[None] == 11
    dirty = {name: v.copy() for name, v in clean.items()}
    dirty["h0"][:], dirty["B"][0, 3] = np.nan, np.inf
    run = functools.partial(mosaic.mosaic_forward, save=False, interpret=INTERPRETED)
    (y, h, _), (y_other, h_other, _) = run(**padded(clean)), run(**padded(dirty))
    assert not np.isfinite(y_other[:, :11]).any()
    np.testing.assert_array_equal(y[:, 11:], y_other[:, 11:])
    np.testing.assert_array_equal(h, h_other)


# --- where Pallas has no Triton -----------------------------------------------------------------


@pytest.fixture
def pallas_scan(monkeypatch):
    """``pallas_scan`` of a JAX whose Pallas has no Triton any more."""
    monkeypatch.setitem(sys.modules, "jax.experimental.pallas.triton", None)
    monkeypatch.delattr(jax.experimental.pallas, "triton", raising=False)
    spec = importlib.util.spec_from_file_location("without_triton", ROOT / "mamba" / "pallas.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return functools.partial(module.pallas_scan, tree=tree)


def shapes(b, l, d, n, gate=True, reset=False, batch=()):
    float32 = lambda *s: jax.ShapeDtypeStruct((*batch, *s), jnp.float32)  # noqa: E731
    return (
        *(float32(b, l, d), float32(b, l, d), float32(n, d), float32(b, l, n), float32(b, l, n)),
        *(float32(d), float32(b, l, d) if gate else None, float32(b, n, d)),
        jax.ShapeDtypeStruct((*batch, b, l), jnp.bool_) if reset else None,
    )


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((1, 2048, 1536, 16), {}),
        ((3, 37, 5, 3), {"gate": False, "reset": True}),
        ((2, 140, 200, 1), {"reset": True, "batch": (2, 2)}),
    ],
)
def test_without_triton_a_gpu_gets_this_kernel(pallas_scan, shape, options):
    function = pallas_scan
    for _ in options.get("batch", ()):
        function = jax.vmap(function)
    text = lowered_for("cuda", function, *shapes(*shape, **options))
    assert text.count("custom_call @mosaic_gpu") == 1 and "triton" not in text
    assert "stablehlo.while" not in text  # nothing else steps through time
    (b, l, d, n), lead = shape, "".join(f"{size}x" for size in options.get("batch", ()))
    assert f"tensor<{lead}{b}x{l}x{n}x{d}xf32>" not in text  # nor holds a state per token


def test_without_triton_the_gradient_starts_from_what_the_kernel_kept(pallas_scan):
    b, l, d, n = shape = 1, 2048, 1536, 16

    def gradients(*args):
        (y, h), pullback = jax.vjp(lambda *a: pallas_scan(*a, None), *args)
        return pullback((jnp.ones_like(y), jnp.ones_like(h)))

    text = lowered_for("cuda", gradients, *shapes(*shape)[:8])
    assert text.count("custom_call @mosaic_gpu") == 2  # again, for the gate
    assert f"tensor<{b}x{l // CHUNK}x{n}x{d}xf32>" in text
    assert f"tensor<{b}x{l}x{n}x{d}xf32>" not in text


def test_without_triton_the_other_platforms_stay_as_they_are(pallas_scan):
    given = shapes(1, 9, 3, 2)
    assert "tpu_custom_call" in lowered_for("tpu", pallas_scan, *given)
    assert "custom_call @" not in lowered_for("cpu", pallas_scan, *given)
    inputs = random_inputs(1, 9, 3, 2)
    y, h = pallas_scan(**as_float32(inputs))  # interpreted, as with Triton
    (y_ref, h_ref), _ = in_float64(inputs, np.zeros((1, 9, 3)), np.zeros((1, 2, 3)))
    assert relative_error(y, y_ref) < 1e-5 and relative_error(h, h_ref) < 1e-5
