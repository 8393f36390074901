"""What a result needs beside it so that others can repeat it: machine, versions, command, date."""

import datetime
import importlib.metadata
import os
import platform
import sys
from pathlib import Path

__all__ = ["describe_run"]

PACKAGES = ["jax", "jaxlib", "flax", "optax", "numpy", "tokenizers", "transformers", "torch"]


def describe_run():
    """-> dict of processor, cores, memory, system, versions, command line and date (UTC)."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            pass
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is None:
        script = Path(sys.argv[0]).resolve()
        root = Path(__file__).resolve().parents[1]
        script = str(script.relative_to(root) if script.is_relative_to(root) else script.name)
    else:
        script = f"-m {spec.name.removesuffix('.__main__')}"
    return {
        "processor": _first_line("/proc/cpuinfo", "model name") or platform.processor(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "memory": _first_line("/proc/meminfo", "MemTotal"),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": versions,
        "command": " ".join(["python", script, *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def _first_line(path, key):
    """The value of the first `key : value` line of a file under /proc, or None."""
    try:
        for line in Path(path).read_text().splitlines():
            if line.startswith(key):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return None
