"""A training loop that can be killed at any moment, and goes on as if it had not been.

Everything that a step depends on is a value, ``TrainState``, and its batch is a function of the
step's number. So a run that goes on from a save takes the same steps, bit for bit, as one that was
never interrupted. The rows of a batch are shared out among the devices that JAX shows.
"""

import json
import os
import time
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import serialization
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

from mamba.interrupts import _ctrl_c

__all__ = ["Trained", "TrainState", "decayed", "evaluate", "make_optimizer", "score", "train"]

SAVE = "training.msgpack"  # in the folder of a run
LOOK = 10  # steps between two looks at the numbers: looking waits for the device


class TrainState(NamedTuple):
    """What the next step depends on, apart from its batch."""

    step: jax.Array  # () int32: steps taken
    params: Any
    opt_state: Any
    carried: Any  # the decoding state after the last batch, or None: every batch starts from zeros


class Trained(NamedTuple):
    """What ``train`` returns."""

    params: Any
    curve: np.ndarray  # (steps, 2): loss in nats per answer, and accuracy, on every step's batch
    held_out: np.ndarray  # (evaluations, 3): step, loss, accuracy
    seconds: float  # of training and evaluation, summed over all the runs that it took


def decayed(params):
    """True for what weight decay may shrink: matrices, convolutions and the embedding.

    Not A_log, D, biases and norms (as in the released code), nor a layer's constant B, C and Δ.
    -> the same tree, of bools
    """
    return jax.tree.map_with_path(lambda path, _: path[-1].key in ("kernel", "embedding"), params)


@cache
def make_optimizer(learning_rate, steps, *, warmup=0, end=0.05, weight_decay=0.1, clip=1.0):
    """AdamW with a linear warm-up and a cosine to ``end`` · learning_rate, gradients clipped.

    warmup: in steps.   clip: the largest global norm of a gradient.   Betas 0.9 and 0.95, as the
    paper's Appendix E.2 has them for language models. The same arguments give the same object, so
    that a compiled step is found again. Raises ValueError for values that no run can have.
    """
    if not (learning_rate > 0 and 0 <= warmup < steps and 0 <= end <= 1):
        raise ValueError(
            "expected learning_rate > 0, 0 <= warmup < steps and 0 <= end <= 1, got "
            f"{learning_rate}, {warmup} of {steps}, and {end}"
        )
    schedule = optax.warmup_cosine_decay_schedule(
        0.0 if warmup else learning_rate, learning_rate, warmup, steps, end * learning_rate
    )
    return optax.chain(
        optax.clip_by_global_norm(clip),
        optax.adamw(schedule, b2=0.95, weight_decay=weight_decay, mask=decayed),
    )


def score(logits, batch):
    """-> (3,) sums over the places where an answer is due: nats, right answers, and how many.

    logits: (b, l, vocab), batch: a ``tasks.Batch`` of (b, l). The loss is the first over the last.
    """
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, batch.targets)  # (b, l)
    right = logits.argmax(axis=-1) == batch.targets  # (b, l)
    counts = jnp.stack([jnp.where(batch.mask, v, 0).sum() for v in (nats, right, batch.mask)])
    return counts.astype(jnp.float32)


@partial(jax.jit, static_argnames=("model",))
def _initial(model, key):
    return model.init(key, jnp.zeros((1, 2), jnp.int32))["params"]


@partial(jax.jit, static_argnames=("model", "optimizer", "mesh"))
def _step(model, optimizer, mesh, train_state, batch):
    """One step -> (next TrainState, (3,): loss, accuracy, norm of the gradient before clipping)."""

    def loss_fn(params, carried, batch):
        out = model.apply({"params": params}, batch.tokens, carried)
        logits, carried = (out, None) if carried is None else out
        sums = score(logits, batch)
        return sums[0], (sums, carried)

    def on_one_device(params, carried, batch):
        grads, (sums, carried) = jax.grad(loss_fn, has_aux=True)(params, carried, batch)
        return *jax.lax.psum((grads, sums), "rows"), carried

    # Each device differentiates its own rows. Left to itself, the compiler would gather all of them
    # for the scan's backward pass, which goes through the rows one by one.
    grads, (nats, right, due), carried = jax.shard_map(
        on_one_device,
        mesh=mesh,
        in_specs=(P(), P("rows"), P("rows")),
        out_specs=(P(), P(), P("rows")),
        check_vma=False,
    )(train_state.params, train_state.carried, batch)
    grads = jax.tree.map(lambda g: g / due, grads)
    updates, opt_state = optimizer.update(grads, train_state.opt_state, train_state.params)
    params = optax.apply_updates(train_state.params, updates)
    norm = jnp.sqrt(sum(jnp.vdot(g, g) for g in jax.tree.leaves(grads)))
    metrics = jnp.stack([nats / due, right / due, norm])
    return TrainState(train_state.step + 1, params, opt_state, carried), metrics


def train(
    model,
    data,
    optimizer,
    steps,
    *,
    seed=0,
    carry=False,
    held_out=(),
    evaluate_every=None,
    folder=None,
    save_every=500,
    resume=False,
    settings=None,
    progress=True,
):
    """Take ``steps`` steps from random parameters, or from the last save -> Trained.

    model: a ``Mamba``.   data: step number -> ``tasks.Batch``, always the same for the same step.
    optimizer: from optax, see ``make_optimizer``.   seed: of the parameters.
    carry: read on, from batch to batch, from the state that each row was left in.
    held_out: batches for ``evaluate``, every ``evaluate_every`` steps and at the end.
    folder: where to save, every ``save_every`` steps and at the end; None saves nothing. A save is
        written aside, then renamed: kill the process when you like, the last whole one stays.
    resume: go on from the save in ``folder``, if there is one.
    settings: what else defines the run, in types that JSON has; a save with others is refused.

    Ctrl-C ends the run after the step, with a save; again, at once. Raises FloatingPointError,
    which names step, loss and norm, when either is NaN or infinite; FileExistsError if ``folder``
    holds a save and ``resume`` is False; ValueError if that is no save, or another run's.
    """
    rows = len(data(0).tokens)
    mesh = Mesh(np.array(_devices(rows)), ("rows",))
    everywhere, by_row = NamedSharding(mesh, P()), NamedSharding(mesh, P("rows"))

    params = _initial(model, jax.random.key(seed))
    carried = model.initial_state(rows) if carry else None
    state = TrainState(jnp.int32(0), params, optimizer.init(params), carried)
    saved = {
        "state": state,
        "curve": np.zeros((0, 2), np.float32),
        "held_out": np.zeros((0, 3), np.float32),
        "seconds": 0.0,
    }
    settings = json.dumps({"seed": seed, "steps": steps} | (settings or {}), sort_keys=True)
    path = None if folder is None else Path(folder) / SAVE
    if path is not None and path.exists():
        if not resume:
            raise FileExistsError(
                f"{path} is the save of a run: go on from it with resume (the flag --resume), or "
                "choose another folder"
            )
        saved = _load(path, saved, settings)
    state = saved["state"]
    state = jax.device_put(state, TrainState(everywhere, everywhere, everywhere, by_row))
    first = int(state.step)
    curve = np.concatenate([saved["curve"], np.zeros((steps - first, 2), np.float32)])
    evaluated, began = [*saved["held_out"]], time.time() - saved["seconds"]
    pending = []  # what the last steps measured, not yet looked at

    def look(done):
        if not pending:
            return
        values = np.stack(jax.device_get(pending))  # (≤ LOOK, 3)
        start = done - len(pending)
        curve[start:done] = values[:, :2]
        pending.clear()
        bad = np.flatnonzero(~np.isfinite(values).all(axis=1))
        if bad.size:
            loss, _, norm = values[bad[0]]
            raise FloatingPointError(
                f"step {start + bad[0] + 1}: the loss is {loss} and the norm of the gradient "
                f"{norm}. A smaller learning rate or a longer warm-up may help"
            )
        recent = curve[max(0, done - 50) : done].mean(axis=0)
        bar.set_postfix(loss=f"{recent[0]:.3f}", accuracy=f"{recent[1]:.1%}")

    def save(done):
        if path is not None:
            now = {
                "state": jax.device_get(state),
                "curve": curve[:done],
                "held_out": np.array(evaluated, np.float32).reshape(-1, 3),
                "seconds": time.time() - began,
            }
            _save(path, now, settings)

    with (
        tqdm(initial=first, total=steps, unit="step", disable=not progress) as bar,
        _ctrl_c() as stop,
    ):
        for step in range(first, steps):
            batch = jax.device_put(data(step), by_row)
            state, metrics = _step(model, optimizer, mesh, state, batch)
            pending.append(metrics)
            bar.update()
            done = step + 1
            last = done == steps
            evaluating = held_out and (last or (evaluate_every and done % evaluate_every == 0))
            saving = last or stop or done % save_every == 0
            if saving or evaluating or done % LOOK == 0:
                look(done)
            if evaluating:
                evaluated.append((done, *evaluate(model, state.params, held_out)))
            if saving:
                save(done)
            if stop and not last:
                raise KeyboardInterrupt
    return Trained(
        jax.device_get(state.params),
        curve,
        np.array(evaluated, np.float32).reshape(-1, 3),
        time.time() - began,
    )


@partial(jax.jit, static_argnames=("model",))
def _read(model, params, state, batch):
    logits, state = model.apply({"params": params}, batch.tokens, state)
    return score(logits, batch), state


def evaluate(model, params, batches, *, chunk=4096):
    """Mean over all answers due in the batches -> (loss in nats, accuracy).

    Sequences longer than ``chunk`` tokens are read in pieces, each from the state that the one
    before has left, so that memory does not grow with their length. Raises ValueError if there is
    no answer to score.
    """
    total = np.zeros(3)
    for batch in batches:
        rows, length = batch.tokens.shape
        mesh = Mesh(np.array(_devices(rows)), ("rows",))
        by_row = NamedSharding(mesh, P("rows"))
        here = jax.device_put(params, NamedSharding(mesh, P()))
        batch = jax.tree.map(np.asarray, batch)
        state = jax.device_put(model.initial_state(rows), by_row)
        for at in range(0, length, chunk):
            piece = jax.tree.map(lambda v, at=at: v[:, at : at + chunk], batch)
            sums, state = _read(model, here, state, jax.device_put(piece, by_row))
            total += np.asarray(sums)
    if not total[2]:
        raise ValueError("the batches hold no place where an answer is due: nothing to evaluate")
    return float(total[0] / total[2]), float(total[1] / total[2])


def _devices(rows):
    """As many devices as share the rows equally."""
    devices = jax.devices()
    return devices[: max(n for n in range(1, len(devices) + 1) if rows % n == 0)]


def _save(path, values, settings):
    """Write aside, wait for the disk, rename: at any moment, the last whole save is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".part")
    with open(aside, "wb") as file:
        file.write(serialization.to_bytes(values | {"settings": settings}))
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def _load(path, like, settings):
    """Read a save of the run that ``settings`` describe; ``like`` says what it must hold."""
    try:
        values = serialization.msgpack_restore(path.read_bytes())
        theirs = json.loads(values.pop("settings"))
    except Exception as error:
        raise ValueError(f"{path} is not a save of this training loop ({error})") from error
    ours = json.loads(settings)
    differ = [
        f"{key} = {theirs.get(key)} there, {ours.get(key)} here"
        for key in sorted(ours.keys() | theirs.keys())
        if ours.get(key) != theirs.get(key)
    ]
    if differ:
        raise ValueError(f"{path} is the save of another run: {'; '.join(differ)}")
    return serialization.from_state_dict(like, values)
