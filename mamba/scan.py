"""The selective scan: a linear recurrence whose coefficients depend on the input.

    h_t = exp(Δ_t A) h_{t−1} + Δ_t B_t x_t,    y_t = C_t h_t + D x_t,    then y_t · silu(z_t)

for each of b·d channels with n states apiece. The discretization is the released code's: the rule
of ``mamba.discretize.mixed_diag``, written out where it is used (``mamba.chunked.decay``, and
``mamba.kernels.kernel_step``), so that no array of it is kept. Pure functions of arrays.

Source: Mamba (Gu & Dao, 2023), §3.2 and Algorithm 2.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mamba.checks import check_axes, check_chunk, check_shapes
from mamba.chunked import chunked_scan, decay, discard, outer
from mamba.collectives import vary_alike

__all__ = [
    "CHUNKS",
    "METHODS",
    "associative",
    "combine",
    "combine_segments",
    "one_step",
    "selective_scan",
    "tree",
]

CHUNKS = {"sequential": 16, "chunked": 64}  # T, tokens between two kept states
METHODS = ("associative", *CHUNKS, "pallas")


def selective_scan(
    x: Float[Array, "b l d"],
    delta: Float[Array, "b l d"],
    A: Float[Array, "d n"],
    B: Float[Array, "b l n"],
    C: Float[Array, "b l n"],
    D: Float[Array, " d"],
    *,
    z: Float[Array, "b l d"] | None = None,
    h0: Float[Array, "b d n"] | None = None,
    resets: Bool[Array, "b l"] | None = None,
    method: str = "auto",
    chunk: int | None = None,
    return_state: bool = False,
):
    """Run the selective state space model over a sequence.

        h_t = exp(Δ_t A) ⊙ h_{t−1} + (Δ_t x_t) ⊗ B_t
        y_t = h_t C_t + D ⊙ x_t;    with a gate z, y_t ← y_t ⊙ silu(z_t)

    Args:
        x: (b, l, d) input, all ≥ 1. Every array is computed with in float32, whatever its floating
            dtype.
        delta: (b, l, d) time steps Δ > 0, bias and softplus already applied. Where Δ = 0, the
            state passes through unchanged.
        A: (d, n) rates in 1/Δ, real and negative.
        B: (b, l, n) how each token writes to the states.
        C: (b, l, n) how each token reads them.
        D: (d,) weight of the direct path from x to y.
        z: (b, l, d) gate, or None.
        h0: (b, d, n) state before the first token; None means zeros.
        resets: (b, l) True where a new segment starts: the state (also h0) is discarded before
            that token, NaN and infinity included, so sequences packed into one row give what each
            gives alone. Or None.
        method: how to compute it.
            "sequential": one step after another.
            "chunked": a tree over the steps of a chunk, one chunk after another.
            "associative": one tree over the whole sequence, O(log l) deep. It holds several arrays
            of shape (b, l, d, n), and JAX differentiates it.
            "pallas": one kernel for a GPU or a TPU (``mamba.pallas``), interpreted elsewhere.
            "auto": "sequential" on a CPU, the fastest there at every length and width that
            ``benchmarks/scan.py`` measures; "chunked" elsewhere.
        chunk: T, the number of tokens between two kept states: 16 for "sequential", 64 for
            "chunked" by default. The other methods do not take it.
        return_state: also return the state after the last token.

    Returns:
        y: (b, l, d) in x's dtype; with ``return_state``, (y, h), h: (b, d, n) in float32.

    All methods but "associative" have a backward pass of their own, which keeps one state per chunk
    and recomputes the others: memory O(b·l·d + (l/T)·b·d·n). Every method is differentiable in
    reverse mode in every floating-point argument and through both results; twice as well, except
    "pallas". Forward mode (jvp, jacfwd, hessian) needs "associative": JAX refuses it for a backward
    pass that is given by hand. For a Hessian, use jacrev(jacrev(f)).

    Raises:
        ValueError: shapes that do not fit, a size of 0, an unknown method, or a chunk that the
            method does not take.
        TypeError: what is no array, no floating-point numbers, or resets that are not bool.
    """
    check_axes(x=(x, "b l d"), A=(A, "d n"))
    (b, l, d), n = x.shape, A.shape[1]
    shapes = {"x": (b, l, d), "delta": (b, l, d), "A": (d, n), "B": (b, l, n), "C": (b, l, n)}
    shapes |= {"D": (d,), "z": (b, l, d), "h0": (b, d, n), "resets": (b, l)}
    check_shapes(shapes, x=x, delta=delta, A=A, B=B, C=C, D=D, z=z, h0=h0, resets=resets)
    method, chunk = _choose(method, chunk)

    dtype = x.dtype
    x, delta, A, B, C, D = (jnp.asarray(v, jnp.float32) for v in (x, delta, A, B, C, D))
    z = None if z is None else jnp.asarray(z, jnp.float32)
    h0 = jnp.zeros((b, d, n), jnp.float32) if h0 is None else jnp.asarray(h0, jnp.float32)
    arrays = vary_alike(x, delta, A, B, C, D, z, h0, resets)
    x, delta, A, B, C, D, z, h0, resets = arrays

    if l == 1:
        y, h = one_step(x, delta, A, B, C, h0, resets)  # (b, 1, d), (b, d, n)
    else:
        # Inside, channels lie next to each other in memory: one instruction serves many of them.
        A, h0 = A.T, h0.transpose(0, 2, 1)  # (n, d), (b, n, d)
        if method == "pallas":
            from mamba.pallas import pallas_scan  # imports Pallas, which only this method needs

            y, h = pallas_scan(x, delta, A, B, C, D, z, h0, resets)  # (b, l, d), (b, n, d)
        elif method == "associative":
            y, h = associative(x, delta, A, B, C, h0, resets)  # (b, l, d), (b, n, d)
        else:
            in_chunk = tree if method == "chunked" else None
            y, h = chunked_scan(in_chunk, chunk, x, delta, A, B, C, h0, resets)
        h = h.transpose(0, 2, 1)  # (b, d, n)
    if l == 1 or method != "pallas":  # the kernel adds D x and gates by itself
        y = y + D * x
        y = y if z is None else y * jax.nn.silu(z)
    y = y.astype(dtype)
    return (y, h) if return_state else y


def combine(left, right):
    """Compose two steps of h ↦ a h + b, the earlier one on the left.

        (a, b) ∘ (a′, b′) = (a a′, a′ b + b′)

    since a′ (a h + b) + b′ = (a a′) h + (a′ b + b′). Associative, so any bracketing of a sequence
    of steps gives the same map; not commutative: time has a direction. Elementwise on arrays.
    Source: Blelloch (1990), §1.4.1.
    """
    a, b = left
    a_next, b_next = right
    return a * a_next, a_next * b + b_next


def combine_segments(left, right):
    """``combine`` for steps (a, b, r), where r says whether a new segment starts in them.

    A segment does not see what lies before it: a and b of the left are replaced by 0, not
    multiplied with 0, so that NaN and infinity do not get through.
    """
    *earlier, r = left
    *later, r_next = right
    earlier = [jnp.where(r_next, 0.0, v) for v in earlier]
    return *combine(earlier, later), r | r_next


def tree(a, b, resets=None, *, axis=0, reverse=False):
    """All states of h_t = a_t h_{t−1} + b_t from h = 0, in O(log l) levels of ``combine``.

    Args:
        a: what a step keeps of the state, time along ``axis``.
        b: what it adds; the same shape.
        resets: bool, True where the state before a step is discarded: the axes of a up to time,
            or None.
        axis: of time.
        reverse: time runs from the end.
    """
    if resets is None:
        return jax.lax.associative_scan(combine, (a, b), axis=axis, reverse=reverse)[1]
    resets = resets.reshape(*resets.shape, *[1] * (a.ndim - resets.ndim))  # as a, to broadcast
    steps = (a, b, resets)
    return jax.lax.associative_scan(combine_segments, steps, axis=axis, reverse=reverse)[1]


def associative(x, delta, A, B, C, h0, resets):
    """The whole sequence as one tree. Several (b, l, n, d) arrays are in memory at once.

    x, delta: (b, l, d), A: (n, d), B, C: (b, l, n), h0: (b, n, d), resets: (b, l) or None
    -> h C: (b, l, d), the last state: (b, n, d)
    """
    a = decay(delta, A)  # (b, l, n, d)
    b = outer(B, delta * x)  # (b, l, n, d)
    first = None if resets is None else resets[:, 0]  # (b,)
    b = b.at[:, 0].add(a[:, 0] * discard(h0, first))  # the first step also carries the state
    h = tree(a, b, resets, axis=1)  # (b, l, n, d)
    return jnp.einsum("blnd,bln->bld", h, C), h[:, -1]  # (b, l, d), (b, n, d)


def one_step(x, delta, A, B, C, h0, resets):
    """A sequence of one token, as in generation: no loop.

    The state stays (b, d, n): to turn it into (b, n, d) and back takes longer than the step.
    x, delta: (b, 1, d), A: (d, n), B, C: (b, 1, n), h0: (b, d, n), resets: (b, 1) or None
    -> h C: (b, 1, d), the next state: (b, d, n)
    """
    a = jnp.exp(delta[:, 0, :, None] * A)  # (b, d, n)
    first = None if resets is None else resets[:, 0]  # (b,)
    h = a * discard(h0, first) + outer((delta * x)[:, 0], B[:, 0])  # (b, d, n): u ⊗ B, d first
    return jnp.einsum("bdn,bln->bld", h, C), h


def _choose(method, chunk):
    """The method that "auto" stands for, and T."""
    if method == "auto":
        method = "sequential" if jax.default_backend() == "cpu" else "chunked"
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}: expected 'auto' or one of {sorted(METHODS)}")
    if chunk is None:
        return method, CHUNKS.get(method)
    if method not in CHUNKS:
        raise ValueError(f"method {method!r} takes no chunk: only {' and '.join(CHUNKS)} do")
    return method, check_chunk(chunk)
