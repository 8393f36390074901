"""What is measured on a batch, in training and on held-out sequences: loss and accuracy."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mamba.parallel import apply_on_mesh, parameter_shardings
from mamba.train.devices import row_mesh, spread

__all__ = ["evaluate", "masked_loss_sums"]

WINDOW = 8  # tokens that each device has at least: more than a convolution's window


def masked_loss_sums(logits, batch):
    """Summed cross-entropy (nats), number correct, number of scored positions.

    The scored positions are those where ``batch.mask`` is True. The mean loss is the first sum over
    the third.
    logits: (b, l, vocab), batch: a ``tasks.Batch`` of (b, l) -> (3,) float32
    """
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, batch.targets)  # (b, l)
    correct = logits.argmax(axis=-1) == batch.targets  # (b, l)
    values = (nats, correct, batch.mask)
    return jnp.stack([jnp.where(batch.mask, v, 0).sum() for v in values]).astype(jnp.float32)


def evaluate(model, params, batches, mesh=None, *, chunk=4096):
    """Mean loss and accuracy over all scored positions of the batches.

    Args:
        model: a ``Mamba``.
        params: its parameters.
        batches: a list of ``tasks.Batch``, of any lengths.
        mesh: from ``make_mesh``; None: as many devices as can share the rows equally.
        chunk: the number of tokens read at once. A longer sequence is read in chunks, each from the
            state after the one before, so that memory does not grow with the length.

    Returns:
        loss in nats, accuracy in 0 … 1.

    Raises:
        ValueError: the batches have no scored position.
    """
    sums = np.zeros(3)  # nats, correct, scored
    for batch in batches:
        rows = len(batch.tokens)
        on = row_mesh(rows) if mesh is None else mesh
        unit = on.shape["sequence"] * (WINDOW if on.shape["sequence"] > 1 else 1)
        batch = _padded(jax.tree.map(np.asarray, batch), on.shape["data"], unit)
        rows, length = batch.tokens.shape
        laid_out = _lay_out(params, on)
        state = spread(jax.tree.map(np.asarray, model.initial_state(rows)), on, "data")
        width = -(-chunk // unit) * unit
        for start in range(0, length, width):
            read = slice(start, start + width)
            part = jax.tree.map(lambda v, read=read: v[:, read], batch)
            part = spread(part, on, "data", "sequence")
            part_sums, state = _read_chunk(model, on, laid_out, state, part)
            sums += np.asarray(part_sums)
    nats, correct, scored = sums
    if not scored:
        raise ValueError("the batches have no scored position (mask is False everywhere)")
    return float(nats / scored), float(correct / scored)


def _padded(batch, rows, length):
    """The batch with rows and tokens that are not scored, up to multiples of these numbers."""
    b, l = batch.tokens.shape
    return jax.tree.map(lambda v: np.pad(v, ((0, -b % rows), (0, -l % length))), batch)


def _lay_out(params, mesh):
    if jax.process_count() > 1 and not isinstance(jax.tree.leaves(params)[0], jax.Array):
        shardings = parameter_shardings(params, mesh)
        return jax.tree.map(lambda v, s: spread(v, mesh, *s.spec), params, shardings)
    return jax.device_put(params, parameter_shardings(params, mesh))


@partial(jax.jit, static_argnames=("model", "mesh"))
def _read_chunk(model, mesh, params, state, batch):
    logits, state = apply_on_mesh(model, mesh, params, batch.tokens, state)
    return masked_loss_sums(logits, batch), state
