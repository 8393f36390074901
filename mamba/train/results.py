"""The record of a run: what it measured, and what others need to repeat it."""

import datetime
import importlib.metadata
import json
import os
import platform
import re
import sys
from pathlib import Path

import jax

__all__ = ["describe_run", "write_results"]

PACKAGES = ["jax", "jaxlib", "flax", "optax", "numpy", "tokenizers", "transformers", "torch"]
CURVE_POINTS = 400  # about as many points of a training curve are written
ROOT = Path(__file__).resolve().parents[2]  # of the repository


def describe_run():
    """-> dict: processor, cores, memory, system, versions, command line, date (UTC)."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            pass
    can_count_usable = hasattr(os, "sched_getaffinity")  # not on every system
    return {
        "processor": _first_line("/proc/cpuinfo", "model name") or platform.processor(),
        "cores": len(os.sched_getaffinity(0)) if can_count_usable else os.cpu_count(),
        "memory": _first_line("/proc/meminfo", "MemTotal"),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": versions,
        "command": " ".join(["python", _program(), *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def write_results(path, trained, settings, results):
    """Write the record of a training run as JSON.

    Args:
        path: the file; its folder is made if it does not exist.
        trained: a ``Trained``.
        settings: what defines the run, in types that JSON has.
        results: dict of what was measured after the training.
    """
    curve, steps = trained.curve, len(trained.curve)
    stride = max(1, steps // CURVE_POINTS)
    points = [
        [end, *(round(float(v), 5) for v in curve[end - stride : end].mean(axis=0))]
        for end in range(stride, steps + 1, stride)
    ]
    devices = f"{jax.device_count()} × {jax.devices()[0].device_kind}"
    record = {
        "run": describe_run() | {"devices": devices},
        "settings": settings,
        "seconds": round(trained.seconds, 1),
        **results,
        "held_out": [  # step, loss, accuracy
            [int(step), round(float(loss), 5), round(float(accuracy), 5)]
            for step, loss, accuracy in trained.held_out
        ],
        "curve": points,  # step, loss, accuracy: means over the steps since the point before
    }
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(record, indent=1, ensure_ascii=False)
    text = re.sub(r"\[[^\[\]{}]*\]", lambda row: " ".join(row[0].split()), text)  # one line a row
    path.write_text(text + "\n", encoding="utf-8")


def _program():
    """What this process runs: "-m package", or the path of a script."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is not None:
        return f"-m {spec.name.removesuffix('.__main__')}"
    script = Path(sys.argv[0]).resolve()
    return str(script.relative_to(ROOT)) if script.is_relative_to(ROOT) else script.name


def _first_line(path, key):
    """The value of the first `key : value` line of a file under /proc, or None."""
    try:
        for line in Path(path).read_text().splitlines():
            if line.startswith(key):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return None
