"""Loss and accuracy, on one batch and on held-out sequences."""

import jax
import numpy as np
import pytest

from mamba.train.metrics import evaluate, masked_loss_sums
from mamba.train.tasks import Batch
from tests.helpers.training import MODEL, data


def test_masked_loss_sums():
    rng = np.random.default_rng(0)
    logits, targets = rng.normal(size=(3, 5, 7)), rng.integers(0, 7, (3, 5))
    mask = rng.random((3, 5)) < 0.5
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    nats = -np.take_along_axis(log_p, targets[..., None], -1)[..., 0]
    expected = [nats[mask].sum(), (logits.argmax(-1) == targets)[mask].sum(), mask.sum()]
    actual = jax.jit(masked_loss_sums)(np.float32(logits), Batch(None, targets, mask))
    assert np.allclose(actual, expected, rtol=1e-5)


@pytest.mark.parametrize("chunk", [3, 8])
def test_evaluation_in_chunks_is_evaluation(whole, chunk):
    """The answers lie in other chunks than the data: without the state, none would be known."""
    batches = [data(1001), data(1002)]

    @jax.jit
    def at_once(batch):
        return masked_loss_sums(MODEL.apply({"params": whole.params}, batch.tokens), batch)

    sums = sum(np.asarray(at_once(batch)) for batch in batches)
    expected = sums[0] / sums[2], sums[1] / sums[2]
    assert evaluate(MODEL, whole.params, batches, chunk=chunk) == pytest.approx(expected, rel=1e-5)


def test_nothing_to_evaluate(whole):
    batch = data(0)
    with pytest.raises(ValueError, match="the batches have no scored position"):
        evaluate(MODEL, whole.params, [batch._replace(mask=batch.mask & False)])
