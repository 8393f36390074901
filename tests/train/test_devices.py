"""Eight devices, in a process of their own, take the same steps as one."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np

from tests.helpers.training import environment, on_these_devices

ROOT = Path(__file__).resolve().parents[2]
CODE = """
import json
from tests.helpers.training import on_these_devices
print(json.dumps(on_these_devices()))
"""


def test_eight_devices_take_the_same_steps():
    flags = "--xla_force_host_platform_device_count=8"
    child = subprocess.Popen(
        [sys.executable, "-c", CODE],
        cwd=ROOT,
        env=environment(XLA_FLAGS=flags),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        _, ours = on_these_devices()  # while the child runs
        out, errors = child.communicate()
    finally:
        child.kill()
    assert child.returncode == 0, errors
    shared, theirs = json.loads(out)
    # As many devices as divide the rows 1, 5, 6, 8, 12, 24, 17.
    assert shared == [1, 5, 6, 8, 6, 8, 1]
    for a, b in zip(theirs, ours, strict=True):
        assert np.allclose(a, b, rtol=1e-5, atol=1e-6)
