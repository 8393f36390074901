"""The Pallas kernel: interpreted against float64, lowered for CUDA and TPU; run on neither here."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mamba import pallas
from mamba.kernels import CHUNK
from mamba.pallas import GPU, TPU, pallas_scan
from mamba_book.lowering import lowered_for
from mamba_book.reference import relative_error
from tests.helpers.kernels import as_float32, in_float64, random_inputs

NAMES = ["x", "delta", "A", "B", "C", "D", "z", "h0"]


CASES = [  # b, l, d, n, gate, resets: inside one chunk, off and on its border, past one tile
    (3, 1, 1, 3, True, False),
    (3, 2, 5, 3, True, False),
    (3, 3, 1, 3, True, False),
    (3, 7, 128, 3, True, False),
    (3, 7, 5, 3, True, True),
    (1, 37, 5, 1, False, False),
    (3, 64, 5, 3, False, True),
    (1, 100, 200, 16, True, True),
    (1, 372, 200, 3, True, False),
]


@pytest.mark.parametrize(("b", "l", "d", "n", "gate", "reset"), CASES)
def test_agrees_with_float64(b, l, d, n, gate, reset):
    inputs = random_inputs(b, l, d, n, gate, reset, seed=l)
    check_values_and_gradients(partial(pallas_scan, interpret=True), inputs)


def check_values_and_gradients(function, inputs):
    rng = np.random.default_rng(1)
    dy, dh = rng.normal(size=inputs["x"].shape), rng.normal(size=inputs["h0"].shape)

    @jax.jit  # all in one program
    def run(p, resets):
        y, pullback = jax.vjp(lambda p: function(**p, resets=resets), p)
        return y, pullback((jnp.float32(dy), jnp.float32(dh)))[0]

    p = as_float32(inputs)
    (y, h), grads = run(p, p.pop("resets"))
    (y_ref, h_ref), expected = in_float64(inputs, dy, dh)
    assert y.dtype == h.dtype == jnp.float32
    assert y.shape == y_ref.shape and h.shape == h_ref.shape
    assert relative_error(y, y_ref) < 1e-5
    assert relative_error(h, h_ref) < 1e-5
    for name in expected:
        assert relative_error(grads[name], expected[name]) < 1e-4, name


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_reset_discards_what_is_not_finite(value):
    """In h0, in a token, and in the gradient of an output: none gets past a reset."""
    clean = as_float32(random_inputs(2, 12, 5, 3, reset=True))
    clean["resets"] = np.arange(12)[None] == [[6], [6]]
    dirty = {k: v.copy() for k, v in clean.items()}
    dirty["h0"][0] = dirty["B"][1, 2] = value
    dy = np.float32(np.random.default_rng(1).normal(size=clean["x"].shape))

    @jax.jit
    def run(p, resets, dy):
        f = lambda p: pallas_scan(**p, resets=resets, interpret=True)  # noqa: E731
        (y, h), pullback = jax.vjp(f, p)
        return y, h, pullback((dy, jnp.zeros_like(h)))[0]

    (y, h, grads), (y_other, h_other, grads_other) = (
        run({k: v for k, v in p.items() if k != "resets"}, p["resets"], dy) for p in (clean, dirty)
    )
    assert not np.isfinite(y_other[:, :6]).all(axis=(1, 2)).any()
    np.testing.assert_array_equal(y[:, 6:], y_other[:, 6:])
    np.testing.assert_array_equal(h, h_other)
    for name in ("x", "delta", "B", "C", "z"):
        np.testing.assert_array_equal(grads[name][:, 6:], grads_other[name][:, 6:], name)

    dy = dy.copy()
    dy[:, 8] = value
    p = {k: v for k, v in clean.items() if k != "resets"}
    grads_other = run(p, clean["resets"], dy)[2]
    assert not np.isfinite(grads_other["x"][:, 6:9]).all()
    for name in ("x", "delta", "B", "C", "z"):
        np.testing.assert_array_equal(grads[name][:, :6], grads_other[name][:, :6], name)
    np.testing.assert_array_equal(grads["h0"], grads_other["h0"])


def test_the_tiles_of_a_gpu_give_the_same(monkeypatch):
    """A grid without a time axis, and several tiles of channels whose dB and dC are added up."""
    narrow = GPU._replace(channels=64)  # fewer programs to interpret than with 32
    monkeypatch.setattr(pallas, "TPU", narrow._replace(tokens=TPU.tokens))
    calls = []
    original = pallas.pl.pallas_call
    monkeypatch.setattr(
        pallas.pl, "pallas_call", lambda *a, **k: calls.append(k["grid"]) or original(*a, **k)
    )
    inputs = random_inputs(2, 140, 128, 2, reset=True)
    check_values_and_gradients(partial(pallas_scan, interpret=True), inputs)
    assert calls and all(grid == (2, 2, 2) for grid in calls)


def test_jit_and_vmap_interpret_on_a_cpu_by_themselves():
    inputs = [random_inputs(1, 5, 3, 2, seed=seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *v: np.stack(v), *map(as_float32, inputs))
    stacked.pop("resets")

    def loss(p):
        y, h = pallas_scan(**p, resets=None)
        return y.sum() + h.sum()

    grads = jax.jit(jax.vmap(jax.grad(loss)))(stacked)
    for i, p in enumerate(inputs):
        _, expected = in_float64(p, np.ones((1, 5, 3)), np.ones((1, 2, 3)))
        for name in expected:
            assert relative_error(grads[name][i], expected[name]) < 1e-4, name


# --- lowering for machines that are not here ----------------------------------------------------


def lowered(platform, shape, gradient, gate=True, reset=False, batch=()):
    b, l, d, n = shape
    float32 = lambda *s: jax.ShapeDtypeStruct((*batch, *s), jnp.float32)  # noqa: E731
    arguments = (
        *(float32(b, l, d), float32(b, l, d), float32(n, d), float32(b, l, n), float32(b, l, n)),
        *(float32(d), float32(b, l, d) if gate else None, float32(b, n, d)),
        jax.ShapeDtypeStruct((*batch, b, l), jnp.bool_) if reset else None,
    )

    def function(*args):
        if not gradient:
            return pallas_scan(*args)
        (y, h), pullback = jax.vjp(lambda *a: pallas_scan(*a, args[8]), *args[:8])
        return pullback((jnp.ones_like(y), jnp.ones_like(h)))

    for _ in batch:
        function = jax.vmap(function)
    return lowered_for(platform, function, *arguments)


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize(
    ("shape", "gate", "reset", "batch"),
    [
        ((1, 2048, 1536, 16), True, False, ()),
        ((3, 37, 5, 3), False, True, ()),
        ((2, 372, 200, 1), True, True, (2, 2)),
    ],
)
@pytest.mark.parametrize(
    ("platform", "call"), [("cuda", "xla.gpu.triton"), ("tpu", "tpu_custom_call")]
)
def test_lowers_to_a_kernel(platform, call, shape, gate, reset, batch, gradient):
    text = lowered(platform, shape, gradient, gate, reset, batch)
    assert text.count(call) == (2 if gradient else 1)
    # Nothing else steps through time: an interpreted kernel, or a scan, would be a loop.
    assert "stablehlo.while" not in text
    # No array holds a state per token.
    (b, l, d, n), lead = shape, "".join(f"{size}x" for size in batch)
    assert f"tensor<{lead}{b}x{l}x{n}x{d}xf32>" not in text
    if shape[1] == 2048:
        kept = f"tensor<{b}x{l // CHUNK}x{n}x{d}xf32>"
        assert (kept in text) == gradient


def test_a_cpu_gets_no_kernel():
    text = lowered("cpu", (1, 9, 3, 2), gradient=False)
    assert "stablehlo.while" in text and "custom_call @" not in text


# --- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*NAMES, "resets"])
def test_names_the_argument_whose_shape_is_wrong(name):
    inputs = as_float32(random_inputs(2, 4, 3, 2, reset=True))
    inputs[name] = inputs[name][..., None]
    with pytest.raises(ValueError, match=f"^{name} must have shape"):
        pallas_scan(**inputs)


def test_refuses_an_empty_sequence_and_other_dtypes():
    inputs = as_float32(random_inputs(2, 4, 3, 2, reset=True))
    with pytest.raises(ValueError, match="all >= 1"):
        pallas_scan(**{**inputs, "x": inputs["x"][:, :0]})
    with pytest.raises(TypeError, match="B must be float32, got bfloat16"):
        pallas_scan(**{**inputs, "B": inputs["B"].astype(jnp.bfloat16)})
    with pytest.raises(TypeError, match="resets must be bool, .*, got int32"):
        pallas_scan(**{**inputs, "resets": inputs["resets"].astype(jnp.int32)})


def test_a_second_derivative_says_what_to_use():
    inputs = as_float32(random_inputs(1, 4, 3, 2))
    total = lambda x: pallas_scan(**{**inputs, "x": x}, interpret=True)[0].sum()  # noqa: E731
    with pytest.raises(NotImplementedError, match="method='associative'"):
        jax.eval_shape(jax.grad(lambda x: jax.grad(total)(x).sum()), inputs["x"])
