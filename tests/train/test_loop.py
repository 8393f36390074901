"""The training loop: it learns, it follows the gradient, and it stops where it should."""

import math
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mamba import Mamba, MambaConfig
from mamba.interrupts import Terminated, defer_interrupt
from mamba.train import loop
from mamba.train.devices import row_mesh
from mamba.train.loop import TrainState, train, train_step
from mamba.train.metrics import evaluate
from mamba.train.optimizer import make_optimizer
from mamba.train.tasks import Batch
from tests.helpers.training import (
    MODEL,
    MODEL_2,
    MODEL_3,
    OPTIMIZER,
    SIZES,
    STEPS,
    assert_same,
    before_batch,
    crash,
    data,
    noting,
    run,
)

# --- what a step does ---------------------------------------------------------------------------


def test_it_learns():
    """One token, one of noise, and the token again: from chance, 1 in 6, to always."""

    def easy(step):
        token = np.random.default_rng(step).integers(1, 7, 16, np.int32)
        tokens = np.stack([token, 0 * token, 0 * token + 7], axis=1)  # (16, 3)
        targets = np.stack([0 * token, 0 * token, token], axis=1)
        return Batch(tokens, targets, targets > 0)

    trained = train(MODEL, easy, make_optimizer(3e-2, 60, warmup=5), 60, progress=False)
    assert trained.curve[:4, 1].mean() < 0.5 and (trained.curve[-20:, 1] == 1).all()
    assert trained.curve[0, 0] > 0.9 * math.log(6) and trained.curve[-20:, 0].max() < 0.1


def test_the_curves(whole):
    assert whole.curve.shape == (STEPS, 2) and (whole.curve[:, 0] > 0).all()
    assert whole.held_out[:, 0].tolist() == [12, 24, 30]
    loss, accuracy = evaluate(MODEL, whole.params, [data(1000)])
    assert whole.held_out[-1, 1:].tolist() == pytest.approx([loss, accuracy], rel=1e-6)
    assert whole.seconds > 0


def test_steps_follow_the_gradient_of_the_mean_over_the_scored_positions(whole):
    """Two steps, the first of them with a rate of 0, from the loss and AdamW written out."""

    @jax.jit
    def one_step(params, state, batch):
        def mean_loss(params):
            log_p = jax.nn.log_softmax(MODEL.apply({"params": params}, batch.tokens))
            return -log_p[jnp.arange(8)[:, None], jnp.arange(8), batch.targets][:, 6:].mean()

        loss, gradient = jax.value_and_grad(mean_loss)(params)
        updates, state = OPTIMIZER.update(gradient, state, params)
        return loss, optax.apply_updates(params, updates), state

    params = run(steps=0, held_out=()).params  # as they are initialized
    state = OPTIMIZER.init(params)
    for step in range(2):
        loss, params, state = one_step(params, state, data(step))
        assert whole.curve[step, 0] == pytest.approx(float(loss), rel=1e-5)
    actual = run(steps=2, held_out=()).params
    for p, q in zip(*map(jax.tree.leaves, (actual, params)), strict=True):
        assert np.allclose(p, q, rtol=1e-4, atol=1e-6)


def test_bfloat16(whole):
    model = Mamba(MambaConfig(**SIZES, dtype=jnp.bfloat16))
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    assert {p.dtype for p in jax.tree.leaves(shapes)} == {np.dtype(np.float32)}
    mesh = row_mesh(8)
    state = TrainState(jnp.int32(0), whole.params, OPTIMIZER.init(whole.params), None)
    state = jax.device_put(state, NamedSharding(mesh, P()))
    for step in range(2):
        state, metrics = train_step(model, OPTIMIZER, mesh, state, data(step))
        assert np.isfinite(metrics).all()
    assert {p.dtype for p in jax.tree.leaves(state.params)} == {np.dtype(np.float32)}
    assert int(state.step) == 2


@pytest.mark.parametrize("model", [MODEL_2, MODEL_3], ids=["mamba2", "mamba3"])
def test_another_generation_learns_and_is_resumed_bit_for_bit(tmp_path, model):
    whole = run(model=model, carry=True)
    assert whole.curve[-5:, 0].mean() < whole.curve[:5, 0].mean()
    with pytest.raises(RuntimeError, match="the power is off"):
        run(before_batch(10, crash), folder=tmp_path, model=model, carry=True)
    assert_same(run(folder=tmp_path, model=model, carry=True, resume=True), whole)


def test_some_rows_continue():
    """A function says which: all or none of them, as True and False; and each row by itself."""
    none, every = np.zeros(8, bool), np.ones(8, bool)
    for rows, carry in ((none, False), (every, True)):
        assert_same(run(steps=3, carry=lambda step, rows=rows: rows), run(steps=3, carry=carry))
    one = run(steps=3, carry=lambda step: np.arange(8) == 2 * step)
    curves = [run(steps=3, carry=carry).curve for carry in (True, False)]
    assert not any(np.array_equal(one.curve, curve) for curve in curves)


# --- where it stops -----------------------------------------------------------------------------


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.usefixtures("heeded")
def test_a_signal_saves_after_the_step(whole, tmp_path, number):
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt) as caught:
        run(before_batch(9, lambda: signal.raise_signal(number)), folder=tmp_path)
    assert isinstance(caught.value, Terminated) == (number == signal.SIGTERM)
    assert signal.getsignal(number) is before
    resumed = run(before_batch(9, crash), folder=tmp_path, resume=True)  # step 9 was taken
    assert_same(resumed, whole)


@pytest.mark.usefixtures("heeded")
def test_ctrl_c_during_an_evaluation_saves_too(whole, tmp_path, monkeypatch):
    """After 12 steps, which are not a multiple of ``save_every``."""

    def interrupted(*args):
        interrupt()
        return evaluate(*args)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "evaluate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(folder=tmp_path)
    resumed = run(before_batch(11, crash), folder=tmp_path, resume=True)
    assert_same(resumed, whole)


@pytest.mark.usefixtures("heeded")
def test_ctrl_c_twice_and_where_it_is_ignored():
    with pytest.raises(KeyboardInterrupt), defer_interrupt() as interrupts:
        signal.raise_signal(signal.SIGINT)
        assert [type(interrupt) for interrupt in interrupts] == [KeyboardInterrupt]
        signal.raise_signal(signal.SIGINT)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with defer_interrupt() as interrupts:
            signal.raise_signal(signal.SIGINT)
        assert not interrupts and signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_nan_stops_with_step_and_norm(tmp_path):
    def bad(step):  # an id outside the vocabulary: NaN
        batch = data(step)
        return batch._replace(tokens=batch.tokens + 99) if step == 9 else batch

    with pytest.raises(FloatingPointError, match="step 10: the loss is nan and the norm of the"):
        run(bad, folder=tmp_path)
    taken = []
    with pytest.raises(FloatingPointError, match="step 10"):
        run(noting(taken, bad), folder=tmp_path, resume=True, held_out=())
    assert 7 not in taken and 8 in taken  # the last save, of 8 steps, is a good one


def test_progress_is_shown_and_can_be_hidden(capsys):
    run(steps=11, held_out=(), progress=True)
    assert "11/11" in (shown := capsys.readouterr().err)
    assert "loss=" in shown and "accuracy=" in shown
    run(steps=11, held_out=())
    assert capsys.readouterr().err == ""
