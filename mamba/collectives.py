"""What devices tell each other inside ``jax.shard_map``: each holds a stretch of one text.

The stretches lie in order along one axis of the mesh, so that a device's left neighbour holds what
comes before. Nothing here knows which scan or which convolution asks.
"""

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["announced", "before_stretch", "from_left", "inputs_before", "vary_alike"]


def vary_alike(*trees):
    """The same trees, in which every array varies over the axes over which any of them varies.

    Inside ``jax.shard_map``, the type of an array says along which axes of the mesh the devices may
    hold different values. Zeros are the same everywhere, what a loop computes from a device's
    inputs is not, and JAX refuses a loop whose carry begins as the one and goes on as the other.
    Outside ``shard_map`` nothing varies, and nothing is changed.
    """
    axes = frozenset().union(*map(_varying_axes, jax.tree.leaves(trees)))

    def vary(v):
        missing = tuple(axes - _varying_axes(v))
        if not missing:
            return v
        if hasattr(jax.lax, "pcast"):
            return jax.lax.pcast(v, missing, to="varying")
        return jax.lax.pvary(v, missing)  # its name before JAX 0.8

    return jax.tree.map(vary, trees)


def _varying_axes(v):
    """The axes of the mesh along which the devices may hold different values of v."""
    kind = jax.typeof(v)
    kind = getattr(kind, "manual_axis_type", kind)  # before JAX 0.10 the type said it itself
    return getattr(kind, "varying", None) or getattr(kind, "vma", frozenset())


def announced(shape, like):
    """A float32 result of a shape, which varies as ``like`` does: so ``pallas_call`` wants it."""
    if not (axes := _varying_axes(like)):
        return jax.ShapeDtypeStruct(shape, jnp.float32)
    if hasattr(jax.sharding, "ManualAxisType"):
        kind = {"manual_axis_type": jax.sharding.ManualAxisType(varying=axes)}
    else:
        kind = {"vma": axes}  # its name before JAX 0.10
    return jax.ShapeDtypeStruct(shape, jnp.float32, **kind)


def from_left(tree, axis, places=1):
    """What the device that many places to the left holds; zeros where there is none.

    One message carries the whole tree. Its arrays (b, k, …) agree in b and k, which may be sharded
    along another axis of the mesh; whatever their dtype, they travel as float32.
    """
    arrays, form = jax.tree.flatten(tree)
    b, k = arrays[0].shape[:2]
    flat = [v.reshape(b, k, -1).astype(jnp.float32) for v in arrays]
    message = jnp.concatenate(flat, axis=-1)  # (b, k, all numbers of a row and a channel)
    neighbours = [(i, i + places) for i in range(jax.lax.axis_size(axis) - places)]
    message = jax.lax.ppermute(message, axis, neighbours)
    ends = np.cumsum([v.shape[-1] for v in flat])[:-1]
    parts = zip(jnp.split(message, ends, axis=-1), arrays, strict=True)
    return form.unflatten([part.reshape(v.shape).astype(v.dtype) for part, v in parts])


def before_stretch(join, start, own, axis):
    """What all stretches before each device's own do together: a scan over devices.

    In round k a device hears from the one 2^k places to its left, and knows twice as many stretches
    afterwards: ⌈log₂ K⌉ messages for K devices, each of one element, whatever a stretch's length.

    Args:
        join: (left, right) -> an element, associative.
        start: the element before the whole text, the same on every device.
        own: the element of the device's stretch.
        axis: of the mesh.

    Returns:
        start ∘ own₀ ∘ … ∘ ownᵢ₋₁ on device i.
    """
    start, own = vary_alike(start, own)
    place, reach = jax.lax.axis_index(axis), 1  # stretches that a device knows, its own included
    choose = lambda this, new, old: jax.tree.map(lambda a, b: jnp.where(this, a, b), new, old)  # noqa: E731
    known = own = choose(place == 0, join(start, own), own)  # the first begins from `start`
    before = start
    while reach < jax.lax.axis_size(axis):
        heard = from_left(known, axis, reach)  # the stretches just before those known
        # At the left end nobody speaks: there, what is known reaches back to `start` already.
        longer = heard if reach == 1 else join(heard, before)
        before = choose(place < reach, before, longer)
        known, reach = choose(place == 0, own, join(before, own)), 2 * reach
    return before


def inputs_before(x, cache, resets, axis):
    """The inputs before each device's stretch, for a causal convolution: its left neighbour's last.

    Args:
        x: (b, l, d) the device's stretch.
        cache: (b, w, d) the inputs before the whole text.
        resets: (b, l) True where a new segment starts, or None. What lies before a neighbour's last
            reset is 0.
        axis: of the mesh; None: the text is whole, and the cache is what comes before.

    Returns:
        (b, w, d).

    Raises:
        ValueError: a stretch is shorter than the window.
    """
    (_, l, _), w = x.shape, cache.shape[1]
    if axis is None or not w:
        return cache
    if l < w:
        raise ValueError(
            f"the {axis!r} axis of the mesh cuts the text into stretches of {l} tokens, but the "
            f"convolution looks {w} tokens back: a stretch needs at least as many"
        )
    last = x[:, l - w :]  # (b, w, d)
    if resets is not None:
        resets = resets[:, l - w :]  # (b, w)
        later = jnp.cumsum(resets[:, ::-1], axis=1)[:, ::-1] - resets  # resets after each input
        last = jnp.where((later > 0)[..., None], 0, last)
    before = from_left(last.swapaxes(1, 2), axis).swapaxes(1, 2)  # d next to b: it may be sharded
    return jnp.where(jax.lax.axis_index(axis) == 0, cache.astype(x.dtype), before)
