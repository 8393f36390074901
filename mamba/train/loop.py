"""A training loop that can be killed at any moment and then resumed.

Everything that a step depends on is a value, ``TrainState``, and its batch is a function of the
step's number. So a run that was interrupted and resumed takes the same steps, bit for bit, as one
that was not.
"""

import contextlib
import time
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

from mamba.interrupts import defer_interrupt
from mamba.parallel import check_divides, on_stretches, parameter_shardings
from mamba.train.devices import any_process, collect, gradient_over_devices, row_mesh, spread
from mamba.train.metrics import evaluate, masked_loss_sums
from mamba.train.saves import Saves

__all__ = ["History", "TrainState", "Trained", "first_state", "train", "train_step"]

LOG_EVERY = 10  # steps between two reads of the metrics; each read waits for the device
PROGRESS_MEAN = 50  # steps whose mean the progress bar shows


class TrainState(NamedTuple):
    """Everything the next step depends on, apart from its batch."""

    step: jax.Array  # () int32: number of steps taken
    params: Any  # the model's parameters
    opt_state: Any  # the optimizer's state
    carried: Any  # decoding state after the last batch; None if every batch starts from zeros


class Trained(NamedTuple):
    """What ``train`` returns."""

    params: Any  # the model's parameters after the last step
    curve: np.ndarray  # (steps, 2): loss (nats per scored position), accuracy, on each step's batch
    held_out: np.ndarray  # (evaluations, 3): step, loss, accuracy
    seconds: float  # time of training and evaluation, over all the runs it took


@partial(jax.jit, static_argnames=("model", "optimizer", "mesh", "accumulate"))
def train_step(model, optimizer, mesh, state, batch, accumulate=1):
    """Move the parameters once, along the gradient of the mean loss over the scored positions.

    Args:
        model: a ``Mamba``.
        optimizer: from optax; ``make_optimizer`` makes one that clips the gradient first.
        mesh: the devices that share the batch and the parameters, see ``make_mesh``.
        state: the TrainState before the step.
        batch: a ``tasks.Batch`` of (b, l).
        accumulate: number of parts in which each device's rows are differentiated.

    Returns:
        The next TrainState, and (3,): loss, accuracy, norm of the gradient before clipping.
    """

    local = on_stretches(model, mesh)

    def summed_loss(params, carried, batch):
        out = local.apply({"params": params}, batch.tokens, carried)
        logits, carried = (out, None) if carried is None else out  # (b, l, vocab)
        sums = masked_loss_sums(logits, batch)  # nats, correct, scored
        return sums[0], (sums, carried)

    differentiate = gradient_over_devices(summed_loss, mesh, accumulate=accumulate)
    gradient, (nats, correct, scored), carried = differentiate(state.params, state.carried, batch)
    gradient = jax.tree.map(lambda g: g / scored, gradient)  # of the mean, not of the sum
    updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    norm = jnp.sqrt(sum(jnp.vdot(g, g) for g in jax.tree.leaves(gradient)))
    metrics = jnp.stack([nats / scored, correct / scored, norm])
    return TrainState(state.step + 1, params, opt_state, carried), metrics


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
    mesh=None,
    accumulate=1,
    remat=False,
):
    """Train a model, from random parameters or from the last save.

    Ctrl-C or SIGTERM ends the run after the current step, with a save; a second one, at once.

    Args:
        model: a ``Mamba``.
        data: a function, step number -> ``tasks.Batch``. The same step gives the same batch.
        optimizer: from optax, see ``make_optimizer``.
        steps: number of steps in the whole run.
        seed: of the parameters.
        carry: whether each row continues from the state after the same row of the batch before; or
            a function, step number -> (b,) bool: which rows do.
        held_out: batches for ``evaluate``.
        evaluate_every: steps between two evaluations; there is one at the end, too. None: only
            that one.
        folder: where to save; None saves nothing. A kill at any moment leaves the last complete
            save there.
        save_every: steps between two saves; there is one at the end, too.
        resume: continue from the save in ``folder``, if there is one. Its run may have had fewer
            steps, and any number of devices.
        settings: what else defines the run, in types that JSON has. A save of a run with other
            settings is refused.
        progress: whether to show a progress bar.
        mesh: from ``make_mesh``, of the devices of all processes; each process calls this function
            with the same arguments, and writes its own parts of a save. None: the devices share
            the rows, as many as can do so equally.
        accumulate: number of parts in which each device's rows are differentiated, for less memory.
        remat: whether to compute each layer anew in the backward pass, for less memory.

    Returns:
        A Trained.

    Raises:
        FloatingPointError: the loss or the gradient is NaN or infinite.
        FileExistsError: ``folder`` holds a save, and ``resume`` is False.
        ValueError: what ``folder`` holds is no save, or the save of another run; rows or lengths
            that the mesh or ``accumulate`` does not divide.
    """
    shape = data(0).tokens.shape
    mesh = row_mesh(shape[0] // accumulate) if mesh is None else mesh
    check_divides(mesh, shape)
    if shape[0] % (mesh.shape["data"] * accumulate):
        raise ValueError(
            f"{shape[0]} rows on {mesh.shape['data']} devices cannot be divided into {accumulate} "
            "equal parts"
        )
    model = model.clone(remat=remat)
    settings = {"seed": seed, "steps": steps} | (settings or {})
    state = first_state(model, optimizer, mesh, seed, shape[0] if carry else None)
    history, saves = History(), None
    with contextlib.ExitStack() as stack:
        if folder is not None:
            saves = stack.enter_context(contextlib.closing(Saves(folder, settings)))
            saved = saves.load({"state": state} | history.values(), steps, resume=resume)
            state, history = saved.pop("state"), History(**saved)
        first = int(state.step)
        bar = tqdm(
            initial=first, total=steps, unit="step", disable=not progress or jax.process_index() > 0
        )
        stack.enter_context(bar)
        interrupts = stack.enter_context(defer_interrupt())
        for step in range(first, steps):
            if callable(carry):
                kept = spread(carry(step), mesh, "data")
                state = state._replace(carried=_keep_rows(state.carried, kept))
            batch = spread(data(step), mesh, "data", "sequence")
            state, metrics = train_step(model, optimizer, mesh, state, batch, accumulate)
            history.add(metrics)
            bar.update()
            done = step + 1
            last = done == steps
            if last or done % LOG_EVERY == 0:
                bar.set_postfix(history.recent())
            if held_out and (last or (evaluate_every and done % evaluate_every == 0)):
                history.read()
                history.held_out.append((done, *evaluate(model, state.params, held_out, mesh)))
            interrupted = not last and _interrupted(interrupts, done)
            if saves and (last or interrupted or done % save_every == 0):
                saves.save(done, {"state": state} | history.values())
            if interrupted:
                raise interrupts[0] if interrupts else KeyboardInterrupt
    return Trained(collect(state.params, mesh), **history.values())


class History:
    """What a run has measured. The newest metrics stay on the device until they are read."""

    def __init__(self, curve=(), held_out=(), seconds=0.0):
        """Continue from what was measured before, in the form of ``Trained``."""
        self.curve = np.asarray(curve).tolist()  # [loss, accuracy] of each step
        self.held_out = np.asarray(held_out).tolist()  # (step, loss, accuracy) of each evaluation
        self.began = time.time() - seconds  # when the run began, less the time between its parts
        self.unread = []  # (3,): loss, accuracy, norm of the gradient, of the newest steps

    def add(self, metrics):
        """Note the metrics of a step, without waiting for the device."""
        self.unread.append(metrics)

    def read(self):
        """Read the metrics added so far. Raises FloatingPointError if one is NaN or infinite."""
        for loss, accuracy, norm in np.array(jax.device_get(self.unread)).tolist():
            if not np.isfinite([loss, accuracy, norm]).all():
                raise FloatingPointError(
                    f"step {len(self.curve) + 1}: the loss is {loss:.4g} and the norm of the "
                    f"gradient {norm:.4g}. A smaller learning rate or a longer warm-up may help"
                )
            self.curve.append([loss, accuracy])
        self.unread.clear()

    def recent(self):
        """Mean loss and accuracy of the last steps, as text -> {name: text}."""
        self.read()
        loss, accuracy = np.mean(self.curve[-PROGRESS_MEAN:], axis=0)
        return {"loss": f"{loss:.3f}", "accuracy": f"{accuracy:.1%}"}

    def values(self):
        """Everything so far, in the form of ``Trained`` -> {"curve", "held_out", "seconds"}."""
        self.read()
        return {
            "curve": np.array(self.curve, np.float32).reshape(-1, 2),
            "held_out": np.array(self.held_out, np.float32).reshape(-1, 3),
            "seconds": np.float64(time.time() - self.began),
        }


def first_state(model, optimizer, mesh, seed, rows=None):
    """The TrainState before the first step, laid out on the mesh.

    model, optimizer, mesh: as ``train_step`` takes them. rows: of what is carried on, or None
    """
    return _initializer(model, optimizer, mesh, rows)(jax.random.key(seed))


@cache
def _initializer(model, optimizer, mesh, rows):
    """The function behind ``first_state``, of a key; compiled once."""

    def initialize(key):
        params = model.init(key, jnp.zeros((1, 2), jnp.int32))["params"]
        carried = None if rows is None else model.initial_state(rows)
        return TrainState(jnp.int32(0), params, optimizer.init(params), carried)

    everywhere, by_row = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
    shapes = jax.eval_shape(initialize, jax.random.key(0))
    layout = parameter_shardings(shapes.params, mesh)
    moments = optax.tree_utils.tree_map_params(  # they lie as their parameters do
        optimizer,
        lambda _, sharding: sharding,
        shapes.opt_state,
        layout,
        transform_non_params=lambda _: everywhere,
    )
    return jax.jit(initialize, out_shardings=TrainState(everywhere, layout, moments, by_row))


def _interrupted(interrupts, step):
    """Whether a signal has come; of several processes, to any of them, asked from time to time."""
    if jax.process_count() > 1 and step % LOG_EVERY:
        return False
    return any_process(bool(interrupts))


@jax.jit
def _keep_rows(state, kept):
    """A decoding state, with zeros in all rows but those of kept (b,)."""
    return jax.tree.map(lambda v: jax.vmap(jnp.where)(kept, v, jnp.zeros_like(v)), state)
