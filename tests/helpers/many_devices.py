"""Tests that need many devices: JAX has as many as it started with, so these start anew."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np

ROOT = Path(__file__).resolve().parents[2]
# Compiling is nearly all that such a test does, and these settings of the compiler's last stage
# change no collective.
FLAGS = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


def on_devices(n, module, function):
    """What a function of a module returns (in types that JSON has) in a process with n devices."""
    flags = f"{FLAGS} --xla_force_host_platform_device_count={n}"
    command = [sys.executable, "-m", "tests.helpers.many_devices", module, function]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    child = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr[-3000:]
    return json.loads(child.stdout.splitlines()[-1])


def differences(actual, expected):
    """{place in the tree: greatest difference, relative to the greatest number or to 1}."""
    expected, found = jax.tree_util.tree_leaves_with_path(expected), {}
    for (path, a), b in zip(expected, jax.tree.leaves(actual), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert a.shape == b.shape, jax.tree_util.keystr(path)
        scale = max(1.0, np.abs(a).max(initial=0))
        found[jax.tree_util.keystr(path)] = float(np.abs(a - b).max(initial=0) / scale)
    return found


if __name__ == "__main__":
    module, function = sys.argv[1:]
    print(json.dumps(getattr(importlib.import_module(module), function)()))
