"""The record of a run: how it was made, and that the recorded runs are still the presets'."""

import json
import shlex
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from mamba.train import __main__ as train_main
from mamba.train.loop import Trained
from mamba.train.presets import PRESETS
from mamba.train.results import describe_run, write_results

ROOT = Path(__file__).resolve().parents[2]
RECORDED = sorted((ROOT / "benchmarks" / "results" / "training").glob("*.json"))


@pytest.mark.parametrize(
    ("script", "shown"),
    [
        (ROOT / "benchmarks" / "scan.py", "benchmarks/scan.py"),
        (ROOT.parent / "elsewhere" / "mine.py", "mine.py"),
    ],
)
def test_the_command_of_a_script(monkeypatch, script, shown):
    """It is the path inside the repository; what lies around it is nobody's business."""
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    monkeypatch.setattr(sys, "argv", [str(script), "--steps", "3"])
    assert describe_run()["command"] == f"python {shown} --steps 3"


def test_the_command_of_a_package(monkeypatch):
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", train_main.__spec__)
    monkeypatch.setattr(sys, "argv", [train_main.__file__, "copying"])
    assert describe_run()["command"] == "python -m mamba.train copying"


def test_a_long_curve_is_written_as_means(tmp_path):
    curve = np.stack([np.arange(1000.0), np.arange(1000.0) / 1000], axis=1)
    trained = Trained(None, curve, np.array([[1000, 0.5, 0.25]]), 1.23)
    write_results(tmp_path / "a" / "b.json", trained, {"task": "x"}, {"answer": 42})
    record = json.loads((tmp_path / "a" / "b.json").read_text())
    assert record["curve"][:2] == [[2, 0.5, 0.0005], [4, 2.5, 0.0025]]
    assert len(record["curve"]) == 500 and record["held_out"] == [[1000, 0.5, 0.25]]
    assert (record["settings"], record["answer"], record["seconds"]) == ({"task": "x"}, 42, 1.2)


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.stem)
def test_a_recorded_command_still_asks_for_the_recorded_run(path, monkeypatch):
    """The same settings, with the key "selective" in "model"."""
    jax.devices()  # JAX has started: its devices stay as they are
    recorded = json.loads(path.read_text(encoding="utf-8"))
    asked = {}

    def note(preset, *, selective, seed, dtype, **options):
        model_settings = preset.settings(preset.config(selective, dtype))
        asked.update(model_settings | {"seed": seed})
        raise KeyboardInterrupt  # instead of a training

    monkeypatch.setattr(train_main, "run", note)
    arguments = shlex.split(recorded["run"]["command"].removeprefix("python -m mamba.train "))
    for flag in ("--results", "--out"):
        if flag in arguments:
            del arguments[arguments.index(flag) : arguments.index(flag) + 2]
    assert train_main.main(arguments) == 130
    expected = recorded["settings"]
    assert expected.pop("preset") in PRESETS[expected["task"]]
    assert json.loads(json.dumps(asked)) == expected
    assert set(expected["model"]["selective"]) <= {"delta", "B", "C"}
