"""Time and memory of three ways to run the selective scan, against the length of the sequence.

    python benchmarks/scan_methods.py            # measures everything, about three minutes
    python benchmarks/scan_methods.py --quick    # three short lengths, to see that it runs

Three methods: "plain lax.scan" (state (b, d, n), JAX differentiates it), and selective_scan's own
"sequential" and "associative". Each point is measured in a process of its own, so that the peak of
one is not hidden by that of another. Writes benchmarks/results/scan_methods.json (everything) and
mamba_book/data/scan_methods.json (what the chapter on the parallel scan draws); after a new
measurement run that chapter again: python book/run.py book/04_parallel_scan.ipynb.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from machine import describe_run

ROOT = Path(__file__).resolve().parents[1]
FULL = ROOT / "benchmarks" / "results" / "scan_methods.json"
PACKAGED = ROOT / "mamba_book" / "data" / "scan_methods.json"

METHODS = ["plain lax.scan", "sequential", "associative"]
PASSES = ["forward", "forward+backward"]
SMALL = [(1, l, 256, 16) for l in (64, 128, 256, 512, 1024, 2048, 4096)]  # (b, l, d, n)
LAYER = (1, 2048, 1536, 16)  # one layer of the 130m model
SECONDS = 3.0  # repeat a point for about so long, at least 3 and at most 50 times


def plain(x, delta, A, B, C, D):
    """The recurrence through `lax.scan`, as one would first write it; JAX differentiates it."""
    import jax
    import jax.numpy as jnp

    def step(h, inputs):
        x_t, delta_t, B_t, C_t = inputs
        decay = jnp.exp(delta_t[..., None] * A)  # (b, d, n)
        h = decay * h + (delta_t * x_t)[..., None] * B_t[:, None]  # (b, d, n)
        return h, jnp.einsum("bdn,bn->bd", h, C_t)

    h0 = jnp.zeros((x.shape[0], *A.shape))
    _, y = jax.lax.scan(step, h0, tuple(v.swapaxes(0, 1) for v in (x, delta, B, C)))
    return y.swapaxes(0, 1) + D * x  # (b, l, d)


def random_inputs(b, l, d, n):
    import jax.numpy as jnp
    import numpy as np

    rng = np.random.default_rng(0)
    delta = np.exp(rng.uniform(np.log(1e-3), np.log(0.1), (b, l, d)))
    A = -np.tile(np.arange(1.0, n + 1), (d, 1))
    x, B, C, D = (rng.normal(size=s) for s in ((b, l, d), (b, l, n), (b, l, n), (d,)))
    return tuple(jnp.asarray(v, jnp.float32) for v in (x, delta, A, B, C, D))


def measure(method, which, b, l, d, n):
    """One point, in this process: -> dict of compile time, run times (s) and memory (bytes)."""
    import jax

    from mamba import selective_scan

    def run(*inputs):
        if method == "plain lax.scan":
            return plain(*inputs)
        return selective_scan(*inputs, method=method)

    if which == "forward":
        function = run
    else:
        function = jax.value_and_grad(lambda *inputs: (run(*inputs) ** 2).sum(), argnums=range(6))
    inputs = jax.block_until_ready(random_inputs(b, l, d, n))

    start = time.perf_counter()
    compiled = jax.jit(function).lower(*inputs).compile()
    compile_s = time.perf_counter() - start
    plan = compiled.memory_analysis()
    before = _reset_peak()
    first = time.perf_counter()
    jax.block_until_ready(compiled(*inputs))
    first = time.perf_counter() - first
    peak = _status("VmHWM")

    times, cpu = [], time.process_time()
    for _ in range(max(3, min(50, int(SECONDS / first)))):
        start = time.perf_counter()
        jax.block_until_ready(compiled(*inputs))
        times.append(time.perf_counter() - start)
    cpu = (time.process_time() - cpu) / len(times)  # the mean: this clock is coarse
    return {
        "method": method,
        "pass": which,
        "b": b,
        "l": l,
        "d": d,
        "n": n,
        "compile_s": round(compile_s, 3),
        "min_ms": round(1e3 * min(times), 3),
        "median_ms": round(1e3 * statistics.median(times), 3),
        "mean_cpu_ms": round(1e3 * cpu, 3),  # of all threads together
        "runs": len(times),
        # what the compiled program allocates besides its inputs: exact, and the same on every run
        "program_bytes": plan.temp_size_in_bytes + plan.output_size_in_bytes,
        # what the process really grew by while it ran once (Linux; includes what JAX keeps around)
        "peak_growth_bytes": peak - before if peak and before else None,
    }


def _reset_peak():
    """Make the process's peak memory start from now (Linux). -> memory in use, bytes, or None."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return _status("VmRSS")


def _status(key):
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(key + ":"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def in_child(point):
    """`measure` in a fresh process."""
    command = [sys.executable, str(Path(__file__).resolve()), "--point", json.dumps(point)]
    env = dict(os.environ, JAX_PLATFORMS="cpu")
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{point}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="short lengths only, writes nothing")
    parser.add_argument("--note", default="", help="what else ran on the machine meanwhile")
    parser.add_argument("--point", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.point:
        print(json.dumps(measure(*json.loads(args.point))))
        return
    load = [round(v, 1) for v in os.getloadavg()[:1]]
    results = []
    for shape in SMALL[:3] if args.quick else [*SMALL, LAYER]:
        for which in PASSES:
            for method in METHODS:  # neighbours in time, so that their ratio is worth more
                result = in_child([method, which, *shape])
                results.append(result)
                print(
                    f"l={shape[1]:5d} d={shape[2]:4d} {which:17s}{method:15s}"
                    f"{result['min_ms']:10.2f} ms  {result['program_bytes'] / 2**20:9.1f} MiB"
                    f"  compiled in {result['compile_s']:.1f} s",
                    flush=True,
                )
    if args.quick:
        return
    load.append(round(os.getloadavg()[0], 1))
    report = describe_run() | {
        "device": "CPU only; nothing here was measured on a GPU or TPU",
        "note": args.note,
        "load_average_before_and_after": load,
    }
    _write(FULL, report | {"results": results})
    keys = ["method", "pass", "l", "d", "min_ms", "median_ms", "mean_cpu_ms", "program_bytes"]
    drawn = [{k: r[k] for k in keys} for r in results]
    _write(PACKAGED, report | {"results": drawn})


def _write(path, report):
    """One result per line: readable, and a new measurement is a readable diff."""
    head = json.dumps({k: v for k, v in report.items() if k != "results"}, indent=1)
    rows = ",\n".join("  " + json.dumps(r) for r in report["results"])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(head[:-2] + ',\n "results": [\n' + rows + "\n ]\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
