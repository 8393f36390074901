"""The files that the benchmarks write: first how it was measured, then one result per line."""

import json
import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Where a record goes: beside the benchmarks, and into what the chapters read.
FOLDERS = [ROOT / path for path in ("benchmarks/results", "mamba_book/data")]


def load_average():
    """Mean number of processes that wanted to run during the last minute."""
    return round(os.getloadavg()[0], 1)


def head(note, load_before, device="CPU only; nothing here was measured on a GPU or TPU"):
    """Describe a measurement that ends now -> dict: machine, versions, command, note and load.

    note: what a reader of the results must know.   load_before: ``load_average()`` when it began.
    """
    # This imports JAX, which the measuring processes must not inherit.
    from mamba.train.results import describe_run

    return describe_run() | {
        "device": device,
        "note": note,
        "load_average_before_and_after": [load_before, load_average()],
    }


def write(path, report, results):
    """Write a report as JSON, with one result per line, so that a new measurement is a short diff.

    path: the file; its folder is made.   report: dict, see ``head``.   results: list of dicts.
    """
    top = json.dumps(report, indent=1)
    rows = ",\n".join("  " + json.dumps(row) for row in results)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(top[:-2] + ',\n "results": [\n' + rows + "\n ]\n}\n", encoding="utf-8")


def record(name, report, results):
    """``write`` under a name such as "ssd": beside the benchmarks, and where chapters read it."""
    for folder in FOLDERS:
        write(folder / f"{name}.json", report, results)
