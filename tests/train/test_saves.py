"""Saves: nothing that happens to a run changes the steps that it takes."""

import json
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from mamba.train.corpus import text_batches
from mamba.train.saves import OLD_SAVE, SAVES
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


def saved_steps(folder):
    return sorted(int(path.name) for path in (folder / SAVES).glob("*") if path.name.isdecimal())


def test_killed_and_resumed(whole, tmp_path):
    """SIGKILL, which no program can answer, as soon as there is a save."""
    code = f"from tests.helpers import training; training.run_slowly({str(tmp_path)!r})"
    child = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=environment())
    try:
        while not saved_steps(tmp_path):
            assert child.poll() is None, "the run ended before it saved"
            time.sleep(0.005)
    finally:
        child.kill()
        child.wait()
    assert child.returncode == -signal.SIGKILL
    taken = []
    assert_same(run(noting(taken), folder=tmp_path, resume=True, held_out=[data(1000)]), whole)
    assert 1 not in taken and STEPS - 1 in taken  # killed between the first save and the end


def test_a_save_that_fails_leaves_the_one_before(whole, tmp_path):
    """From step 9 on, nothing more can be written: perhaps the save after step 8 is, by then."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def full():
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))

    try:
        with pytest.raises(OSError, match="cannot save: "):
            run(before_batch(9, full), folder=tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    (last,) = saved_steps(tmp_path)
    assert last in (4, 8)
    taken = []
    assert_same(run(noting(taken), folder=tmp_path, resume=True), whole)
    assert last - 1 not in taken and last in taken
    assert [path.name for path in (tmp_path / SAVES).iterdir()] == [str(STEPS)]  # nothing else


def test_a_folder_that_is_taken_or_of_another_run(tmp_path):
    run(steps=4, folder=tmp_path, held_out=())
    with pytest.raises(FileExistsError, match="has the save of a run: continue it with resume"):
        run(steps=4, folder=tmp_path, held_out=())
    with pytest.raises(ValueError, match="another run: seed = 0 there, 5 here; size = None there"):
        run(steps=4, folder=tmp_path, resume=True, seed=5, settings={"size": 3}, held_out=())
    with pytest.raises(ValueError, match="is the save after step 4, but the run has 3"):
        run(steps=3, folder=tmp_path, resume=True, held_out=())
    (tmp_path / OLD_SAVE).write_bytes(b"what 0.1 wrote")
    with pytest.raises(ValueError, match="written by an earlier version, whose saves this one can"):
        run(steps=4, folder=tmp_path, resume=True, held_out=())


def test_a_run_may_get_more_steps(whole, tmp_path):
    """With the same optimizer, it is the run that had them from the start."""
    run(steps=8, folder=tmp_path, held_out=())
    assert_same(run(folder=tmp_path, resume=True), whole)


def test_what_a_save_holds(tmp_path):
    """Its names and its settings. Whoever changes them can no longer resume older runs."""
    settings = {"names": ("a", "b"), "size": None}
    run(steps=4, folder=tmp_path, held_out=(), settings=settings)
    save = tmp_path / SAVES / "4"
    theirs = json.loads((save / "settings" / "metadata").read_text())
    assert theirs == {"names": ["a", "b"], "seed": 0, "size": None, "steps": 4}
    names = {path.parent.name for path in save.glob("arrays/*/.zarray")}
    params = {name for name in names if name.startswith("state.params.")}
    for moment in ("mu", "nu"):
        adam = {name.replace(".params", f".opt_state.1.0.{moment}") for name in params}
        assert adam <= names
        names -= adam
    counts = {"state.opt_state.1.0.count", "state.opt_state.1.2.count"}
    assert names - params == {"state.step", "curve", "seconds"} | counts
    assert "state.params.layers_0.mixer.in_proj.kernel" in params
