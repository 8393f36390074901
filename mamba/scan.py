"""The selective scan: a linear recurrence whose coefficients depend on the input.

    h_t = exp(Δ_t A) h_{t−1} + Δ_t B_t x_t,    y_t = C_t h_t + D x_t,    then y_t · silu(z_t)

for each of b·d channels with n states apiece (Mamba, Gu & Dao 2023, §3.2 and Algorithm 2, with the
released code's discretization: ``mamba.discretize.mixed_diag``). Pure functions of arrays.

Inside, the state is kept as (b, n, d): the channels lie next to each other in memory, so that one
vector instruction serves many of them and the sum over n is a contraction. The public layout is the
field's, (b, d, n).
"""

import jax
import jax.numpy as jnp

__all__ = ["combine", "selective_scan"]

CHUNK = 16  # steps between two states that `_sequential` keeps for its backward pass


def selective_scan(x, delta, A, B, C, D, *, z=None, h0=None, method="auto", return_state=False):
    """Run the selective state space model over a sequence.

        h_t = exp(Δ_t A) ⊙ h_{t−1} + (Δ_t x_t) ⊗ B_t
        y_t = h_t C_t + D ⊙ x_t;    with a gate z, y_t ← y_t ⊙ silu(z_t)

    Arguments, computed in float32 whatever their dtype:
      x: (b, l, d) input, l ≥ 1.   delta: (b, l, d) time steps Δ > 0, softplus and bias already
      applied (0 passes the state through unchanged).   A: (d, n), real and negative, rates in 1/Δ.
      B, C: (b, l, n).   D: (d,).   z: (b, l, d) gate, or None.   h0: (b, d, n) state before the
      first token, zeros if None.
      method: "sequential" steps through time, keeping a state every 16 steps for its own backward
      pass and recomputing the others: O(b·l·d + b·l·d·n/16) memory. "associative" composes
      all steps in a tree of depth O(log l) and holds (b, l, d, n) in memory. "auto" takes
      "sequential" on a CPU and "associative" on accelerators (where neither was measured).
      return_state: also return the state after the last token.

    Returns y: (b, l, d) in x's dtype; with return_state, (y, h) with h: (b, d, n) in float32.
    Differentiable (reverse mode) in every array argument, h0 and the returned state included.
    Raises ValueError for shapes that do not fit, an empty sequence or an unknown method.
    """
    _check_shapes(x, delta, A, B, C, D, z, h0)
    if method == "auto":
        method = "sequential" if jax.default_backend() == "cpu" else "associative"
    if method not in _METHODS:
        raise ValueError(f"unknown method {method!r}: expected 'auto' or one of {sorted(_METHODS)}")

    dtype = x.dtype
    x, delta, A, B, C, D = (jnp.asarray(v, jnp.float32) for v in (x, delta, A, B, C, D))
    b, _, d = x.shape
    A = A.T  # (n, d)
    if h0 is None:
        h0 = jnp.zeros((b, *A.shape), jnp.float32)  # (b, n, d)
    else:
        h0 = jnp.asarray(h0, jnp.float32).transpose(0, 2, 1)  # (b, n, d)

    if x.shape[1] == 1:  # one token while generating: a loop of one step is only overhead
        h = _step(h0, x[:, 0], delta[:, 0], A, B[:, 0])  # (b, n, d)
        y = jnp.einsum("bnd,bn->bd", h, C[:, 0])[:, None]  # (b, 1, d)
    else:
        y, h = _METHODS[method](x, delta, A, B, C, h0)  # (b, l, d), (b, n, d)
    y = y + D * x
    if z is not None:
        y = y * jax.nn.silu(jnp.asarray(z, jnp.float32))
    y = y.astype(dtype)
    return (y, h.transpose(0, 2, 1)) if return_state else y


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


# --- parallel over time -------------------------------------------------------------------------


def _associative(x, delta, A, B, C, h0):
    """All prefixes at once, in O(log l) levels; holds (b, l, n, d) numbers several times over."""
    a = jnp.exp(delta[:, :, None] * A)  # (b, l, n, d)
    b = B[..., None] * (delta * x)[:, :, None]  # (b, l, n, d)
    b = b.at[:, 0].add(a[:, 0] * h0)  # the first step also carries the initial state
    _, h = jax.lax.associative_scan(combine, (a, b), axis=1)  # (b, l, n, d)
    return jnp.einsum("blnd,bln->bld", h, C), h[:, -1]  # (b, l, d), (b, n, d)


# --- one step after the other, with its own backward pass ---------------------------------------


def _step(h, x_t, delta_t, A, B_t):
    """h_t = exp(Δ_t A) ⊙ h_{t−1} + B_t ⊗ (Δ_t x_t).

    h: (b, n, d), x_t, delta_t: (b, d), A: (n, d), B_t: (b, n) -> (b, n, d)
    """
    return jnp.exp(delta_t[:, None] * A) * h + B_t[..., None] * (delta_t * x_t)[:, None]


def _to_chunks(v):
    """(b, l, k) -> (b, l / CHUNK, CHUNK, k), padded with zeros: Δ = 0 changes no state."""
    b, l, k = v.shape
    return jnp.pad(v, ((0, 0), (0, -l % CHUNK), (0, 0))).reshape(b, -1, CHUNK, k)


def _from_chunks(v, l):
    """(b, l / CHUNK, CHUNK, k) -> (b, l, k), the inverse of `_to_chunks`."""
    return v.reshape(v.shape[0], -1, v.shape[3])[:, :l]


def _forward(x, delta, A, B, C, h0):
    def step(h, inputs):
        x_t, delta_t, B_t, C_t = inputs
        h = _step(h, x_t, delta_t, A, B_t)  # (b, n, d)
        return h, jnp.einsum("bnd,bn->bd", h, C_t)

    def chunk(h, inputs):
        h_next, y = jax.lax.scan(step, h, inputs)
        return h_next, (y, h)

    chunks = tuple(_to_chunks(v).transpose(1, 2, 0, 3) for v in (x, delta, B, C))
    h, (y, starts) = jax.lax.scan(chunk, h0, chunks)
    y = _from_chunks(y.transpose(2, 0, 1, 3), x.shape[1])  # (b, l, d)
    return y, h, starts.swapaxes(0, 1)  # (b, l, d), (b, n, d), (b, l / CHUNK, n, d)


@jax.custom_vjp
def _sequential(x, delta, A, B, C, h0):
    """The recurrence as it is written. The backward pass below keeps one state per chunk only."""
    y, h, _ = _forward(x, delta, A, B, C, h0)
    return y, h


def _sequential_forward(x, delta, A, B, C, h0):
    y, h, starts = _forward(x, delta, A, B, C, h0)
    return (y, h), (x, delta, A, B, C, starts)


def _sequential_backward(saved, cotangents):
    """The adjoint recurrence runs backwards in time: with g_t = ∂loss/∂h_t,

        g_t = C_t ⊗ ∂y_t + exp(Δ_{t+1} A) ⊙ g_{t+1}

    and every gradient is a contraction of g_t with what the step used. Chunk by chunk from the end:
    the states inside the chunk are recomputed from its first, then g passes through it in reverse.
    """
    x, delta, A, B, C, starts = saved
    dy, g_last = cotangents  # (b, l, d), (b, n, d)

    def recompute(h, inputs):
        x_t, delta_t, B_t = inputs
        return jnp.exp(delta_t * A) * h + B_t[:, None] * (
            delta_t * x_t
        ), h  # the state before the step

    def step(carry, inputs):
        g, dA = carry  # g: gradient of the state after this step, without this step's own output
        x_t, delta_t, B_t, C_t, dy_t, h_before = inputs
        decay = jnp.exp(delta_t * A)  # (n, d)
        u = delta_t * x_t  # (d,)
        h = decay * h_before + B_t[:, None] * u  # (n, d)
        g = g + C_t[:, None] * dy_t  # (n, d)
        dC, dB = jnp.einsum("nd,d->n", h, dy_t), jnp.einsum("nd,d->n", g, u)  # (n,)
        du = jnp.einsum("nd,n->d", g, B_t)  # (d,)
        g_before = g * decay  # (n, d)
        dexponent = g_before * h_before  # (n, d): gradient of Δ_t A
        ddelta = jnp.einsum("nd,nd->d", dexponent, A) + du * x_t  # (d,)
        return (g_before, dA + dexponent * delta_t), (du * delta_t, ddelta, dB, dC)

    def chunk(carry, inputs):
        x_c, delta_c, B_c, C_c, dy_c, start = inputs
        _, before = jax.lax.scan(recompute, start, (x_c, delta_c, B_c))  # (CHUNK, n, d)
        return jax.lax.scan(step, carry, (x_c, delta_c, B_c, C_c, dy_c, before), reverse=True)

    def row(inputs):
        *chunks, g = inputs
        return jax.lax.scan(chunk, (g, jnp.zeros_like(A)), tuple(chunks), reverse=True)

    # One row of the batch after the other: what a chunk needs then stays in the cache.
    (dh0, dA), grads = jax.lax.map(row, (*map(_to_chunks, (x, delta, B, C, dy)), starts, g_last))
    dx, ddelta, dB, dC = (_from_chunks(v, x.shape[1]) for v in grads)
    return dx, ddelta, dA.sum(0), dB, dC, dh0


_sequential.defvjp(_sequential_forward, _sequential_backward)

_METHODS = {"sequential": _sequential, "associative": _associative}


def _check_shapes(x, delta, A, B, C, D, z, h0):
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
    }
    for name, (value, shape) in expected.items():
        if value is not None and value.shape != shape:
            raise ValueError(
                f"{name} must have shape {shape} to fit x {x.shape}, got {value.shape}"
            )
