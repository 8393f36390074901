"""What the benchmarks write: where and how it was measured, then one result per line."""

import json
import os


def load_average():
    """Processes that wanted to run during the last minute."""
    return round(os.getloadavg()[0], 1)


def head(note, load_before):
    """-> dict: machine, versions, command and load of a measurement that ends now."""
    from mamba.machine import describe_run  # with JAX, which measuring processes must not inherit

    return describe_run() | {
        "device": "CPU only; nothing here was measured on a GPU or TPU",
        "note": note,
        "load_average_before_and_after": [load_before, load_average()],
    }


def write(path, report, results):
    """Readable, and a new measurement is a readable diff."""
    top = json.dumps(report, indent=1)
    rows = ",\n".join("  " + json.dumps(row) for row in results)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(top[:-2] + ',\n "results": [\n' + rows + "\n ]\n}\n", encoding="utf-8")
