"""The training loop: it learns, and nothing that happens to it changes the steps that it takes."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mamba import Mamba, MambaConfig, loop
from mamba.corpus import text_batches
from mamba.interrupts import _ctrl_c
from mamba.loop import SAVE, decayed, evaluate, make_optimizer, score, train
from mamba.tasks import Batch, copying, selective_copying

ROOT = Path(__file__).resolve().parents[1]
MODEL = Mamba(MambaConfig(d_model=8, n_layer=1, vocab_size=8, d_state=4))
STEPS = 30


def data(step):
    key = jax.random.fold_in(jax.random.key(1), step)
    return selective_copying(key, 8, 6, vocab_size=8, n_data=2)


def run(data=data, steps=STEPS, folder=None, **options):
    """A short run: the same compiled step in every test."""
    optimizer = make_optimizer(3e-3, STEPS, warmup=3)
    options = {"held_out": [data(1000)], "evaluate_every": 12, "progress": False} | options
    return train(MODEL, data, optimizer, steps, folder=folder, save_every=4, **options)


@pytest.fixture(scope="module")
def whole():
    """The run that nothing interrupts."""
    return run()


def assert_same(one, other):
    """Bit for bit: parameters, both curves."""
    for a, b in zip(jax.tree.leaves(one[:3]), jax.tree.leaves(other[:3]), strict=True):
        assert a.shape == b.shape and np.array_equal(a, b)


# --- what a step does ---------------------------------------------------------------------------


def test_it_learns():
    """One token, one of noise, and the token again: from chance, 1 in 6, to always."""

    def easy(step):
        return copying(jax.random.fold_in(jax.random.key(0), step), 16, 2, vocab_size=8, n_data=1)

    trained = train(MODEL, easy, make_optimizer(3e-2, 60, warmup=5), 60, progress=False)
    assert trained.curve[:4, 1].mean() < 0.5 and (trained.curve[-20:, 1] == 1).all()
    assert trained.curve[0, 0] > 0.9 * math.log(6) and trained.curve[-20:, 0].max() < 0.1


def test_the_curves(whole):
    assert whole.curve.shape == (STEPS, 2) and (whole.curve[:, 0] > 0).all()
    assert whole.held_out[:, 0].tolist() == [12, 24, 30]
    loss, accuracy = evaluate(MODEL, whole.params, [data(1000)])
    assert whole.held_out[-1, 1:].tolist() == pytest.approx([loss, accuracy], rel=1e-6)
    assert whole.seconds > 0


def test_steps_follow_the_gradient_of_the_mean_over_what_is_due(whole):
    """Two steps, the first of them with a rate of 0, from the loss and AdamW written out."""

    optimizer = make_optimizer(3e-3, STEPS, warmup=3)

    @jax.jit
    def one_step(params, state, batch):
        def mean_loss(params):
            log_p = jax.nn.log_softmax(MODEL.apply({"params": params}, batch.tokens))
            return -log_p[jnp.arange(8)[:, None], jnp.arange(8), batch.targets][:, 6:].mean()

        loss, gradient = jax.value_and_grad(mean_loss)(params)
        updates, state = optimizer.update(gradient, state, params)
        return loss, optax.apply_updates(params, updates), state

    params = loop._initial(MODEL, jax.random.key(0))
    state = optimizer.init(params)
    for step in range(2):
        loss, params, state = one_step(params, state, data(step))
        assert whole.curve[step, 0] == pytest.approx(float(loss), rel=1e-5)
    actual = run(steps=2, held_out=()).params
    for p, q in zip(*map(jax.tree.leaves, (actual, params)), strict=True):
        assert np.allclose(p, q, rtol=1e-4, atol=1e-6)


def test_score():
    rng = np.random.default_rng(0)
    logits, targets = rng.normal(size=(3, 5, 7)), rng.integers(0, 7, (3, 5))
    mask = rng.random((3, 5)) < 0.5
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    nats = -np.take_along_axis(log_p, targets[..., None], -1)[..., 0]
    expected = [nats[mask].sum(), (logits.argmax(-1) == targets)[mask].sum(), mask.sum()]
    actual = jax.jit(score)(np.float32(logits), Batch(None, targets, mask))
    assert np.allclose(actual, expected, rtol=1e-5)


@pytest.mark.parametrize("selective", [("delta", "B", "C"), ()])
def test_what_decays(selective):
    config = MambaConfig(8, 1, 8, selective=selective, bias=True, tie_embeddings=False)
    shapes = jax.eval_shape(Mamba(config).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    mask = jax.tree_util.tree_leaves_with_path(decayed(shapes["params"]))
    names = {jax.tree_util.keystr(path, simple=True, separator="/") for path, yes in mask if yes}
    layer = "in_proj conv1d x_proj dt_proj out_proj" if selective else "in_proj conv1d out_proj"
    expected = {f"layers_0/mixer/{name}/kernel" for name in layer.split()}
    assert names == expected | {"embedding/embedding", "lm_head/kernel"}


def test_optimizer_decay_and_schedule():
    """With no gradient the update is −rate · decay · p, of what decays: it shows the schedule."""
    optimizer = make_optimizer(0.1, 10, warmup=4, end=0.2, weight_decay=0.5)
    params = {"layer": {"kernel": np.float32(2.0), "bias": np.float32(2.0)}}
    state, nothing = optimizer.init(params), jax.tree.map(np.zeros_like, params)
    update, rates = jax.jit(optimizer.update), []
    for _ in range(11):
        updates, state = update(nothing, state, params)
        rates.append(-float(updates["layer"]["kernel"]) / (0.5 * 2))
        assert updates["layer"]["bias"] == 0
    falling = [0.02 + 0.08 * (1 + math.cos(math.pi * t / 6)) / 2 for t in range(7)]
    assert rates == pytest.approx([0, 0.025, 0.05, 0.075, *falling], abs=1e-6)
    constant = make_optimizer(0.1, 10, end=1.0, weight_decay=0.5)
    state, update = constant.init(params), jax.jit(constant.update)
    for _ in range(10):
        updates, state = update(nothing, state, params)
        assert float(updates["layer"]["kernel"]) == pytest.approx(-0.1)


def test_optimizer_clips_by_the_global_norm():
    optimizer = make_optimizer(0.1, 10, weight_decay=0.0)
    update = jax.jit(optimizer.update)
    params = {"kernel": np.zeros(2, np.float32), "bias": np.zeros(1, np.float32)}
    long = {"kernel": np.float32([3, 0]), "bias": np.float32([4])}  # norm 5, clipped to 1
    short = {"kernel": np.float32([0.1, 0.2]), "bias": np.float32([0.3])}  # left as it is
    results = []
    for first in (long, jax.tree.map(lambda g: g / 5, long)):
        state = optimizer.init(params)
        for gradient in (first, short):
            updates, state = update(gradient, state, params)
        results.append(updates)
    for a, b in zip(*map(jax.tree.leaves, results), strict=True):
        assert np.allclose(a, b, rtol=1e-5)


@pytest.mark.parametrize(
    "bad", [{"warmup": 10}, {"warmup": -1}, {"end": 1.5}, {"learning_rate": 0}]
)
def test_bad_schedules(bad):
    with pytest.raises(ValueError, match="learning_rate > 0, 0 <= warmup < steps and 0 <= end"):
        make_optimizer(**({"learning_rate": 0.1, "steps": 10} | bad))


def test_bfloat16():
    model = Mamba(MambaConfig(d_model=8, n_layer=1, vocab_size=8, d_state=4, dtype=jnp.bfloat16))
    trained = train(model, data, make_optimizer(3e-3, STEPS, warmup=3), 2, progress=False)
    assert {p.dtype for p in jax.tree.leaves(trained.params)} == {np.dtype(np.float32)}
    assert np.isfinite(trained.curve).all()


# --- evaluation ---------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [3, 8])
def test_evaluation_in_chunks_is_evaluation(whole, chunk):
    """The answers lie in other chunks than the data: without the state, nothing would be right."""
    batches = [data(1001), data(1002)]
    whole_batch = jax.jit(lambda b: score(MODEL.apply({"params": whole.params}, b.tokens), b))
    sums = sum(np.asarray(whole_batch(b)) for b in batches)
    expected = sums[0] / sums[2], sums[1] / sums[2]
    assert evaluate(MODEL, whole.params, batches, chunk=chunk) == pytest.approx(expected, rel=1e-5)


def test_nothing_to_evaluate(whole):
    batch = data(0)
    with pytest.raises(ValueError, match="no place where an answer is due"):
        evaluate(MODEL, whole.params, [batch._replace(mask=batch.mask & False)])


# --- interruptions ------------------------------------------------------------------------------


def breaks_at(step, action):
    """The same data; before the batch of ``step``, ``action`` happens."""

    def broken(i):
        if i == step:
            action()
        return data(i)

    return broken


def crash():
    raise RuntimeError("the power is off")


@pytest.mark.parametrize("step", [1, 3, 13, 29])
def test_resumes_on_the_same_trajectory(whole, tmp_path, step):
    with pytest.raises(RuntimeError, match="power"):
        run(breaks_at(step, crash), folder=tmp_path)
    assert_same(run(folder=tmp_path, resume=True), whole)
    assert_same(run(breaks_at(1, crash), folder=tmp_path, resume=True), whole)  # no step is taken


def test_resumes_in_the_middle_of_a_text(tmp_path):
    """With the state that is carried along, over the end of an epoch."""
    rng = np.random.default_rng(0)
    files = [rng.integers(0, 8, n).astype(np.int32) for n in (70, 111, 91)]
    batches = text_batches(files, 8, 8)
    straight = run(batches, carry=True, held_out=())
    apart = run(batches, held_out=())
    assert not np.allclose(straight.curve[1:, 0], apart.curve[1:, 0], rtol=1e-6)

    def broken(step):
        if step == 14:
            crash()
        return batches(step)

    with pytest.raises(RuntimeError, match="power"):
        run(broken, carry=True, held_out=(), folder=tmp_path)
    assert_same(run(batches, carry=True, held_out=(), folder=tmp_path, resume=True), straight)


def slowly(folder):
    """The run, in a process that will be killed."""

    def slow(step):
        time.sleep(0.02)
        return data(step)

    run(slow, folder=folder, held_out=[data(1000)])


def test_killed_and_resumed(whole, tmp_path):
    """SIGKILL, which no program can answer, as soon as there is a save."""
    code = f"from tests import test_train; test_train.slowly({str(tmp_path)!r})"
    child = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    try:
        while not (tmp_path / SAVE).exists():
            assert child.poll() is None, "the run ended before it saved"
            time.sleep(0.005)
    finally:
        child.kill()
        child.wait()
    assert child.returncode == -signal.SIGKILL
    taken = []
    note = lambda step: (taken.append(step), data(step))[1]  # noqa: E731
    assert_same(run(note, folder=tmp_path, resume=True, held_out=[data(1000)]), whole)
    assert 1 not in taken and STEPS - 1 in taken  # killed between the first save and the end


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_save_that_fails_leaves_the_last_one(whole, tmp_path, monkeypatch, function):
    """Killed while it writes: the new save is cut off or has not its name yet."""
    calls = []
    genuine = getattr(os, function)

    def fail_the_third(*args):
        calls.append(args)
        if len(calls) == 3:
            (tmp_path / SAVE).with_suffix(".part").write_bytes(b"half of a sa")
            raise OSError("disk full")
        return genuine(*args)

    with monkeypatch.context() as patch:
        patch.setattr(loop.os, function, fail_the_third)
        with pytest.raises(OSError, match="disk full"):
            run(folder=tmp_path)
    assert_same(run(folder=tmp_path, resume=True), whole)
    assert [path.name for path in tmp_path.iterdir()] == [SAVE]


@pytest.mark.usefixtures("heeded")
def test_ctrl_c_saves_where_it_stands(whole, tmp_path):
    interrupt = lambda: os.kill(os.getpid(), signal.SIGINT)  # noqa: E731
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run(breaks_at(9, interrupt), folder=tmp_path)
    assert signal.getsignal(signal.SIGINT) is before
    resumed = run(breaks_at(9, crash), folder=tmp_path, resume=True)  # step 9 was taken
    assert_same(resumed, whole)


@pytest.mark.usefixtures("heeded")
def test_ctrl_c_twice_and_where_it_is_ignored():
    with pytest.raises(KeyboardInterrupt), _ctrl_c() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop == [signal.SIGINT]
        signal.raise_signal(signal.SIGINT)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with _ctrl_c() as stop:
            signal.raise_signal(signal.SIGINT)
        assert not stop and signal.getsignal(signal.SIGINT) is signal.SIG_IGN
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
        run(lambda s: (taken.append(s), bad(s))[1], folder=tmp_path, resume=True, held_out=())
    assert 7 not in taken and 8 in taken  # the last save, of 8 steps, is a good one


def test_a_folder_that_is_taken_or_of_another_run(whole, tmp_path):
    run(steps=4, folder=tmp_path, held_out=())
    with pytest.raises(FileExistsError, match="is the save of a run: go on from it"):
        run(steps=4, folder=tmp_path, held_out=())
    with pytest.raises(ValueError, match="another run: seed = 0 there, 5 here; size = None there"):
        run(steps=4, folder=tmp_path, resume=True, seed=5, settings={"size": 3}, held_out=())
    (tmp_path / SAVE).write_bytes(b"\x93nonsense")
    with pytest.raises(ValueError, match="is not a save of this training loop"):
        run(steps=4, folder=tmp_path, resume=True, held_out=())


# --- several devices ----------------------------------------------------------------------------


def on_these_devices():
    """Losses of a run on a task and of one on a text, which shards the state that it carries."""
    files = [np.random.default_rng(0).integers(0, 8, 400).astype(np.int32)]
    text = run(text_batches(files, 8, 8), steps=8, carry=True, held_out=())
    task = run(steps=12)
    return len(jax.devices()), [text.curve.tolist(), task.curve.tolist(), task.held_out.tolist()]


def test_eight_devices_take_the_same_steps():
    code = "import json; from tests import test_train as t; print(json.dumps(t.on_these_devices()))"
    flags = "--xla_force_host_platform_device_count=8"
    child = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stderr
    (devices, theirs), (_, ours) = json.loads(child.stdout), on_these_devices()
    assert devices == 8
    for a, b in zip(theirs, ours, strict=True):
        assert np.allclose(a, b, rtol=1e-5, atol=1e-6)


def test_rows_that_the_devices_cannot_share_equally(monkeypatch):
    monkeypatch.setattr(loop.jax, "devices", lambda: list("abcdefgh"))
    shared = {rows: len(loop._devices(rows)) for rows in (1, 5, 6, 8, 12, 24, 17)}
    assert shared == {1: 1, 5: 5, 6: 6, 8: 8, 12: 6, 24: 8, 17: 1}
