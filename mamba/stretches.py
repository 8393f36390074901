"""A scan over a text of which each device holds a stretch.

A stretch of tokens is one large step, h ↦ a h + b, where a is the product of its decays and b the
state that it leaves behind when it begins from zeros. So each device runs its stretch from zeros,
the steps are joined across devices by the same ``combine`` that joins tokens, and each device runs
its stretch again, from the state in which the text really reaches it.

What crosses a border is one state, whatever the length of the text. The price is the first run: it
costs as much as the second but for the outputs, which it does not compute.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mamba.collectives import before_stretch
from mamba.rotation import cos_and_sin, rotate, running_angle
from mamba.scan import combine, selective_scan
from mamba.ssd import FORGOTTEN, ssd
from mamba.trapezoid import TrapezoidState, outer, trapezoidal_scan

__all__ = ["Turned", "join", "join_turned", "over_sequence"]


def over_sequence(scan, axis):
    """``scan``, over a text whose stretches lie on the devices of one axis of a mesh.

    Args:
        scan: ``selective_scan``, ``ssd`` or ``trapezoidal_scan``.
        axis: of the mesh, inside ``jax.shard_map``; None: the text is whole -> ``scan``.

    Returns:
        a function that is called as ``scan``, with the device's stretch of every sequence. h0 or
        state is that before the whole text, the same on every device of the axis. The state that
        it returns is that after the device's own stretch.
    """
    return scan if axis is None else partial(_OVER_SEQUENCE[scan], axis)


def join(left, right):
    """``combine``, after which nothing is left of a state that decays to 0, even NaN or infinity.

    left, right: (a, h) of neighbouring stretches, the product of the decays and the state.
    """
    a, h = left
    return combine((a, jnp.where(right[0] == 0, 0.0, h)), right)


def _selective_scan(axis, x, delta, A, *inputs, h0=None, return_state=False, **options):
    run = partial(selective_scan, x, delta, A, *inputs, return_state=True, **options)
    _, h = run()  # (b, d, n)
    total = delta.astype(jnp.float32).sum(1)  # (b, d)
    a = _decay(total[..., None] * A, options.get("resets"))  # (b, d, n)
    return _again(axis, run, a, h, h0, return_state)


def _ssd(axis, x, delta, A, *inputs, h0=None, return_state=False, **options):
    run = partial(ssd, x, delta, A, *inputs, return_state=True, **options)
    _, h = run()  # (b, h, p, n)
    log_a = delta.astype(jnp.float32) * A.astype(jnp.float32)  # (b, l, h)
    a = jnp.where((log_a < FORGOTTEN).any(1), 0.0, _decay(log_a.sum(1), options.get("resets")))
    return _again(axis, run, a[..., None, None], h, h0, return_state)


def _decay(log_a, resets):
    """exp(log_a), and 0 for a stretch in which a new segment starts. log_a: (b, …)"""
    if resets is not None:
        new = resets.any(1).reshape(-1, *[1] * (log_a.ndim - 1))
        log_a = jnp.where(new, -jnp.inf, log_a)
    return jnp.exp(log_a)


def _again(axis, run, a, h, h0, return_state):
    """The second run, from the state that the stretches to the left leave."""
    start = jnp.ones_like(a), jnp.zeros_like(h) if h0 is None else h0.astype(jnp.float32)
    _, h0 = before_stretch(join, start, (a, h), axis)
    y, h = run(h0=h0)
    return (y, h) if return_state else y


# --- Mamba-3: the state turns, and the next token still writes the last one ----------------------


class Turned(NamedTuple):
    """What a stretch does to a TrapezoidState (heads as the second axis, for one message)."""

    a: jax.Array  # (b, h) product of the decays
    write: jax.Array  # (b, h) β / α of its first token: what that still writes of the one before
    angle: jax.Array  # (b, h, s) sum of its angles
    h: jax.Array  # (b, h, p, n) the state that it leaves when it begins from zeros
    B: jax.Array  # (b, h, r, n) B̃ of its last token, turned as if it began at angle 0
    x: jax.Array  # (b, h, r, p) x of its last token
    empty: jax.Array  # (b, h) bool: it has no token, only padding
    anew: jax.Array  # (b, h) bool: a segment starts in it, and with it the angle


def join_turned(pairs, left, right):
    """Two stretches as one: the right one turns by the angle to which the left one has come.

    h = a′ (h + write′ x ⊗ B̃) + R(θ) h′
    """
    kept = lambda v: jnp.where(right.a[..., None, None] == 0, 0.0, v)  # noqa: E731
    h = kept(left.h + outer(right.write, left.x, left.B)) * right.a[..., None, None]
    theta = jnp.where(right.anew[..., None], 0.0, left.angle)[..., None, :]  # (b, h, 1, s)
    cos, sin = cos_and_sin(theta)
    turn = lambda v: rotate(v, cos, sin, pairs)  # noqa: E731
    empty = right.empty[..., None, None]
    return Turned(
        a=left.a * right.a,
        write=jnp.where(left.empty, right.write, left.write),
        angle=running_angle(right.angle[:, None], left.angle, right.anew[:, :1])[:, 0],
        h=h + turn(right.h),
        B=jnp.where(empty, kept(left.B), turn(right.B)),
        x=jnp.where(empty, kept(left.x), right.x),
        empty=left.empty & right.empty,
        anew=left.anew | right.anew,
    )


def _trapezoidal_scan(
    axis, x, delta, A, lam, *inputs,
    pairs="interleaved", state=None, resets=None, return_state=False, **options,
):  # fmt: skip
    options |= {"pairs": pairs, "resets": resets, "return_state": True}
    run = partial(trapezoidal_scan, x, delta, A, lam, *inputs, **options)
    _, after = run()
    delta, A, lam = (v.astype(jnp.float32) for v in (delta, A, lam))  # (b, l, h)
    real = delta != 0
    delta = jnp.where(real, delta, 0.0)  # as it is, but without a gradient at padding
    log_a = delta * A
    a = jnp.where((log_a < FORGOTTEN).any(1), 0.0, _decay(log_a.sum(1), resets))  # (b, h)
    first = jnp.argmax(real, axis=1)[:, None]  # (b, 1, h) the first token that is no padding
    write = jnp.take_along_axis((1 - lam) * delta, first, axis=1)[:, 0]  # (b, h)
    anew = jnp.zeros_like(a, bool)
    if resets is not None:
        anew |= resets.any(1)[:, None]
    own = Turned(a, write, *after, empty=~real.any(1), anew=anew)

    state = jax.tree.map(jnp.zeros_like, after) if state is None else state
    no = jnp.zeros_like(a, bool)
    start = Turned(jnp.ones_like(a), jnp.zeros_like(a), *state, empty=no, anew=no)
    before = before_stretch(partial(join_turned, pairs), start, own, axis)
    y, state = run(state=TrapezoidState(before.angle, before.h, before.B, before.x))
    return (y, state) if return_state else y


_OVER_SEQUENCE = {
    selective_scan: _selective_scan,
    ssd: _ssd,
    trapezoidal_scan: _trapezoidal_scan,
}
