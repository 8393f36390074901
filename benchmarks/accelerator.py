"""Check the GPU or TPU of this machine, then measure it: in ten minutes, one JSON and one table.

    python benchmarks/accelerator.py            # on a machine that has one
    python benchmarks/accelerator.py --quick    # small sizes on any machine: shows that it runs

First whether the machine computes what the equations say (``_correct.py``). What does not, or does
not run at all, is named and not measured, and the exit status is 1. Then how fast it reads and
copies memory and computes exponentials, and the time of selective_scan by every method at the width
of the 130m model, with the gate: forward, and with gradients; beside it the least time in which the
inputs could be read and the outputs written, and how many times as long "associative" takes. Then
the scans of Mamba-2 and Mamba-3; prefill and decoding of models with random weights, of the 130m
shape and Mamba-3's 187m.

A time is that of one call among several in a row, at best. A call takes the host some 20 µs, so
that nothing shorter is seen. A point is left out, and the reason recorded, where it would not fit
the memory or take more than two seconds, where the check of its method failed, or when the time is
up (--minutes). The scans of float32 and one row come first. Needs a checkout, and a JAX for the
machine; writes benchmarks/results/accelerator/NAME.json and the same to mamba_book/data for
chapter 9, or the file of --out. How to send it: book/measure_your_gpu.ipynb.
"""

import argparse
import re
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # nothing need be installed

import jax
import jax.numpy as jnp
from _correct import checks, has_mosaic, mosaic_scan
from _measure import measure_model, read_bytes_per_s
from _report import head, load_average, record, write
from hardware import exponentials

from mamba import Mamba2Config, Mamba3Config, MambaConfig, selective_scan
from mamba.scan import method_for
from mamba.ssd import ssd
from mamba.trapezoid import trapezoidal_scan

METHODS = ["pallas", "associative", "chunked", "sequential"]
PASSES = ["forward", "forward+backward"]
LENGTHS, WIDTH, STATES = [512, 2048, 8192, 65536], 1536, 16
HEADS = {"h": 24, "p": 64, "n": 128}  # of Mamba-2 and Mamba-3, at the same width
SHAPE = {"d_model": 768, "n_layer": 24, "vocab_size": 50277}
MODELS = {
    "Mamba 130m": partial(MambaConfig, **SHAPE),
    "Mamba-2 130m": partial(Mamba2Config, **SHAPE),
    "Mamba-3 187m": partial(
        Mamba3Config, d_model=768, n_layer=12, vocab_size=128256, d_intermediate=1536
    ),
}
QUICK_MODELS = {"Mamba, small": partial(MambaConfig, d_model=16, n_layer=1, vocab_size=99)}
# (b, l, d, n) float32 arrays that a method holds at its peak; the others hold some (b, l, d).
HELD = {("associative", "forward"): 5, ("associative", "forward+backward"): 13}
LONGEST_CALL, LONGEST_ROW, ROWS = 2.0, 0.1, 3  # seconds of a call, of calls in a row; rows
SHARE = 0.8  # of the memory that a point may fill


def random_arrays(dtype, **shapes):
    """Normal numbers, drawn on the accelerator; "delta" from 0.001 to 0.1."""
    keys = jax.random.split(jax.random.key(0), len(shapes))
    arrays = {}
    for key, (name, shape) in zip(keys, shapes.items(), strict=True):
        if name == "delta":
            v = jnp.exp(jax.random.uniform(key, shape, minval=np.log(1e-3), maxval=np.log(0.1)))
        else:
            v = jax.random.normal(key, shape)
        arrays[name] = v.astype(dtype)
    return arrays


def milliseconds(function, inputs):
    """The least time of a call among several in a row."""
    compiled = jax.jit(function).lower(*inputs).compile()

    def row(calls):
        start = time.perf_counter()
        for _ in range(calls):
            out = compiled(*inputs)
        jax.block_until_ready(out)
        return (time.perf_counter() - start) / calls

    row(1)
    calls = max(1, min(200, int(LONGEST_ROW / row(1))))
    return 1e3 * min(row(calls) for _ in range(ROWS))


def limits(quick):
    """Bytes per second, of reading and of a copy (which reads and writes); exponentials per second.

    The exponentials are those of a scan, added up at once: nothing large is written.
    """
    side = 2**12 if quick else 2**14
    copy = milliseconds(lambda v: v + 1, [jnp.ones((side, side))])
    l, d, n = (64, 64, 4) if quick else (LENGTHS[2], WIDTH, STATES)
    v = random_arrays("float32", delta=(1, l, d), A=(n, d), C=(1, l, n))
    exps = milliseconds(exponentials, [v["delta"], v["A"], v["C"]])
    return {
        "read": read_bytes_per_s(),
        "copy": round(2 * 4 * side**2 / (copy / 1e3)),
        "exponentials": round(l * d * n / (exps / 1e3)),
    }


# --- the points -----------------------------------------------------------------------------------


def with_gradients(function):
    """A function of arrays -> y and the gradients of its sum of squares in all of them."""

    def loss(arrays):
        y = function(**arrays)
        return (y.astype(jnp.float32) ** 2).sum(), y

    return jax.grad(loss, has_aux=True)


def scan_points(quick):
    """(what it is, the function, the shapes, the least bytes) for every point of selective_scan."""
    d, n = (64, 4) if quick else (WIDTH, STATES)
    names = METHODS + ["mosaic"] * has_mosaic()
    for dtype in ["float32"] if quick else ["float32", "bfloat16"]:
        size = jnp.dtype(dtype).itemsize
        for b in [1] if quick else [1, 8]:
            for l in [16] if quick else LENGTHS:
                shapes = {"x": (b, l, d), "delta": (b, l, d), "A": (d, n), "B": (b, l, n)}
                shapes |= {"C": (b, l, n), "D": (d,), "z": (b, l, d)}
                for method in names:
                    for which in PASSES[: 1 if method == "mosaic" else 2]:
                        wide, narrow = (4, 2) if which == "forward" else (11, 6)
                        least = size * (wide * b * l * d + narrow * b * l * n)
                        what = {"of": "scan", "method": method, "pass": which, "dtype": dtype}
                        yield what | {"b": b, "l": l, "d": d, "n": n}, shapes, least


def head_points(quick):
    """The same for the scans of Mamba-2 and Mamba-3, by their own choice of method."""
    h, p, n = (2, 8, 8) if quick else HEADS.values()
    for l in [] if quick else LENGTHS[1:3]:
        for b in (1, 8):
            for of, r in (("ssd", 1), ("trapezoidal_scan", 1), ("trapezoidal_scan", 4)):
                rows, narrow = ((h, r, p), (h, r, n)) if of != "ssd" else ((h, p), (1, n))
                shapes = {"x": (b, l, *rows), "delta": (b, l, h)}
                shapes |= {"B": (b, l, *narrow), "C": (b, l, *narrow)}
                if of == "ssd":
                    shapes |= {"A": (h,)}
                else:
                    shapes |= {"A": (b, l, h), "lam": (b, l, h), "theta": (b, l, h, n // 4)}
                numbers = sum(np.prod(shape) for shape in shapes.values())
                for which in PASSES:
                    y = np.prod(shapes["x"])
                    least = 4 * (numbers + y if which == "forward" else 3 * numbers + 2 * y)
                    what = {"of": of, "r": r, "pass": which, "dtype": "float32", "b": b, "l": l}
                    yield what | {"h": h, "p": p, "n": n}, shapes, int(least)


def function_of(what):
    """The function of named arrays that a point measures."""
    if what["of"] == "scan":
        if what["method"] == "mosaic":
            return lambda **v: mosaic_scan(**v)[0]
        scan = partial(selective_scan, method=what["method"])
    elif what["of"] == "ssd":
        scan = ssd
    else:
        scan = partial(trapezoidal_scan, pairs="interleaved" if what["r"] == 1 else "halves")

    def run(A, **arrays):
        if what["of"] == "trapezoidal_scan":
            arrays["lam"] = jax.nn.sigmoid(arrays["lam"])
        return scan(A=-jnp.exp(A), **arrays)

    return run


class Points:
    """Measures points one after another, and knows which to leave out.

    until: the end of the time, as ``time.monotonic`` counts; wrong: methods whose check failed.
    """

    def __init__(self, bytes_per_s, memory, until, wrong=()):
        self.bytes_per_s, self.memory, self.until = bytes_per_s, memory, until
        self.wrong, self.known = wrong, {}

    def why_not(self, what, least):
        """The reason to leave a point out, or None."""
        if time.monotonic() > self.until:
            return "time is up"
        if what.get("method", what["of"]) in self.wrong:
            return "wrong"
        held = HELD.get((what.get("method"), what["pass"]), 0)
        held = least + 4 * held * what["b"] * what["l"] * what.get("d", 0) * what["n"]
        if self.memory and held > SHARE * self.memory:
            return "memory"
        shorter = self.known.get(self.series(what))
        if shorter and shorter[1] * what["l"] / shorter[0] > 1e3 * LONGEST_CALL:
            return "two seconds"

    def series(self, what):
        return tuple(v for k, v in what.items() if k != "l")

    def measure(self, what, shapes, least):
        """-> the point's row."""
        if reason := self.why_not(what, least):
            return what | {"skipped": reason}
        run = function_of(what)
        run = with_gradients(run) if what["pass"] != "forward" else lambda v, run=run: run(**v)
        try:
            ms = milliseconds(run, [random_arrays(what["dtype"], **shapes)])
        except Exception as error:
            if "RESOURCE_EXHAUSTED" in str(error) or "out of memory" in str(error).lower():
                return what | {"skipped": "memory"}
            return what | {"error": f"{type(error).__name__}: {str(error)[:200]}"}
        self.known[self.series(what)] = what["l"], ms
        limit = 1e3 * least / self.bytes_per_s
        return what | {"ms": float(f"{ms:.4g}"), "of_limit": float(f"{limit / ms:.3g}")}


def beside_associative(rows):
    """The same rows; those of a scan say how many times as long "associative" takes."""

    def place(row):
        return tuple(row[k] for k in ("pass", "dtype", "b", "l"))

    tree = {place(r): r["ms"] for r in rows if r.get("method") == "associative" and "ms" in r}
    return [
        r | {"faster_than_associative": float(f"{tree[place(r)] / r['ms']:.3g}")}
        if r["of"] == "scan" and "ms" in r and place(r) in tree
        else r
        for r in rows
    ]


def fastest(rows):
    """The method of selective_scan that is the fastest at most points; None if none was measured.

    "auto" stands for it (``mamba.scan.method_for``).
    """
    best = {}
    for r in rows:
        if r["of"] == "scan" and "ms" in r and r["method"] != "mosaic":
            place = tuple(r[k] for k in ("pass", "dtype", "b", "l"))
            best[place] = min(best.get(place, (np.inf, "")), (r["ms"], r["method"]))
    counts = Counter(method for _, method in best.values())
    return counts.most_common(1)[0][0] if counts else None


def table(rows):
    """The scans as lines of a Markdown table: time, share of the limit, times "associative"."""
    yield "| dtype | b | l | pass | method | ms | of the limit | associative takes |"
    yield "|---|---|---|---|---|---|---|---|"
    for r in rows:
        if r["of"] in ("scan", "ssd", "trapezoidal_scan"):
            name = r.get("method") or r["of"] + (f", r = {r['r']}" if r["r"] > 1 else "")
            start = f"| {r['dtype']} | {r['b']} | {r['l']:,} | {r['pass']} | {name} | "
            if "ms" not in r:
                yield start + f"{r.get('skipped', 'does not run')} | | |"
                continue
            times = r.get("faster_than_associative")
            times = f"{times:.3g}×" if times else ""
            yield start + f"{r['ms']:.4g} | {r['of_limit']:.0%} | {times} |"


# --- all of it ------------------------------------------------------------------------------------


def wrong_methods(rows):
    """The methods and scans that are not to be measured, since a check of theirs failed."""
    wrong = set()
    for r in rows:
        if r["of"] == "check" and not r["correct"]:
            scan, *method = r["check"].split()[:2]
            wrong |= {"mosaic"} if scan == "mosaic" else set()
            wrong |= set(method) if scan == "selective_scan" else {scan}
    return wrong


def measure(quick, until):
    """-> rows, as they come."""
    rows = []

    def say(row, text):
        rows.append(row)
        print(text, flush=True)

    for row in checks(quick):
        errors = ", ".join(f"{k} {v:.0e}" for k, v in row.items() if isinstance(v, float))
        verdict = "right" if row["correct"] else "DOES NOT RUN" if "error" in row else "WRONG"
        say({"of": "check"} | row, f"{verdict}  {row['check']}  {row.get('error', errors)}")
    rates = limits(quick)
    giga = {name: f"{rate / 1e9:,.0f}" for name, rate in rates.items()}
    say(
        {"of": "limits"} | rates,
        f"{giga['read']} GB/s read, {giga['copy']} copied, {giga['exponentials']} G exp/s",
    )
    memory = (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
    points = Points(max(rates["read"], rates["copy"]), memory, until, wrong_methods(rows))

    def run(given):
        for point in given:
            row = points.measure(*point)
            say(row, " ".join(f"{k}={v}" for k, v in row.items()))

    one_row, others = [], []
    for point in scan_points(quick):
        first = point[0]["dtype"] == "float32" and point[0]["b"] == 1
        (one_row if first else others).append(point)
    run(one_row)
    for name, config in (QUICK_MODELS if quick else MODELS).items():
        for dtype in ["float32"] if quick else ["float32", "bfloat16"]:
            row = {"of": "model", "model": name, "dtype": dtype}
            if time.monotonic() > until:
                row |= {"skipped": "time is up"}
            else:
                row |= measure_model(config(dtype=jnp.dtype(dtype)), rates["read"])
            say(row, " ".join(f"{k}={v}" for k, v in row.items()))
    run(head_points(quick))
    run(others)
    return beside_associative(rows)


def main():
    """Check, measure, write; -> the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, on any machine")
    parser.add_argument("--minutes", type=float, default=9, help="no new point after (default: 9)")
    parser.add_argument("--note", default="", help="what a reader must know: cloud, power limit")
    parser.add_argument("--out", type=Path, help="write this file, and no other")
    args = parser.parse_args()
    device, load = jax.devices()[0], load_average()
    if device.platform == "cpu" and not args.quick:
        print("there is no GPU or TPU that this JAX can use: see --quick, and JAX's installation")
        return 2
    print(f"{device.device_kind} ({device.platform}), jax {jax.__version__}")
    start = time.monotonic()
    rows = measure(args.quick, start + 60 * args.minutes)
    broken = [r for r in rows if "error" in r]
    wrong = [r for r in rows if r.get("correct") is False and r not in broken]
    print("\n".join(table(rows)))
    for r in broken + wrong:
        print("DOES NOT RUN" if r in broken else "WRONG", r)
    stats = device.memory_stats() or {}
    report = head(args.note, load, f"{device.device_kind} ({device.platform})") | {
        "platform": device.platform,
        "device_memory_bytes": stats.get("bytes_limit"),
        "correct": not wrong,
        "does_not_run": sorted({r.get("check") or r.get("method", r["of"]) for r in broken}),
        "fastest": fastest(rows),
        "auto": method_for(device.platform),
        "minutes": round((time.monotonic() - start) / 60, 1),
    }
    method, backing = report["auto"]
    print(f"{report['minutes']} minutes; the fastest method at most points: {report['fastest']}")
    print(f"method='auto' takes {method!r} here, {'by ' + backing if backing else 'unmeasured'}")
    if args.out:
        write(args.out, report, rows)
    elif not args.quick:
        name = re.sub(r"[^a-z0-9]+", "-", device.device_kind.lower()).strip("-")
        record(f"accelerator/{name}-jax-{jax.__version__}", report, rows)
    return bool(wrong or broken)


if __name__ == "__main__":
    sys.exit(main())
