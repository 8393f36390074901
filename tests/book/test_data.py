"""The recorded measurements that chapters read are copies of what the benchmarks wrote."""

import json

import pytest

from tests.helpers.book import ROOT, load_script

NAMES = ["decays", "generate", "hardware", "kernel_records", "language_model", "scan", "ssd"]
NAMES += ["devices", "every_core", "state_tracking", "trapezoid"]


@pytest.mark.parametrize("name", NAMES)
def test_the_measurements_that_a_chapter_reads_are_those_of_the_benchmark(name):
    folders = ROOT / "mamba_book" / "data", ROOT / "benchmarks" / "results"
    copy, original = (json.loads((f / f"{name}.json").read_text("utf-8")) for f in folders)
    if name == "scan":  # the copy has fewer columns
        for row, short in zip(original["results"], copy["results"], strict=True):
            assert short.items() <= row.items()
        copy["results"] = original["results"]
    assert copy == original


def test_the_runs_that_a_chapter_reads_are_those_that_were_recorded():
    copy = json.loads((ROOT / "mamba_book" / "data" / "training.json").read_text("utf-8"))
    assert copy == load_script("benchmarks/training.py").gather()


def test_the_recorded_logits_that_a_page_reads_are_those_of_the_tests():
    """All forms of Mamba-2 and Falcon-Mamba, byte by byte."""
    copies, originals = (
        ROOT / "mamba_book" / "data" / "logits",
        ROOT / "tests" / "golden" / "logits",
    )
    forms = {path.name for path in originals.iterdir()}
    forms = {name for name in forms if "mamba2" in name or "falcon" in name}
    assert {path.name for path in copies.iterdir()} == forms and len(forms) == 6
    for form in forms:
        names = sorted(path.name for path in (originals / form).iterdir())
        assert sorted(path.name for path in (copies / form).iterdir()) == names
        for name in names:
            assert (copies / form / name).read_bytes() == (originals / form / name).read_bytes()
