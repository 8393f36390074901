"""The selective scan: a linear recurrence whose coefficients depend on the input.

    h_t = exp(Δ_t A) h_{t−1} + Δ_t B_t x_t,    y_t = C_t h_t + D x_t,    then y_t · silu(z_t)

for each of b·d channels with n states apiece (Mamba, Gu & Dao 2023, §3.2 and Algorithm 2, with the
released code's discretization: ``mamba.discretize.mixed_diag``). Pure functions of arrays.

Inside, the state is kept as (b, n, d): the channels lie next to each other in memory, so that one
vector instruction serves many of them and the sum over n is a contraction. The public layout is the
field's, (b, d, n).
"""

import math
from functools import partial

import jax
import jax.numpy as jnp

__all__ = ["combine", "selective_scan"]


def selective_scan(
    x, delta, A, B, C, D, *, z=None, h0=None, resets=None, method="auto", return_state=False
):
    """Run the selective state space model over a sequence.

        h_t = exp(Δ_t A) ⊙ h_{t−1} + (Δ_t x_t) ⊗ B_t
        y_t = h_t C_t + D ⊙ x_t;    with a gate z, y_t ← y_t ⊙ silu(z_t)

    Arguments, computed in float32 whatever their dtype:
      x: (b, l, d) input, l ≥ 1.   delta: (b, l, d) time steps Δ > 0, softplus and bias already
      applied (0 passes the state through unchanged).   A: (d, n), real and negative, rates in 1/Δ.
      B, C: (b, l, n).   D: (d,).   z: (b, l, d) gate, or None.   h0: (b, d, n) state before the
      first token, zeros if None.   resets: (b, l) bool, or None: True where a new piece starts.
      The state, h0 too, is discarded before that token, so that several sequences packed into one
      row give what each gives alone.
      method:
        "sequential"   one step after the other, in chunks of T = 16 for the backward pass below.
        "chunked"      a tree inside a chunk, chunk after chunk; T = 64. Not fast on a CPU.
        "associative"  the textbook's tree over the whole sequence, O(log l) deep. It holds
                       (b, l, d, n) several times over, and JAX differentiates it.
        "pallas"       one kernel for a GPU or a TPU (mamba.kernel), never run on either so far.
        "auto"         on a CPU "sequential", the fastest there at every length and width that
                       benchmarks/scan.py measured; elsewhere "chunked": not measured there.
      return_state: also return the state after the last token.

    All but "associative" have a backward pass of their own that keeps one state per chunk and
    recomputes the others: O(b·l·d + (l/T)·b·d·n) memory. A single token takes none of them.

    Returns y: (b, l, d) in x's dtype; with return_state, (y, h) with h: (b, d, n) in float32.
    Differentiable in reverse mode in every floating-point argument and through both results; twice
    too, but for "pallas". Forward mode (jvp, jacfwd, hessian) works with "associative" alone: JAX
    refuses it where a backward pass is given by hand. For a Hessian, jacrev(jacrev(f)).
    Raises ValueError for shapes that do not fit, resets that are not bool, an empty sequence or an
    unknown method.
    """
    _check_shapes(x, delta, A, B, C, D, z, h0, resets)
    if method == "auto":
        method = "sequential" if jax.default_backend() == "cpu" else "chunked"
    if method not in (known := [*_METHODS, "pallas"]):
        raise ValueError(f"unknown method {method!r}: expected 'auto' or one of {sorted(known)}")

    dtype = x.dtype
    x, delta, A, B, C, D = (jnp.asarray(v, jnp.float32) for v in (x, delta, A, B, C, D))
    z = None if z is None else jnp.asarray(z, jnp.float32)
    b, l, d = x.shape
    h0 = jnp.zeros((b, *A.shape), jnp.float32) if h0 is None else jnp.asarray(h0, jnp.float32)

    if l == 1:  # one token, while generating
        y, h = _one_step(x, delta, A, B, C, h0, resets)  # (b, 1, d), (b, d, n)
    else:
        A, h0 = A.T, h0.transpose(0, 2, 1)  # (n, d), (b, n, d)
        if method == "pallas":
            from mamba.kernel import pallas_scan  # imports Pallas, which only this method needs

            y, h = pallas_scan(x, delta, A, B, C, D, z, h0, resets)  # (b, l, d), (b, n, d)
        else:
            y, h = _METHODS[method](x, delta, A, B, C, h0, resets)  # (b, l, d), (b, n, d)
        h = h.transpose(0, 2, 1)  # (b, d, n)
    if l == 1 or method != "pallas":  # that one does the rest itself
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


def _decay(delta, A, resets):
    """exp(Δ A), or 0 where the state starts anew: how much of the last state a step takes over.

    delta: (..., d), A: (n, d), resets: (...) bool, or None -> (..., n, d)
    """
    decay = jnp.exp(delta[..., None, :] * A)
    return decay if resets is None else jnp.where(resets[..., None, None], 0.0, decay)


def _outer(B, u):
    """(..., n), (..., d) -> (..., n, d), or with the two exchanged."""
    return B[..., None] * u[..., None, :]


# --- one token ----------------------------------------------------------------------------------


def _one_step(x, delta, A, B, C, h0, resets):
    """A sequence of one token: no loop, and the state stays (b, d, n). To turn it into (b, n, d)
    and back would take longer than the step. -> y: (b, 1, d), the next state: (b, d, n)."""
    decay = jnp.exp(delta[:, 0, :, None] * A)  # (b, d, n)
    if resets is not None:
        decay = jnp.where(resets[:, :, None], 0.0, decay)
    h = decay * h0 + _outer((delta * x)[:, 0], B[:, 0])  # (b, d, n)
    return jnp.einsum("bdn,bln->bld", h, C), h


# --- the whole sequence as one tree -------------------------------------------------------------


def _associative(x, delta, A, B, C, h0, resets):
    """All prefixes at once, in O(log l) levels; holds (b, l, n, d) numbers several times over."""
    a = _decay(delta, A, resets)  # (b, l, n, d)
    b = _outer(B, delta * x)  # (b, l, n, d)
    b = b.at[:, 0].add(a[:, 0] * h0)  # the first step also carries the initial state
    _, h = jax.lax.associative_scan(combine, (a, b), axis=1)  # (b, l, n, d)
    return jnp.einsum("blnd,bln->bld", h, C), h[:, -1]  # (b, l, d), (b, n, d)


# --- the states inside one chunk ----------------------------------------------------------------
#
# Both recurrences below have one form, an outer product added to what is left of the last one:
#
#     states      h_t = a_t h_{t−1} + B_t ⊗ u_t        forwards in time, u_t = Δ_t x_t
#     gradients   g_t = a_{t+1} g_{t+1} + C_t ⊗ ∂y_t   backwards, g_t = ∂loss/∂h_t
#
# One row of the batch, T steps: a: (T, n, d), B and C: (T, n), u and ∂y: (T, d). h: (n, d) is the
# state before the chunk, g: (n, d) the gradient that comes from after it, a_{t+1} included. `out`
# is an array to overwrite: clearing a new one for every chunk would cost as much as the loop.


def _states_loop(a, B, u, h, out):
    """-> all T states, one after the other: (T, n, d)."""

    def step(t, carry):
        h, out = carry
        h = a[t] * h + _outer(B[t], u[t])  # (n, d)
        return h, out.at[t].set(h)

    return jax.lax.fori_loop(0, len(a), step, (h, out))[1]


def _gradients_loop(a, C, dy, g, out):
    """-> all T gradients (T, n, d), and what goes on to the chunk before (n, d)."""

    def put(t, g, out):
        g = g + _outer(C[t], dy[t])  # (n, d)
        return g, out.at[t].set(g)

    def step(i, carry):
        t = len(a) - 2 - i
        g, out = carry
        return put(t, a[t + 1] * g, out)  # one array a step: g is what `out` holds

    g, out = jax.lax.fori_loop(0, len(a) - 1, step, put(len(a) - 1, g, out))
    return out, g * a[0]


def _states_tree(a, B, u, h, out):
    """As `_states_loop`, all steps at once."""
    b = _outer(B, u).at[0].add(a[0] * h)  # (T, n, d)
    return jax.lax.associative_scan(combine, (a, b))[1]


def _gradients_tree(a, C, dy, g, out):
    """As `_gradients_loop`, all steps at once: the same tree, read from the end."""
    a_next = jnp.concatenate([a[1:], jnp.ones_like(a[:1])])  # (T, n, d); g has its a already
    b = _outer(C, dy).at[-1].add(g)  # (T, n, d)
    gs = jax.lax.associative_scan(combine, (a_next, b), reverse=True)[1]
    return gs, gs[0] * a[0]


# --- chunk after chunk, with a backward pass of its own -----------------------------------------


def _pad(v, T):
    """(b, l, ...) -> the same with zeros after it, to whole chunks: Δ = 0 changes no state."""
    return jnp.pad(v, ((0, 0), (0, -v.shape[1] % T), *((0, 0) for _ in v.shape[2:])))


def _to_chunks(v, T):
    """(b, l, ...) -> (b, l / T, T, ...), padded."""
    return _pad(v, T).reshape(len(v), -1, T, *v.shape[2:])


def _from_chunks(v, l):
    """(b, l / T, T, k) -> (b, l, k), the inverse of `_to_chunks`."""
    return v.reshape(v.shape[0], -1, v.shape[3])[:, :l]


def _forward_loop(T, x, delta, A, B, C, h0, resets):
    """-> y: (b, l, d), the last state: (b, n, d), and every chunk's first: (b, l / T, n, d).

    Step by step for all rows at once: no state is written down but those.
    """

    inputs = jax.tree.map(lambda v: _pad(v, T), (x, delta, B, C, resets))

    def step(h, t):
        x_t, delta_t, B_t, C_t, resets_t = jax.tree.map(
            lambda v: jax.lax.dynamic_index_in_dim(v, t, axis=1, keepdims=False), inputs
        )  # read where they lie: with the time in front, as lax.scan takes it, they would be copied
        h = _decay(delta_t, A, resets_t) * h + _outer(B_t, delta_t * x_t)  # (b, n, d)
        return h, jnp.einsum("bnd,bn->bd", h, C_t)

    def chunk(h, start):
        h_next, y = jax.lax.scan(step, h, start + jnp.arange(T))
        return h_next, (y, h)

    l = x.shape[1]
    h, (y, starts) = jax.lax.scan(chunk, h0, jnp.arange(0, l, T))  # y: (l / T, T, b, d)
    return _from_chunks(jnp.moveaxis(y, 2, 0), l), h, starts.swapaxes(0, 1)


def _forward_tree(T, x, delta, A, B, C, h0, resets):
    """As `_forward_loop`, a chunk at a time."""

    def chunk(h, inputs):
        x_c, delta_c, B_c, C_c, resets_c = inputs
        hs = _states_tree(_decay(delta_c, A, resets_c), B_c, delta_c * x_c, h, None)  # (T, n, d)
        return hs[-1], (jnp.einsum("tnd,tn->td", hs, C_c), h)

    chunks = jax.tree.map(lambda v: _to_chunks(v, T), (x, delta, B, C, resets))
    h, (y, starts) = jax.vmap(partial(jax.lax.scan, chunk))(h0, chunks)
    return _from_chunks(y, x.shape[1]), h, starts


# Length of a chunk; forward pass; states and gradients in the backward pass; and how many channels
# that takes together: so few rows of the batch that their chunks stay in a CPU's cache, or all.
_CHUNKED = {
    "sequential": (16, _forward_loop, _states_loop, _gradients_loop, 1024),
    "chunked": (64, _forward_tree, _states_tree, _gradients_tree, math.inf),
}


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _in_chunks(method, x, delta, A, B, C, h0, resets):
    """The recurrence, keeping nothing for the backward pass but one state per chunk."""
    return _in_chunks_forward(method, x, delta, A, B, C, h0, resets)[0]


def _in_chunks_forward(method, x, delta, A, B, C, h0, resets):
    T, forward, *_ = _CHUNKED[method]
    y, h, starts = forward(min(T, x.shape[1]), x, delta, A, B, C, h0, resets)
    return (y, h), (x, delta, A, B, C, resets, starts)


def _in_chunks_backward(method, saved, cotangents):
    """The adjoint recurrence runs backwards in time: with g_t = ∂loss/∂h_t,

        g_t = C_t ⊗ ∂y_t + exp(Δ_{t+1} A) ⊙ g_{t+1}

    and every gradient is a contraction of g_t with what the step used. Chunk by chunk from the end:
    the states inside the chunk are recomputed from its first, then g passes through it in reverse.
    """
    T, _, states, gradients, channels = _CHUNKED[method]
    x, delta, A, B, C, resets, starts = saved
    T = min(T, x.shape[1])
    dy, g_last = cotangents  # (b, l, d), (b, n, d)

    def chunk(carry, inputs):
        g, dA, h, gs = carry
        (x_c, delta_c, B_c, C_c, dy_c, resets_c), start = inputs
        u = delta_c * x_c  # (T, d)
        a = _decay(delta_c, A, resets_c)  # (T, n, d)
        h = states(a, B_c, u, start, h)  # (T, n, d)
        gs, g = gradients(a, C_c, dy_c, g, gs)  # (T, n, d), (n, d)
        dB, dC = jnp.einsum("tnd,td->tn", gs, u), jnp.einsum("tnd,td->tn", h, dy_c)  # (T, n)
        du = jnp.einsum("tnd,tn->td", gs, B_c)  # (T, d)
        # The gradient of the exponent Δ_t A is g_t a_t h_{t−1} = g_t (h_t − B_t ⊗ u_t). Its sums
        # over n and over t are written out: XLA's own are several times slower on a CPU.
        ddelta = du * x_c + sum(
            gs[:, i] * (h[:, i] - B_c[:, i, None] * u) * A[i] for i in range(len(A))
        )  # (T, d)
        dA = jax.lax.fori_loop(
            0, T, lambda t, s: s + gs[t] * (h[t] - _outer(B_c[t], u[t])) * delta_c[t], dA
        )  # (n, d)
        return (g, dA, h, gs), (du * delta_c, ddelta, dB, dC)

    def row(inputs):
        chunks, starts, g = inputs
        empty = jnp.zeros((T, *A.shape), A.dtype)
        carry = (g, jnp.zeros_like(A), empty, empty)
        (g, dA, _, _), grads = jax.lax.scan(chunk, carry, (chunks, starts), reverse=True)
        return g, dA, grads

    chunks = jax.tree.map(lambda v: _to_chunks(v, T), (x, delta, B, C, dy, resets))
    rows = int(min(len(x), channels // x.shape[2]))
    dh0, dA, grads = jax.lax.map(
        row, (chunks, starts, g_last), batch_size=rows if rows > 1 else None
    )
    dx, ddelta, dB, dC = (_from_chunks(v, x.shape[1]) for v in grads)
    return dx, ddelta, dA.sum(0), dB, dC, dh0, None


_in_chunks.defvjp(_in_chunks_forward, _in_chunks_backward)

_METHODS = {name: partial(_in_chunks, name) for name in _CHUNKED} | {"associative": _associative}


def _check_shapes(x, delta, A, B, C, D, z, h0, resets):
    if x.ndim != 3 or x.shape[1] < 1:
        raise ValueError(f"x must have shape (b, l, d) with l >= 1, got {x.shape}")
    if A.ndim != 2:
        raise ValueError(f"A must have shape (d, n), got {A.shape}")
    (b, l, d), n = x.shape, A.shape[1]
    expected = {
        "delta": (delta, (b, l, d)),
        "A": (A, (d, n)),
        "B": (B, (b, l, n)),
        "C": (C, (b, l, n)),
        "D": (D, (d,)),
        "z": (z, (b, l, d)),
        "h0": (h0, (b, d, n)),
        "resets": (resets, (b, l)),
    }
    for name, (value, shape) in expected.items():
        if value is not None and value.shape != shape:
            raise ValueError(
                f"{name} must have shape {shape} to fit x {x.shape}, got {value.shape}"
            )
    if resets is not None and resets.dtype != bool:
        raise ValueError(f"resets must be bool, True where a new piece starts, got {resets.dtype}")
