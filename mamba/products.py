"""Matrix products for a few rows: what one step of decoding a small batch consists of.

With few rows, the kernel is all there is to read, and a product can take no less time than that.
One row does: XLA's loop on a CPU reads as fast as the memory gives. For 2 … 8 rows it calls a
library that first copies the kernel into an order that suits many rows, and that takes longer than
reading. As a batch of small products, which another library takes as they are, it does not. For
other numbers of rows, and where the backend is no CPU, these are the plain products.
"""

import jax
import jax.numpy as jnp

__all__ = ["dot_general", "dot_rows"]

FEW = range(2, 9)  # rows
PIECE = 16  # rows of the kernel in one small product
PARTS = 8  # of a table, a small product each
LARGEST = 2**14  # numbers in a result that XLA still sums while it makes them: beyond, it is slow


def dot_general(x, kernel, dimension_numbers, precision=None, preferred_element_type=None):
    """x (..., k) · kernel (k, m) -> (..., m), as ``jax.lax.dot_general``: for ``flax.linen.Dense``.

    Few rows: Σ_c x_c · kernel_c, where x_c (r, 16) and kernel_c (16, m) are the c-th pieces of k.
    """
    k, m = kernel.shape
    rows = x.reshape(-1, k)  # (r, k)
    groups = -(-len(rows) * m // LARGEST)
    if not _few(rows) or k % PIECE or groups > 2:
        return jax.lax.dot_general(x, kernel, dimension_numbers, precision, preferred_element_type)
    kernel = kernel.reshape(-1, PIECE, m)  # (c, 16, m)

    def few(rows):
        pieces = rows.reshape(len(rows), -1, PIECE)  # (r, c, 16)
        y = jnp.einsum("rck,ckm->crm", pieces, kernel, preferred_element_type=jnp.float32)
        return y.sum(0)  # (r, m)

    y = jnp.concatenate([few(group) for group in jnp.array_split(rows, groups)])  # (r, m)
    return y.reshape(*x.shape[:-1], m).astype(preferred_element_type or x.dtype)


def dot_rows(x, table):
    """x (r, k) · table (v, k)ᵀ -> (r, v) in float32: every row of x with every row of the table.

    Few rows: a part of the table at a time. Otherwise the table is read as it lies, which on a CPU
    is twice as fast as x · tableᵀ.
    """
    v, k = table.shape
    if not _few(x) or v % PARTS:
        return jnp.dot(table, x.T, preferred_element_type=jnp.float32).T  # (r, v)
    x, table = jnp.broadcast_to(x, (PARTS, *x.shape)), table.reshape(PARTS, -1, k)
    y = jnp.einsum("prk,pvk->rpv", x, table, preferred_element_type=jnp.float32)
    return y.reshape(-1, v)  # (r, v)


def _few(rows):
    return len(rows) in FEW and jax.default_backend() == "cpu"
