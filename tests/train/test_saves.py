"""Saves: nothing that happens to a run changes the steps that it takes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from flax import serialization
from flax.traverse_util import flatten_dict

from mamba.train.corpus import text_batches
from mamba.train.saves import SAVE
from tests.helpers.training import (
    MODEL,
    MODEL_2,
    MODEL_3,
    STEPS,
    assert_same,
    before_batch,
    crash,
    data,
    environment,
    noting,
    run,
)

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("step", [1, 3, 13, 29])
def test_resumes_on_the_same_trajectory(whole, tmp_path, step):
    with pytest.raises(RuntimeError, match="power"):
        run(before_batch(step, crash), folder=tmp_path)
    assert_same(run(folder=tmp_path, resume=True), whole)
    assert_same(run(before_batch(1, crash), folder=tmp_path, resume=True), whole)  # it is finished


@pytest.mark.parametrize("model", [MODEL, MODEL_2, MODEL_3], ids=["mamba", "mamba2", "mamba3"])
def test_resumes_in_the_middle_of_a_text(tmp_path, model):
    """With the state that is carried along, over the end of an epoch."""
    rng = np.random.default_rng(0)
    token_ids = [rng.integers(0, 8, n).astype(np.int32) for n in (70, 111, 91)]
    batches = text_batches(token_ids, 8, 8)
    options = {"carry": True, "held_out": (), "model": model}
    straight = run(batches, **options)
    apart = run(batches, held_out=(), model=model)
    assert not np.allclose(straight.curve[1:, 0], apart.curve[1:, 0], rtol=1e-6)
    with pytest.raises(RuntimeError, match="power"):
        run(before_batch(14, crash, batches), **options, folder=tmp_path)
    assert_same(run(batches, **options, folder=tmp_path, resume=True), straight)


def test_killed_and_resumed(whole, tmp_path):
    """SIGKILL, which no program can answer, as soon as there is a save."""
    code = f"from tests.helpers import training; training.run_slowly({str(tmp_path)!r})"
    child = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=environment())
    try:
        while not (tmp_path / SAVE).exists():
            assert child.poll() is None, "the run ended before it saved"
            time.sleep(0.005)
    finally:
        child.kill()
        child.wait()
    assert child.returncode == -signal.SIGKILL
    taken = []
    assert_same(run(noting(taken), folder=tmp_path, resume=True, held_out=[data(1000)]), whole)
    assert 1 not in taken and STEPS - 1 in taken  # killed between the first save and the end


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_save_that_fails_leaves_the_one_before(whole, tmp_path, monkeypatch, function):
    """The new save is cut off, or does not have its name yet."""
    calls = []
    genuine = getattr(os, function)

    def fail_the_third(*args):
        calls.append(args)
        if len(calls) == 3:
            raise OSError("disk full")
        return genuine(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, function, fail_the_third)
        with pytest.raises(OSError, match="disk full"):
            run(folder=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [SAVE]
    (tmp_path / f"{SAVE}.part").write_bytes(b"half of a sa")  # what a kill would have left
    taken = []
    assert_same(run(noting(taken), folder=tmp_path, resume=True), whole)
    assert 1 not in taken and STEPS - 1 in taken
    assert [path.name for path in tmp_path.iterdir()] == [SAVE]


def test_a_folder_that_is_taken_or_of_another_run(tmp_path):
    run(steps=4, folder=tmp_path, held_out=())
    with pytest.raises(FileExistsError, match="is the save of a run: continue it with resume"):
        run(steps=4, folder=tmp_path, held_out=())
    with pytest.raises(ValueError, match="another run: seed = 0 there, 5 here; size = None there"):
        run(steps=4, folder=tmp_path, resume=True, seed=5, settings={"size": 3}, held_out=())
    (tmp_path / SAVE).write_bytes(b"\x93nonsense")
    with pytest.raises(ValueError, match="is not a save of this training loop"):
        run(steps=4, folder=tmp_path, resume=True, held_out=())


def test_what_a_save_holds(tmp_path):
    """Its keys and its settings. Whoever changes them can no longer resume older runs."""
    settings = {"names": ("a", "b"), "size": None}
    run(steps=4, folder=tmp_path, held_out=(), settings=settings)
    save = serialization.msgpack_restore((tmp_path / SAVE).read_bytes())
    assert save.keys() == {"state", "curve", "held_out", "seconds", "settings"}
    assert save["settings"] == '{"names": ["a", "b"], "seed": 0, "size": null, "steps": 4}'
    assert save["curve"].shape == (4, 2) and save["held_out"].shape == (0, 3)
    state = save["state"]
    assert state.keys() == {"step", "params", "opt_state", "carried"}
    assert state["step"] == 4 and state["carried"] is None
    params = flatten_dict(state["params"], sep="/")
    adam = state["opt_state"]["1"]["0"]
    assert adam.keys() == {"count", "mu", "nu"}
    for moment in ("mu", "nu"):
        assert flatten_dict(adam[moment], sep="/").keys() == params.keys()
