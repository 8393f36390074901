"""Two processes of four devices each, over the loopback, take the steps of one device."""

import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np

from mamba.train.saves import SAVES
from tests.helpers.training import environment, run_in_two_processes

ROOT = Path(__file__).resolve().parents[2]
CODE = """
import sys
import jax
jax.config.update("jax_num_cpu_devices", 4)
jax.distributed.initialize(f"localhost:{sys.argv[1]}", 2, int(sys.argv[2]))
from tests.helpers.training import run_in_two_processes
run_in_two_processes(sys.argv[3])
"""


def start(folder):
    """The two processes."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    return [
        subprocess.Popen(
            [sys.executable, "-c", CODE, str(port), str(i), str(folder)],
            cwd=ROOT,
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        for i in range(2)
    ]


def end(children):
    for child in children:
        child.kill()
        child.wait()


def test_one_of_two_processes_is_killed_and_both_are_started_again(tmp_path):
    children = start(tmp_path)
    try:
        while not any(path.name.isdecimal() for path in (tmp_path / SAVES).glob("*")):
            assert all(child.poll() is None for child in children), children[0].stderr.read()
            time.sleep(0.02)
        children[1].kill()
        assert children[1].wait() == -signal.SIGKILL
    finally:
        end(children)
    assert not (tmp_path / "params.npz").exists()
    children = start(tmp_path)
    try:
        expected = jax.tree.leaves(run_in_two_processes(None).params)
        errors = [child.communicate()[1] for child in children]
    finally:
        end(children)
    assert [child.returncode for child in children] == [0, 0], errors
    with np.load(tmp_path / "params.npz") as file:
        for ours, one in zip(file.values(), expected, strict=True):
            assert np.allclose(ours, one, rtol=1e-5, atol=1e-6)
