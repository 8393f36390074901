"""One layer of the 130m model: what the machine can do, and how long each way to scan takes.

    python benchmarks/hardware.py            # about four minutes
    python benchmarks/hardware.py --quick    # a small shape, to see that it runs

Ceilings: bytes read per second (a matrix times a vector, 512 MiB), exponentials per second (those
of the layer, contracted at once and never stored), and seconds per step of a loop that has next to
nothing to do (256 numbers). Methods: those of selective_scan, a plain `lax.scan` that
JAX differentiates, the three-phase scan, and where PyTorch and transformers are installed the loop
of the latter. Layout: the recurrence through one `lax.scan`, forward, with the state as (b, d, n)
or (b, n, d) and the sum over n as an `einsum` or as `.sum()`. Chunk: "sequential" and "chunked"
with chunks of other lengths than their own, forward and backward, time and memory.

All points take turns, in one process: their ratios are worth more than their times. Writes
benchmarks/results/hardware.json, and the same to mamba_book/data for chapters 4 and 9; after a new
measurement run these again: make chapter N=4, make chapter N=9.
"""

import argparse
import importlib.util
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from _report import head, load_average, record
from scan import plain, prepare_torch

from mamba import selective_scan
from mamba.scan import combine

LAYER, QUICK = (1, 2048, 1536, 16), (1, 128, 64, 16)  # (b, l, d, n)
STEPS, NUMBERS = 2**14, 256  # of the loop that has next to nothing to do, and its state
SUMMARIZED = 64  # tokens in a chunk of the three-phase scan
SECONDS, ROUNDS = 0.4, 3  # repeat a point for about so long, 2 to 10 times, in every round


def loop(x, delta, A, B, C, D, *, channels_last, contraction):
    """The recurrence through one `lax.scan`, in either layout."""
    b, _, d = x.shape
    states = "bnd" if channels_last else "bdn"
    axis = states.index("n")
    A = A.T if channels_last else A

    def step(h, inputs):
        x_t, delta_t, B_t, C_t = inputs
        over_states = (lambda v: v[:, None]) if channels_last else (lambda v: v[..., None])
        over_channels = (lambda v: v[..., None]) if channels_last else (lambda v: v[:, None])
        h = jnp.exp(over_states(delta_t) * A) * h + over_states(delta_t * x_t) * over_channels(B_t)
        if contraction == "einsum":
            return h, jnp.einsum(f"{states},bn->bd", h, C_t)
        return h, (h * over_channels(C_t)).sum(axis)

    _, y = jax.lax.scan(
        step, jnp.zeros((b, *A.shape)), tuple(v.swapaxes(0, 1) for v in (x, delta, B, C))
    )
    return y.swapaxes(0, 1) + D * x  # (b, l, d)


def three_phases(x, delta, A, B, C, D, *, keep, T=SUMMARIZED):
    """Every chunk of T tokens at once; a scan of their summaries; every chunk from its first state.

    keep: the third phase applies the prefixes that the first one wrote down, two (b, l, n, d)
    arrays. Otherwise the first phase keeps only its last prefixes, and the third runs the chunks
    once more.
    """
    (b, l, d), A = x.shape, A.T

    def by_step(v):  # (b, l, ...) -> (T, b, l / T, ...)
        return jnp.moveaxis(v.reshape(b, l // T, T, -1), 2, 0)

    def terms(inputs):
        x_t, delta_t, B_t, _ = inputs
        return jnp.exp(delta_t[..., None, :] * A), B_t[..., None] * (delta_t * x_t)[..., None, :]

    def compose(prefix, inputs):
        prefix = combine(prefix, terms(inputs))
        return prefix, prefix if keep else None

    def step(h, inputs):
        a, u = terms(inputs)
        h = a * h + u  # (b, l / T, n, d)
        return h, jnp.einsum("bknd,bkn->bkd", h, inputs[-1])

    inputs = tuple(by_step(v) for v in (x, delta, B, C))
    nothing = jnp.zeros((b, l // T, *A.shape))
    summaries, prefixes = jax.lax.scan(compose, (nothing + 1, nothing), inputs)
    ends = jax.lax.associative_scan(combine, summaries, axis=1)[1]  # (b, l / T, n, d)
    starts = jnp.concatenate([nothing[:, :1], ends[:, :-1]], axis=1)
    if keep:
        y = jnp.einsum("tbknd,tbkn->tbkd", prefixes[0] * starts + prefixes[1], inputs[-1])
    else:
        _, y = jax.lax.scan(step, starts, inputs)
    return jnp.moveaxis(y, 0, 2).reshape(b, l, d) + D * x


def tiny_loop(a, b):
    """h = a_t h + b_t for NUMBERS numbers h and one a_t, b_t a step: (STEPS,), (STEPS,) -> h."""
    h = jnp.zeros(NUMBERS)  # with fewer, XLA makes one function of the whole loop
    return jax.lax.scan(lambda h, step: (step[0] * h + step[1], None), h, (a, b))[0]


def random_inputs(b, l, d, n):
    rng = np.random.default_rng(0)
    delta = np.exp(rng.uniform(np.log(1e-3), np.log(0.1), (b, l, d)))
    A = -np.tile(np.arange(1.0, n + 1), (d, 1))
    x, B, C, D = (rng.normal(size=s) for s in ((b, l, d), (b, l, n), (b, l, n), (d,)))
    return tuple(jnp.asarray(v, jnp.float32) for v in (x, delta, A, B, C, D))


def prepare(function, inputs):
    """-> the compiled function, ready to run, and the memory that it allocates (bytes)."""
    compiled = jax.jit(function).lower(*inputs).compile()
    plan = compiled.memory_analysis()
    memory = {"program_bytes": plan.temp_size_in_bytes + plan.output_size_in_bytes}
    return lambda: jax.block_until_ready(compiled(*inputs)), memory


def seconds(run):
    """Times of several runs, after one that is not counted."""
    run()
    times = []
    while len(times) < 2 or (sum(times) < SECONDS and len(times) < 10):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return times


def exponentials(delta, A, C):
    """Σ_i exp(Δ_t A_i) C_{t,i}, A: (n, d): what any scan computes, less the recurrence."""
    return sum(jnp.exp(delta * A[i]) * C[..., i, None] for i in range(len(A)))  # (b, l, d)


def with_gradients(function):
    return jax.value_and_grad(lambda *inputs: (function(*inputs) ** 2).sum(), argnums=range(6))


def points(inputs, quick):
    """(what it is, the function, its inputs) for every point."""
    side = 1024 if quick else 11585  # squared: 512 MiB of float32
    yield {"of": "memory read"}, jnp.matmul, (jnp.ones((side, side)), jnp.ones(side))
    _, delta, A, _, C, _ = inputs
    yield {"of": "exponentials"}, exponentials, (delta, A.T.copy(), C)
    yield {"of": "steps"}, tiny_loop, (jnp.full(STEPS, 0.5), jnp.ones(STEPS))
    methods = {m: partial(selective_scan, method=m) for m in ("sequential", "chunked")}
    methods |= {"associative": partial(selective_scan, method="associative"), "lax.scan": plain}
    for method, run in methods.items():
        what = {"choice": "method", "method": method}
        yield what | {"pass": "forward"}, run, inputs
        yield what | {"pass": "forward+backward"}, with_gradients(run), inputs
    for keep in (True, False):
        what = {"choice": "method", "method": "three phases", "keep": keep, "pass": "forward"}
        yield what, partial(three_phases, keep=keep), inputs
    for channels_last in (False, True):
        for contraction in ("einsum", "sum"):
            options = {"channels_last": channels_last, "contraction": contraction}
            yield {"choice": "layout", **options}, partial(loop, **options), inputs
    for method in ("sequential", "chunked"):
        for chunk in (8, 16) if quick else (4, 8, 16, 32, 64, 128, 256):

            def run(*v, method=method, chunk=chunk):
                return selective_scan(*v, method=method, chunk=chunk)

            what = {"choice": "chunk", "method": method, "chunk": chunk, "pass": "forward+backward"}
            yield what, with_gradients(run), inputs


def cache_sizes():
    """Of the first core, as Linux names them: {"L1 Data": "32K", ...}."""
    sizes = {}
    for cache in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = (
            (cache / name).read_text().strip() for name in ("level", "type", "size")
        )
        sizes[f"L{level}" + f" {kind}" * (kind != "Unified")] = size
    return sizes


def agree(inputs):
    """Assert that the ways which only this file knows compute what the module computes."""
    wanted = selective_scan(*inputs)
    for keep in (True, False):
        error = jnp.abs(jax.jit(partial(three_phases, keep=keep))(*inputs) - wanted).max()
        assert error < 1e-4 * jnp.abs(wanted).max(), error


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a small shape, writes nothing")
    parser.add_argument("--note", default="", help="what else ran on the machine meanwhile")
    args = parser.parse_args()
    load = load_average()
    inputs = jax.block_until_ready(random_inputs(*(QUICK if args.quick else LAYER)))
    prepared = []
    for what, function, given in points(inputs, args.quick):
        prepared.append((what, *prepare(function, given), []))
    if all(importlib.util.find_spec(package) for package in ("torch", "transformers")):
        what = {"choice": "method", "method": "transformers", "pass": "forward"}
        run, _ = prepare_torch("forward", [np.array(v) for v in inputs])
        prepared.append((what, run, {}, []))
    agree(inputs)
    for _ in range(ROUNDS):  # a machine's speed drifts: points far apart are compared, too
        for _, run, _, times in prepared:
            times += seconds(run)
    results = []
    for what, _, memory, times in prepared:
        ms = {"min_ms": 1e3 * min(times), "median_ms": 1e3 * float(np.median(times))}
        row = what | {k: round(v, 2) for k, v in ms.items()} | {"runs": len(times)} | memory
        if what.get("of") == "memory read":
            row["bytes_per_s"] = round(4 * (11585**2) / min(times))
        if what.get("of") == "exponentials":
            row["exp_per_s"] = round(inputs[1].size * LAYER[3] / min(times))
        if what.get("of") == "steps":
            row["seconds_per_step"] = float(f"{min(times) / STEPS:.2e}")
        results.append(row)
        print(row, flush=True)
    if args.quick:
        return
    report = head(args.note, load) | {"caches": cache_sizes()} | dict(zip("bldn", LAYER))
    record("hardware", report, results)


if __name__ == "__main__":
    main()
