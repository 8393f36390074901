"""Whether this machine computes what the equations say: every scan, kernel and block.

Outputs, last states and gradients of every scan, in float32 and compiled for this machine, against
loops in float64 NumPy; models of one layer against float64 NumPy, and their gradients against its
differences in random directions. Matrices are multiplied in full float32 here. How far the outputs
are with the precision that JAX takes by itself (an accelerator may round the factors) is recorded
beside it.
"""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from mamba import Mamba, Mamba2Config, Mamba3Config, MambaConfig, selective_scan
from mamba.scan import METHODS
from mamba.ssd import METHODS as SSD_METHODS
from mamba.ssd import ssd
from mamba.trapezoid import METHODS as TRAPEZOID_METHODS
from mamba.trapezoid import TrapezoidState, trapezoidal_scan
from mamba_book import reference
from mamba_book.reference import relative_error
from mamba_book.reference_models import model_loop, random_params, to_float64

TOLERANCES = {"values": 1e-4, "gradients": 1e-3}  # of float32 and of the order of its sums
BY_ITSELF = 0.05  # of matrices whose factors are rounded to bfloat16: any more is a mistake
SHAPES = [(2, 37, 5, 3), (2, 200, 160, 16)]  # b, l, d, n: no whole chunks, and several tiles
FEW = [(2, 37, 5, 3)]
QUICK = ["selective_scan pallas b=2 l=37 d=5 n=3", "selective_scan chunked bfloat16"]
QUICK += ["ssd chunked", "block Mamba"]
DIRECTIONS, STEP = 3, 1e-5  # of the differences


def checks(quick=False):
    """Run every check -> rows: what, errors, and whether they are within the tolerances.

    quick: a check of each kind only, for a machine on which the kernels are interpreted.
    """
    for name, check in _checks(FEW if quick else SHAPES):
        if quick and name not in QUICK:
            continue
        row = {"check": name}
        try:
            with jax.default_matmul_precision("highest"):
                row |= check()
            within = [row[kind] <= TOLERANCES[kind] for kind in TOLERANCES if kind in row]
            if not quick:
                row["values_by_itself"] = check(gradients=False)["values"]
                within.append(row["values_by_itself"] <= BY_ITSELF)
            row["correct"] = all(within)
        except Exception as error:  # what does not run here is no more use than a wrong number
            row |= {"correct": False, "error": f"{type(error).__name__}: {str(error)[:300]}"}
        yield {k: float(f"{v:.2e}") if isinstance(v, float) else v for k, v in row.items()}


def _checks(shapes):
    """(name, function) of every check."""
    for shape in shapes:
        size = " ".join(f"{k}={v}" for k, v in zip("bldn", shape, strict=True))
        for method in METHODS:
            yield f"selective_scan {method} {size}", partial(_selective, method, shape)
        if has_mosaic():
            yield f"mosaic kernel {size}", partial(_selective, "mosaic", shape)
    for method in METHODS:
        yield f"selective_scan {method} bfloat16", partial(_in_bfloat16, method, shapes[0])
    for method in SSD_METHODS:
        yield f"ssd {method}", partial(_ssd, method)
    for method in TRAPEZOID_METHODS:
        for r, pairs in ((1, "interleaved"), (3, "halves")):
            yield f"trapezoidal_scan {method} r={r}", partial(_trapezoid, method, r, pairs)
    for name, config in BLOCKS.items():
        yield f"block {name}", partial(_block, config)


def has_mosaic():
    """Whether the device is an NVIDIA GPU that Mosaic GPU is for: Hopper or later."""
    capability = str(getattr(jax.devices()[0], "compute_capability", ""))  # "9.0", or AMD's "gfx…"
    return re.fullmatch(r"(9|\d\d)\.\d", capability) is not None


def _compare(run, inputs, expected, expected_gradients, gradients):
    """Errors of run(**inputs) and of its gradients, for cotangents of its outputs.

    expected: (y, state) in float64; expected_gradients: function(dy, dstate) -> dict by name.
    """
    given = jax.tree.map(jnp.float32, inputs)
    if not gradients:
        return {"values": float(relative_error(jax.jit(run)(given), expected))}
    rng = np.random.default_rng(1)
    cotangents = jax.tree.map(lambda v: rng.normal(size=np.shape(v)), expected)

    @jax.jit
    def both(given, cotangents):
        out, pullback = jax.vjp(run, given)
        return out, pullback(cotangents)[0]

    out, found = both(given, jax.tree.map(jnp.float32, cotangents))
    wanted = expected_gradients(*cotangents)
    errors = [relative_error(found[name], wanted[name]) for name in inputs]
    return {
        "values": float(relative_error(out, expected)),
        "gradients": float(np.max(errors)),
    }


def _scan_inputs(b, l, d, n):
    rng = np.random.default_rng(l)
    N = lambda *shape: rng.normal(size=shape)  # noqa: E731
    resets = rng.random((b, l)) < 0.1
    delta = np.exp(rng.uniform(np.log(1e-3), 0, (b, l, d)))
    A = -rng.uniform(0.1, 16, (d, n))
    inputs = {"x": N(b, l, d), "delta": delta, "A": A, "B": N(b, l, n), "C": N(b, l, n)}
    return inputs | {"D": N(d), "z": N(b, l, d), "h0": N(b, d, n)}, resets


def _selective(method, shape, gradients=True):
    inputs, resets = _scan_inputs(*shape)
    expected = reference.selective_scan_loop(**inputs, resets=resets)

    def run(v):
        if method == "mosaic":
            return mosaic_scan(**v, resets=resets)
        return selective_scan(**v, resets=resets, method=method, return_state=True)

    def wanted(dy, dh):
        return reference.selective_scan_gradients(dy, dh, **inputs, resets=resets)

    return _compare(run, inputs, expected, wanted, gradients and method != "mosaic")


def mosaic_scan(x, delta, A, B, C, D, z=None, h0=None, resets=None, interpret=False):
    """``selective_scan`` by ``mamba.mosaic``'s kernel, also where Pallas still has Triton."""
    from mamba.kernels import CHUNK
    from mamba.mosaic import CHANNELS, mosaic_forward

    (b, l, d), n = x.shape, A.shape[1]
    h0 = jnp.zeros((b, d, n)) if h0 is None else h0
    keep = None if resets is None else jnp.repeat(1.0 - resets[..., None], n, axis=2)

    def pad(v, *after):
        return None if v is None else jnp.pad(v, [(0, extra) for extra in after])

    tokens, channels = -l % CHUNK, -d % CHANNELS
    x, delta, z = (pad(v, 0, tokens, channels) for v in (x, delta, z))
    B, C, keep = (pad(v, 0, tokens, 0) for v in (B, C, keep))
    A, D, h0 = pad(A.T, 0, channels), pad(D[None], 0, channels), pad(h0.mT, 0, 0, channels)
    f32 = [None if v is None else jnp.float32(v) for v in (x, delta, A, B, C, D, z, keep, h0)]
    y, h, _ = mosaic_forward(*f32, save=False, interpret=interpret)
    return y[:, :l, :d], h.mT[:, :d]


def _in_bfloat16(method, shape, gradients=False):
    """All inputs rounded to bfloat16; only y is rounded on the way back."""
    inputs, resets = _scan_inputs(*shape)
    rounded = {k: jnp.asarray(v, jnp.bfloat16) for k, v in inputs.items()}
    exact = {k: np.asarray(v, np.float64) for k, v in rounded.items()}
    y, h = reference.selective_scan_loop(**exact, resets=resets)
    run = jax.jit(partial(selective_scan, resets=resets, method=method, return_state=True))
    found_y, found_h = run(**rounded)
    assert found_y.dtype == jnp.bfloat16
    rounding = 2.0**-8 * np.abs(y)  # half a unit in the last place of bfloat16
    beyond = np.maximum(np.abs(np.float64(found_y) - y) - rounding, 0).max() / np.abs(y).max()
    return {"values": float(max(beyond, relative_error(found_h, h)))}


def _ssd(method, gradients=True):
    b, l, h, p, g, n = 2, 150, 4, 6, 2, 5
    rng = np.random.default_rng(2)
    N = lambda *shape: rng.normal(size=shape)  # noqa: E731
    resets = rng.random((b, l)) < 0.1
    inputs = {"x": N(b, l, h, p), "delta": np.exp(rng.uniform(np.log(1e-3), 0, (b, l, h)))}
    inputs |= {"A": -rng.uniform(0.1, 16, h), "B": N(b, l, g, n), "C": N(b, l, g, n)}
    inputs |= {"D": N(h), "h0": N(b, h, p, n)}
    expected = reference.ssd_loop(**inputs, resets=resets)

    def run(v):
        return ssd(**v, resets=resets, method=method, return_state=True)

    def wanted(dy, dh):
        return reference.ssd_gradients(dy, dh, **inputs, resets=resets)

    return _compare(run, inputs, expected, wanted, gradients)


def _trapezoid(method, r, pairs, gradients=True):
    b, l, h, p, n, s = 2, 75, 3, 5, 6, 2
    rng = np.random.default_rng(3)
    N = lambda *shape: rng.normal(size=shape)  # noqa: E731
    resets = rng.random((b, l)) < 0.1
    inputs = {"x": N(b, l, h, r, p), "delta": np.exp(rng.uniform(np.log(1e-2), 0, (b, l, h)))}
    inputs |= {"A": -rng.uniform(0.1, 4, (b, l, h)), "lam": rng.uniform(size=(b, l, h))}
    inputs |= {"B": N(b, l, h, r, n), "C": N(b, l, h, r, n), "theta": N(b, l, h, s), "D": N(h)}
    start = TrapezoidState(
        rng.uniform(-3, 3, (b, h, s)), N(b, h, p, n), N(b, h, r, n), N(b, h, r, p)
    )
    inputs["state"] = start
    y, state = reference.trapezoid_loop(**inputs, pairs=pairs, resets=resets)

    def run(v):
        y, state = trapezoidal_scan(
            **v, pairs=pairs, resets=resets, method=method, return_state=True
        )
        return y, (on_the_circle(state.angle), *state[1:])  # π and −π are one angle

    def wanted(dy, dstate):
        dcircle, *others = dstate
        angle = state[0]
        dangle = dcircle[1] * np.cos(angle) - dcircle[0] * np.sin(angle)
        return reference.trapezoid_gradients(
            dy, (dangle, *others), **inputs, pairs=pairs, resets=resets
        )

    def on_the_circle(angle):
        return jnp.stack([jnp.cos(angle), jnp.sin(angle)])

    circle = np.stack([np.cos(state[0]), np.sin(state[0])])
    return _compare(run, inputs, (y, (circle, *state[1:])), wanted, gradients)


# --- the blocks -----------------------------------------------------------------------------------

_SIZES = {"d_model": 12, "n_layer": 1, "vocab_size": 19}
_HEADS = _SIZES | {"d_state": 6, "head_dim": 4, "n_groups": 2, "pad_vocab_size_multiple": 8}
BLOCKS = {
    "Mamba": MambaConfig(**_SIZES),
    "Mamba-2": Mamba2Config(**_HEADS),
    "Mamba-3": Mamba3Config(**_HEADS, d_intermediate=7),
    "Mamba-3, MIMO": Mamba3Config(**_HEADS, is_mimo=True, mimo_rank=3),
}


def _block(config, gradients=True):
    """A model of one layer: the whole text, token by token, and the gradient of every tensor."""
    model = Mamba(config)
    params, rng = random_params(model), np.random.default_rng(0)
    tokens, exact = rng.integers(0, config.vocab_size, (2, 9)), to_float64(params)
    logits, _ = model_loop(exact, tokens, config)
    whole = jax.jit(lambda p, t: model.apply({"params": p}, t))(params, tokens)
    step = jax.jit(lambda p, t, state: model.apply({"params": p}, t, state))
    state, steps = model.initial_state(2), []
    for t in range(tokens.shape[1]):
        out, state = step(params, tokens[:, t : t + 1], state)
        steps.append(out)
    found = whole, jnp.concatenate(steps, axis=1)
    errors = {"values": float(relative_error(found, (logits, logits)))}
    if not gradients:
        return errors
    weight = rng.normal(size=logits.shape)
    gradient = jax.jit(
        jax.grad(lambda p: (model.apply({"params": p}, tokens) * jnp.float32(weight)).sum())
    )(params)
    gradient, worst = to_float64(gradient), 0.0
    for _ in range(DIRECTIONS):
        signs = jax.tree.map(lambda v: rng.choice([-1.0, 1.0], v.shape), exact)
        ends = []
        for side in (STEP, -STEP):
            moved = jax.tree.map(lambda v, s, side=side: v + side * s, exact, signs)
            ends.append((model_loop(moved, tokens, config)[0] * weight).sum())
        slope = (ends[0] - ends[1]) / (2 * STEP)
        pairs = list(zip(jax.tree.leaves(gradient), jax.tree.leaves(signs), strict=True))
        found = sum((g * s).sum() for g, s in pairs)
        length = np.sqrt(sum((g**2).sum() for g, _ in pairs))
        worst = max(worst, abs(found - slope) / length)
    return errors | {"gradients": float(worst)}
