"""A save that a stranger wrote: refused in one line, before Orbax reads a number of it."""

import json
import os
import shutil
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest

from mamba.train.saves import SAVES, Saves

STEP, STEPS = 4, 9


class State(NamedTuple):
    step: Any
    params: Any


def values(step):
    params = {"kernel": jnp.full((3, 4), 2.0), "bias": jnp.arange(4.0)}
    curve = np.ones((step, 2), np.float32)
    return {"state": State(jnp.int32(step), params), "curve": curve, "seconds": np.float64(step)}


def load(folder):
    saves = Saves(folder, {"seed": 0})
    try:
        return saves.load(values(0), STEPS, resume=True)
    finally:
        saves.close()


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """The folder of a run with one save."""
    folder = tmp_path_factory.mktemp("run")
    saves = Saves(folder, {"seed": 0})
    saves.load(values(0), STEPS, resume=False)
    saves.save(STEP, values(STEP))
    saves.close()
    return folder


@pytest.fixture
def run(good, tmp_path):
    """A copy of it, to be spoilt, and the folder of its save."""
    shutil.copytree(good, tmp_path / "run")
    return tmp_path / "run", tmp_path / "run" / SAVES / str(STEP)


def refused(run, match):
    with pytest.raises(ValueError, match=match) as caught:
        load(run[0])
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 800


def test_a_good_save(run):
    loaded = load(run[0])
    assert int(loaded["state"].step) == STEP and loaded["curve"].shape == (STEP, 2)
    assert np.array_equal(loaded["state"].params["kernel"], np.full((3, 4), 2.0))


def replace(path, make):
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    make(path)


@pytest.mark.parametrize("place", ["arrays/curve/0.0", "arrays/_METADATA", "settings", "extra"])
@pytest.mark.parametrize("kind", ["fifo", "link", "socket"])
def test_what_is_no_plain_file(run, place, kind):
    def make(path):
        if kind == "fifo":
            os.mkfifo(path)
        elif kind == "link":
            path.symlink_to("/dev/zero")
        else:
            import socket

            os.chdir(path.parent)  # its name must be short
            socket.socket(socket.AF_UNIX).bind(path.name)

    here = os.getcwd()
    (run[1] / "extra").touch()
    try:
        replace(run[1] / place, make)
    finally:
        os.chdir(here)
    refused(run, "is neither a file nor a folder")


def test_the_folder_itself_is_a_link(run, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (run[0] / SAVES).rename(tmp_path / "elsewhere" / SAVES)
    (run[0] / SAVES).symlink_to(tmp_path / "elsewhere" / SAVES)
    refused(run, "is not a folder of saves")


def zarray(run, name, **changes):
    path = run[1] / "arrays" / name / ".zarray"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"shape": [3, 5]}, r"kernel has the shape \(3, 5\), not \(3, 4\)"),
        ({"shape": [10**12, 4], "chunks": [10**12, 4]}, "kernel has the shape"),
        ({"shape": "x"}, "kernel has no shape"),
        ({"shape": [-3, 4]}, "kernel has no shape"),
        ({"shape": [True, 4]}, "kernel has no shape"),
        ({"chunks": [10**12, 4]}, "kernel is divided into parts of another shape"),
        ({"chunks": [0, 4]}, "kernel is divided into parts of another shape"),
        (
            {"chunks": [1, 1]},
            "parts of state.params.kernel are missing|files of numbers are missing",
        ),
        ({"dtype": "<f8"}, "kernel has another dtype than float32"),
        ({"dtype": "|O"}, "kernel has another dtype than float32"),
        ({"compressor": {"id": "zstd"}}, "kernel is stored in another form"),
        ({"filters": [{"id": "delta"}]}, "kernel is stored in another form"),
        ({"dimension_separator": "/../"}, "kernel is stored in another form"),
    ],
)
def test_an_array_of_another_form(run, changes, match):
    zarray(run, "state.params.kernel", **changes)
    refused(run, match)


def test_too_many_rows(run):
    zarray(run, "curve", shape=[10**10, 2], chunks=[10**10, 2])
    refused(run, "curve has 10000000000 rows")
    zarray(run, "curve", shape=[10**9, 2], chunks=[1, 2])
    refused(run, "parts of curve are missing")


@pytest.mark.parametrize("size", [0, 47, 2**40])
def test_numbers_of_another_size(run, size):
    os.truncate(run[1] / "arrays" / "state.params.kernel" / "0.0", size)  # 2**40: a sparse file
    refused(run, "files of numbers are missing, or have another size")


def test_missing_and_additional_arrays(run):
    shutil.copytree(run[1] / "arrays" / "curve", run[1] / "arrays" / "more")
    load(run[0])  # what nothing describes is not read
    shutil.rmtree(run[1] / "arrays" / "state.step")
    refused(run, "state.step is missing")


def test_too_large(run):
    with open(run[1] / "arrays" / "notes", "wb") as file:
        file.truncate(2**40)
    refused(run, "it is larger than the save of this run can be")
    (run[1] / "arrays" / "notes").unlink()
    for i in range(1100):
        (run[1] / f"note {i}").touch()
    refused(run, "it is larger than the save of this run can be")


DEEP = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize(
    "place",
    ["arrays/_METADATA", "arrays/curve/.zarray", "settings/metadata", "_CHECKPOINT_METADATA"],
)
@pytest.mark.parametrize(
    "text", [DEEP, '{"a": ' + DEEP + "}", "[]", "nonsense", "", '"', "{}"], ids=range(7)
)
def test_notes_that_are_none(run, place, text):
    """Orbax does without a good _CHECKPOINT_METADATA; with a bad one, too, nothing else happens."""
    (run[1] / place).write_text(text)
    if place == "_CHECKPOINT_METADATA":
        try:
            load(run[0])
        except ValueError:
            pass
        return
    refused(run, "is not a save of this training loop|is the save of another run")


@pytest.mark.parametrize("change", ["zarr3", "ocdbt", "file", "type", "names"])
def test_another_description_of_the_tree(run, change):
    path = run[1] / "arrays" / "_METADATA"
    notes = json.loads(path.read_text())
    first = next(iter(notes["tree_metadata"].values()))
    if change == "zarr3":
        notes["use_zarr3"] = True
    elif change == "ocdbt":
        notes["use_ocdbt"] = True
    elif change == "file":
        (run[1] / "arrays" / "manifest.ocdbt").touch()
    elif change == "type":
        first["value_metadata"]["value_type"] = "string"
    else:
        first["key_metadata"][0]["key"] = "../../other"
    path.write_text(json.dumps(notes))
    refused(run, "it is of another kind|it describes other arrays")


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_numbers_that_are_none(run, number):
    path = run[1] / "arrays" / "state.params.bias" / "0"
    bias = np.frombuffer(path.read_bytes(), np.float32).copy()
    bias[2] = number
    path.write_bytes(bias.tobytes())
    refused(run, "NaN or infinity in state.params.bias")


@pytest.mark.parametrize("step", [-1, 5, 2**31 - 1])
def test_another_step(run, step):
    (run[1] / "arrays" / "state.step" / "0").write_bytes(np.int32(step).tobytes())
    refused(run, f"state.step is {step}, not 4")


@pytest.mark.parametrize("step", [10, 10**40])
def test_a_step_after_the_last(run, step):
    run[1].rename(run[1].with_name(str(step)))
    refused(run, "is the save after step")


def test_a_broken_folder(run):
    shutil.rmtree(run[1])
    run[1].write_text("no folder")
    refused(run, "it is no folder")
