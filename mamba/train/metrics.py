"""What is measured on a batch, in training and on held-out sequences: loss and accuracy."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mamba.train.devices import row_mesh

__all__ = ["evaluate", "masked_loss_sums"]


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


def evaluate(model, params, batches, *, chunk=4096):
    """Mean loss and accuracy over all scored positions of the batches.

    Args:
        model: a ``Mamba``.
        params: its parameters.
        batches: a list of ``tasks.Batch``, of any lengths.
        chunk: the number of tokens read at once. A longer sequence is read in chunks, each from the
            state after the one before, so that memory does not grow with the length.

    Returns:
        loss in nats, accuracy in 0 … 1.

    Raises:
        ValueError: the batches have no scored position.
    """
    sums = np.zeros(3)  # nats, correct, scored
    for batch in batches:
        rows, length = batch.tokens.shape
        mesh = row_mesh(rows)
        by_row = NamedSharding(mesh, P("rows"))
        copied_params = jax.device_put(params, NamedSharding(mesh, P()))
        batch = jax.tree.map(np.asarray, batch)
        state = jax.device_put(model.initial_state(rows), by_row)
        for start in range(0, length, chunk):
            part = jax.tree.map(lambda v, start=start: v[:, start : start + chunk], batch)
            part = jax.device_put(part, by_row)
            part_sums, state = _read_chunk(model, copied_params, state, part)
            sums += np.asarray(part_sums)
    nats, correct, scored = sums
    if not scored:
        raise ValueError("the batches have no scored position (mask is False everywhere)")
    return float(nats / scored), float(correct / scored)


@partial(jax.jit, static_argnames=("model",))
def _read_chunk(model, params, state, batch):
    logits, state = model.apply({"params": params}, batch.tokens, state)
    return masked_loss_sums(logits, batch), state
