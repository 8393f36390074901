"""A short training run. Every test that uses it calls the same compiled step."""

import os
import time

import jax
import numpy as np

from mamba import Mamba, MambaConfig
from mamba.mamba2 import Mamba2Config
from mamba.mamba3 import Mamba3Config
from mamba.parallel import make_mesh
from mamba.train.corpus import text_batches
from mamba.train.devices import row_mesh
from mamba.train.loop import train
from mamba.train.optimizer import make_optimizer
from mamba.train.tasks import Batch

SIZES = {"d_model": 8, "n_layer": 1, "vocab_size": 8, "d_state": 4}
MODEL = Mamba(MambaConfig(**SIZES))
MODEL_2 = Mamba(Mamba2Config(**SIZES, head_dim=4, n_groups=2))
MODEL_3 = Mamba(Mamba3Config(**SIZES, head_dim=4, n_groups=2, is_mimo=True, d_intermediate=8))
STEPS = 30
OPTIMIZER = make_optimizer(3e-3, STEPS, warmup=3)


def data(step):
    """A batch (8, 8) of selective copying with two data tokens, drawn without a compilation."""
    rng = np.random.default_rng(step)
    values = rng.integers(1, 7, (8, 2), np.int32)
    places = np.sort(rng.permuted(np.tile(np.arange(6), (8, 1)), axis=1)[:, :2])  # (8, 2)
    tokens, targets = np.zeros((2, 8, 8), np.int32)
    np.put_along_axis(tokens, places, values, axis=1)
    tokens[:, 6:], targets[:, 6:] = 7, values
    return Batch(tokens, targets, np.tile(np.arange(8) >= 6, (8, 1)))


def run(data=data, steps=STEPS, folder=None, model=MODEL, **options):
    """The run, or with another argument of ``train`` -> Trained."""
    options = {"held_out": [data(1000)], "evaluate_every": 12, "progress": False} | options
    return train(model, data, OPTIMIZER, steps, folder=folder, save_every=4, **options)


def assert_same(one, other):
    """Two runs are equal bit for bit: their parameters and both curves."""
    for a, b in zip(jax.tree.leaves(one[:3]), jax.tree.leaves(other[:3]), strict=True):
        assert a.shape == b.shape and np.array_equal(a, b)


def before_batch(step, action, data=data):
    """The same data, but ``action`` is called before the batch of ``step`` is drawn."""

    def changed(i):
        if i == step:
            action()
        return data(i)

    return changed


def crash():
    """What a process does that ends in the middle of a run."""
    raise RuntimeError("the power is off")


def noting(steps, data=data):
    """The same data; the numbers of the steps taken are appended to the list ``steps``."""

    def noted(i):
        steps.append(i)
        return data(i)

    return noted


# --- for processes of their own -----------------------------------------------------------------


def run_slowly(folder):
    """The run, slow enough to be killed between two steps."""

    def slow(step):
        time.sleep(0.02)
        return data(step)

    run(slow, folder=folder, held_out=[data(1000)])


def on_these_devices():
    """What depends on the number of devices -> (how many rows are shared by how many, curves).

    The curves are those of a run on a task, whose rows are shared out, and of one on text, where
    eight devices share rows, texts and parameters; of Mamba-3 as well.
    """
    token_ids = [np.random.default_rng(0).integers(0, 8, 400).astype(np.int32)]
    mesh = make_mesh(data=2, sequence=2, model=2) if jax.device_count() == 8 else None
    less_memory = {"accumulate": 2, "remat": True}
    text = run(text_batches(token_ids, 8, 8), 8, carry=True, mesh=mesh, **less_memory)
    task = run(steps=12)
    other = run(text_batches(token_ids, 8, 8), 8, model=MODEL_3, carry=True, held_out=())
    shared = [row_mesh(rows).size for rows in (1, 5, 6, 8, 12, 24, 17)]
    curves = [
        text.curve,
        text.held_out,
        task.curve,
        task.held_out,
        other.curve,
    ]
    return shared, [curve.tolist() for curve in curves]


def run_in_two_processes(folder):
    """A slow run on text, on the devices of two processes; process 0 writes its parameters."""
    token_ids = [np.random.default_rng(0).integers(0, 8, 400).astype(np.int32)]
    batches = text_batches(token_ids, 8, 16)

    def slow(step):
        time.sleep(0.1)
        return batches(step)

    options = {"steps": 12, "carry": True, "held_out": ()}
    if folder is None:  # in the process of the test
        return run(batches, **options)
    mesh = make_mesh(data=2, sequence=4)
    trained = run(slow, folder=folder, resume=True, mesh=mesh, **options)
    if jax.process_index() == 0:
        np.savez(f"{folder}/params.npz", *jax.tree.leaves(trained.params))


def environment(**variables):
    """The environment of a child process that runs JAX on the CPU."""
    return os.environ | {"JAX_PLATFORMS": "cpu"} | variables
