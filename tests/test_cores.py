"""Every core of the CPU: when JAX may be divided, and a scan whose channels are shared out."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mamba import selective_scan, use_every_core
from mamba.cores import over_channels
from mamba.ssd import ssd
from mamba.trapezoid import TrapezoidState, trapezoidal_scan
from tests.helpers.training import environment

ROOT = Path(__file__).resolve().parents[1]
CODE = """
import json
import mamba
mamba.use_every_core(2)
mamba.use_every_core(2)  # again is no error
from mamba.cores import over_channels
from tests.test_cores import results
print(json.dumps(results(over_channels)))
"""
SCANS = {
    "selective_scan": (selective_scan, {"method": "sequential"}, "h0"),
    "ssd": (ssd, {"method": "chunked", "chunk": 4}, "h0"),
    "ssd, groups": (ssd, {"method": "chunked", "chunk": 4}, "h0"),
    "trapezoidal_scan": (trapezoidal_scan, {"method": "chunked", "pairs": "halves"}, "state"),
}


def inputs(name):
    """Random arrays for a scan of 4 channels or heads, an odd length and two rows."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    b, l, d, n, p = 2, 7, 4, 4, 3
    delta = jnp.exp(normal(b, l, d))
    resets = jnp.asarray(rng.random((b, l)) < 0.2)
    if name == "selective_scan":
        arrays = {"x": normal(b, l, d), "A": -jnp.exp(normal(d, n)), "B": normal(b, l, n)}
        arrays |= {"C": normal(b, l, n), "z": normal(b, l, d), "h0": normal(b, d, n)}
    elif name.startswith("ssd"):
        g = 2 if "groups" in name else 1
        arrays = {"x": normal(b, l, d, p), "A": -jnp.exp(normal(d)), "B": normal(b, l, g, n)}
        arrays |= {"C": normal(b, l, g, n), "h0": normal(b, d, p, n)}
    else:
        arrays = {"x": normal(b, l, d, 2, p), "A": -jnp.exp(normal(b, l, d))}
        arrays |= {"lam": jax.nn.sigmoid(normal(b, l, d)), "theta": normal(b, l, d, 2)}
        arrays |= {"B": normal(b, l, d, 2, n), "C": normal(b, l, d, 2, n)}
        arrays["state"] = TrapezoidState(
            normal(b, d, 2), normal(b, d, p, n), normal(b, d, 2, n), normal(b, d, 2, p)
        )
    return arrays | {"delta": delta, "D": normal(d)}, resets


def results(wrap=lambda scan: scan):
    """y, the last state and all gradients, of each scan -> {name: lists of numbers}."""
    found = {}
    for name, (scan, options, _) in SCANS.items():
        arrays, resets = inputs(name)
        scan = wrap(scan)

        def loss(arrays, scan=scan, resets=resets, options=options):
            y, state = scan(**arrays, resets=resets, return_state=True, **options)
            total = sum((v**2).sum() for v in jax.tree.leaves((y, state)))
            return total, (y, state)

        gradients, outputs = jax.jit(jax.grad(loss, has_aux=True))(arrays)
        found[name] = [np.asarray(v).tolist() for v in jax.tree.leaves((gradients, outputs))]
    return found


def test_two_devices_share_the_channels_of_every_scan():
    child = subprocess.Popen(
        [sys.executable, "-c", CODE],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        ours = results()  # while the child runs
        out, errors = child.communicate()
    finally:
        child.kill()
    assert child.returncode == 0, errors
    theirs = json.loads(out)
    for name in SCANS:
        for a, b in zip(theirs[name], ours[name], strict=True):
            assert np.allclose(a, b, rtol=2e-5, atol=2e-5), name


def test_devices_that_cannot_share_equally(monkeypatch):
    n = jax.device_count()
    arrays, _ = inputs("ssd")
    monkeypatch.setattr(jax, "devices", lambda: [jax.local_devices()[0]] * 3)
    with pytest.raises(ValueError, match="3 devices cannot share the 4 channels of x equally"):
        over_channels(ssd)(**arrays)
    assert n == jax.device_count()


def test_too_late():
    n = jax.device_count("cpu")
    with pytest.raises(RuntimeError, match=f"started already, with {n} CPU devices instead of 99"):
        use_every_core(99)
    use_every_core(n)


@pytest.mark.parametrize("flag", ["XLA_FLAGS", "jax_num_cpu_devices"])
def test_what_somebody_has_set_stays(monkeypatch, flag):
    """Otherwise this would be refused: JAX has started."""
    monkeypatch.setattr("mamba.cores.os.sched_getaffinity", lambda _: range(99), raising=False)
    with pytest.raises(RuntimeError, match="instead of 99"):
        use_every_core()
    if flag == "XLA_FLAGS":
        monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=3")
    else:
        monkeypatch.setattr("mamba.cores.jax.config", type("", (), {"jax_num_cpu_devices": 3}))
    use_every_core()
