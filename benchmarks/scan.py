"""Time, memory, compile time and error of the selective scan, against the length of the sequence.

    python benchmarks/scan.py            # measures everything, about ten minutes
    python benchmarks/scan.py --quick    # one short length, to see that it runs; writes nothing

Every method of selective_scan that runs on this machine, beside three others: "plain lax.scan" (the
state as (b, d, n), differentiated by JAX), "transformers" (the PyTorch loop that its Mamba falls
back to, where both packages are installed), and "exponentials" (the b·l·d·n exponentials of the
recurrence, added up and nothing else: what no exact method can go below). "associative" is
`lax.associative_scan` on all states written out, differentiated by JAX.

Each point is measured in a fresh process: the peak of one cannot hide that of another. A point is
left out, and the reason recorded, where it would need more than 6 GB or more than half a minute.
"pallas" needs an accelerator; what was not run is not in the file. Writes
benchmarks/results/scan.json and, for the chapters, the same rows with fewer columns to
mamba_book/data/scan.json.
"""

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from _report import head, load_average, write

ROOT = Path(__file__).resolve().parents[1]
FULL = ROOT / "benchmarks" / "results" / "scan.json"
PACKAGED = ROOT / "mamba_book" / "data" / "scan.json"

OURS = ["sequential", "chunked", "associative"]
METHODS = [*OURS, "plain lax.scan", "transformers", "exponentials"]
PASSES = ["forward", "forward+backward"]
LENGTHS = [64, 256, 512, 1024, 2048, 4096, 16384, 65536]
WIDTH = (1, 256, 16)  # b, d, n of the curves
LAYER = (1, 2048, 1536, 16)  # b, l, d, n: one layer of the 130m model
TRAINING = (64, 256, 128, 16)  # many short rows: the synthetic tasks
QUICK = [(1, 128, 64, 16)]
SECONDS = 0.7  # repeat a point for about so long, at least 3 and at most 50 times
GIGABYTES = 6.0
# Arrays of size b·l·d·n that a method holds at its peak, as its compiled program says.
STATES = {
    ("associative", "forward"): 5,
    ("associative", "forward+backward"): 13,
    ("plain lax.scan", "forward+backward"): 4,
    ("transformers", "forward"): 5,
    ("transformers", "forward+backward"): 8,
}
# The largest b · l · d that takes less than half a minute, compilation included.
# PyTorch's gradient of the loop writes a zero array as large as all states at every step: O(l²).
LIMITS = {
    ("transformers", "forward"): 2048 * 1536,
    ("transformers", "forward+backward"): 512 * 256,
    ("associative", "forward"): 16384 * 256,
    ("associative", "forward+backward"): 16384 * 256,
}


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


def exponentials(x, delta, A, B, C, D):
    import jax.numpy as jnp

    return jnp.exp(delta[:, :, None] * A.T).sum()


def random_inputs(b, l, d, n):
    rng = np.random.default_rng(0)
    delta = np.exp(rng.uniform(np.log(1e-3), np.log(0.1), (b, l, d)))
    A = -np.tile(np.arange(1.0, n + 1), (d, 1))
    x, B, C, D = (rng.normal(size=s) for s in ((b, l, d), (b, l, n), (b, l, n), (d,)))
    return [v.astype(np.float32) for v in (x, delta, A, B, C, D)]


def reference(x, delta, A, B, C, D):
    """y in float64, by a NumPy loop over time."""
    x, delta, A, B, C, D = (v.astype(np.float64) for v in (x, delta, A, B, C, D))
    h, y = np.zeros((len(x), *A.shape)), np.empty_like(x)
    for t in range(x.shape[1]):
        decay = np.exp(delta[:, t, :, None] * A)  # (b, d, n)
        h = decay * h + (delta[:, t] * x[:, t])[..., None] * B[:, t, None]  # (b, d, n)
        y[:, t] = (h @ C[:, t, :, None])[..., 0]
    return y + D * x


def prepare_jax(method, which, inputs):
    """-> a function that runs the point once, and what compiling it says about it."""
    import jax

    from mamba import selective_scan

    others = {"plain lax.scan": plain, "exponentials": exponentials}

    def run(*inputs):
        if method in others:
            return others[method](*inputs)
        return selective_scan(*inputs, method=method)

    if which == "forward":
        function = run
    else:
        function = jax.value_and_grad(lambda *v: (run(*v) ** 2).sum(), argnums=range(6))
    inputs = jax.block_until_ready(jax.device_put(inputs))
    start = time.perf_counter()
    compiled = jax.jit(function).lower(*inputs).compile()
    compile_s = time.perf_counter() - start
    plan = compiled.memory_analysis()
    return lambda: jax.block_until_ready(compiled(*inputs)), {
        "compile_s": round(compile_s, 3),
        # what the compiled program allocates besides its inputs: exact, and the same on every run
        "program_bytes": plan.temp_size_in_bytes + plan.output_size_in_bytes,
    }


def prepare_torch(which, inputs):
    import torch
    from transformers.models.mamba.modeling_mamba import mamba_selective_scan

    x, delta, A, B, C, D = (torch.tensor(v) for v in inputs)
    arguments = [x.mT.contiguous(), delta.mT.contiguous(), A, B.mT.contiguous()]
    arguments += [C.mT.contiguous(), D]

    def forward():
        with torch.no_grad():
            return mamba_selective_scan(*arguments).mT

    def forward_and_backward():
        for v in arguments:
            v.grad = None
            v.requires_grad_()
        (mamba_selective_scan(*arguments) ** 2).sum().backward()

    return forward if which == "forward" else forward_and_backward, {}


def measure(method, which, b, l, d, n):
    """One point, in this process: -> dict of run times, memory and error."""
    inputs = random_inputs(b, l, d, n)
    if method == "transformers":
        run, report = prepare_torch(which, inputs)
    else:
        run, report = prepare_jax(method, which, inputs)
    before = _reset_peak()
    start = time.perf_counter()
    y = run()
    first = time.perf_counter() - start
    peak = _status("VmHWM")
    if which == "forward" and method != "exponentials":
        exact = reference(*inputs)
        error = np.abs(np.asarray(y, np.float64) - exact).max() / np.abs(exact).max()
        report["relative_error"] = float(f"{error:.2e}")
    del y

    times, cpu = [], time.process_time()
    for _ in range(max(3, min(50, int(SECONDS / first)))):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    cpu = (time.process_time() - cpu) / len(times)  # the mean: this clock is coarse
    return report | {
        "min_ms": round(1e3 * min(times), 3),
        "median_ms": round(1e3 * statistics.median(times), 3),
        "mean_cpu_ms": round(1e3 * cpu, 3),  # of all threads together
        "runs": len(times),
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


def why_not(method, which, b, l, d, n):
    """The reason to leave a point out, or None."""
    if STATES.get((method, which), 0) * 4 * b * l * d * n > GIGABYTES * 1e9:
        return "memory"
    if b * l * d > LIMITS.get((method, which), b * l * d):
        return "time"


def in_child(*point):
    """`measure` in a fresh process."""
    command = [sys.executable, str(Path(__file__).resolve()), "--point", json.dumps(point)]
    env = dict(os.environ, JAX_PLATFORMS="cpu")
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{point}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure_all(shapes):
    installed = all(importlib.util.find_spec(p) for p in ("torch", "transformers"))
    for shape in shapes:
        for which in PASSES:
            for method in METHODS:  # neighbours in time, so that their ratio is worth more
                if method == "transformers" and not installed:
                    continue
                if (method, which) == ("exponentials", "forward+backward"):
                    continue
                b, l, d, n = shape
                result = {"method": method, "pass": which, "b": b, "l": l, "d": d, "n": n}
                reason = why_not(method, which, *shape)
                result |= {"skipped": reason} if reason else in_child(method, which, *shape)
                print(json.dumps(result), flush=True)
                yield result


def ratios(results):
    """What the module is held to, for one layer: how many times the others take, and so on."""
    rows = {}
    for r in results:
        if (r["b"], r["l"], r["d"], r["n"]) == LAYER and "min_ms" in r:
            rows[r["method"], r["pass"]] = r
    ours = {which: rows["sequential", which] for which in PASSES}
    times = {
        f"{method} / sequential, {which}": rows[method, which]["min_ms"] / ours[which]["min_ms"]
        for which in PASSES
        for method in METHODS[1:5]
        if (method, which) in rows
    }
    floor = rows["exponentials", "forward"]["min_ms"]
    times["sequential / exponentials, forward"] = ours["forward"]["min_ms"] / floor
    memory = [rows[m, PASSES[1]]["program_bytes"] for m in ("associative", "sequential")]
    curve = [
        r["min_ms"] / r["l"]
        for r in results
        if r["method"] == "sequential" and r["pass"] == "forward+backward"
        if (r["b"], r["d"], r["n"]) == WIDTH and r["l"] >= 512
    ]
    return {k: round(v, 2) for k, v in times.items()} | {
        "associative / sequential, memory of forward+backward": round(memory[0] / memory[1], 1),
        "sequential, compile_s of forward+backward": ours["forward+backward"]["compile_s"],
        "sequential, largest over smallest time per token from l = 512": round(
            max(curve) / min(curve), 2
        ),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a short length only, writes nothing")
    parser.add_argument("--note", default="", help="what else ran on the machine meanwhile")
    parser.add_argument("--point", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.point:
        print(json.dumps(measure(*json.loads(args.point))))
        return
    if args.quick:
        list(measure_all(QUICK))
        return
    load = load_average()
    b, d, n = WIDTH
    results = list(measure_all([LAYER, TRAINING, *((b, l, d, n) for l in LENGTHS)]))
    report = head(args.note, load) | {"ratios": ratios(results)}
    print(json.dumps(report["ratios"], indent=1))
    write(FULL, report, results)
    keys = "method pass b l d n skipped min_ms median_ms mean_cpu_ms compile_s program_bytes"
    keys = [*keys.split(), "relative_error"]
    write(PACKAGED, report, [{k: r[k] for k in keys if k in r} for r in results])


if __name__ == "__main__":
    main()
