"""Time of Mamba-3's recurrence, and of a decoding step of the 187m shapes.

    python benchmarks/trapezoid.py            # measures everything, some ten minutes
    python benchmarks/trapezoid.py --quick    # small sizes, to see that it runs; writes nothing

One layer of the 187m shape (24 heads of 64 channels, 128 states, 32 pairs that turn), SISO and MIMO
with 4 inputs a step, by trapezoidal_scan's "chunked" and "recurrence". JAX differentiates the
recurrence step by step, as it would one's first program. Beside them Mamba-2's ssd of the same
sizes. Then "chunked" with other chunk lengths; then one decoding step of a layer's scan alone, for
one and more inputs; then prefill and decoding of both 187m models with random weights, and how fast
this machine reads the weights once.

Each point is measured in a fresh process. Writes benchmarks/results/trapezoid.json, and the same to
mamba_book/data for chapter 12.
"""

import argparse
import functools
import json

import numpy as np
from _measure import ROOT, best, in_child, measure_model
from _report import head, load_average, write

WRITTEN = [ROOT / path for path in ("benchmarks/results", "mamba_book/data")]
LENGTH, LENGTHS, CHUNKS, RANKS = 2048, [512, 2048, 8192], [8, 16, 32, 64, 128], [1, 2, 4, 8, 16]
SIZES = {"h": 24, "p": 64, "n": 128, "s": 32}  # one layer of the 187m shape
SHAPE = {"d_model": 768, "n_layer": 12, "vocab_size": 128256}
MODELS = {"SISO": {"d_intermediate": 1536}, "MIMO": {"d_intermediate": 1264, "is_mimo": True}}
QUICK_SIZES, QUICK_SHAPE = {"h": 2, "p": 8, "n": 8, "s": 2}, {"d_model": 64, "n_layer": 2}
PASSES = ["forward", "forward+backward"]
PARTS = ["layer", "chunk", "step", "model"]
STEPS = 200  # decoding steps in one timed call


def random_inputs(l, r, h, p, n, s):
    """x, delta, A, lam, B, C, theta, D of one sequence."""
    rng = np.random.default_rng(0)
    x, (B, C) = rng.normal(size=(1, l, h, r, p)), rng.normal(size=(2, 1, l, h, r, n))
    delta = np.exp(rng.uniform(np.log(1e-3), np.log(0.1), (1, l, h)))
    A, lam = -rng.uniform(1, 16, (1, l, h)), rng.uniform(size=(1, l, h))
    inputs = x, delta, A, lam, B, C, rng.normal(size=(1, l, h, s)), rng.normal(size=h)
    return [v.astype(np.float32) for v in inputs]


def measure_layer(method, which, l, r, sizes, chunk=None):
    """One point, in this process -> dict of times and memory."""
    import jax

    from mamba.ssd import ssd
    from mamba.trapezoid import trapezoidal_scan

    inputs = random_inputs(l, r, **sizes)
    if method == "ssd":
        x, delta, A, _, B, C, _, D = inputs
        inputs = [x[:, :, :, 0], delta, A[0, 0], B[:, :, :1, 0], C[:, :, :1, 0], D]
        run = ssd
    else:
        pairs = "interleaved" if r == 1 else "halves"
        run = functools.partial(trapezoidal_scan, method=method, pairs=pairs, chunk=chunk)
    function = run
    if which == "forward+backward":
        every = range(len(inputs))
        function = jax.value_and_grad(lambda *v: (run(*v) ** 2).sum(), argnums=every)
    inputs = jax.block_until_ready(jax.device_put(inputs))
    compiled = jax.jit(function).lower(*inputs).compile()
    plan = compiled.memory_analysis()
    return best(lambda: jax.block_until_ready(compiled(*inputs))) | {
        "program_bytes": plan.temp_size_in_bytes + plan.output_size_in_bytes,
    }


def measure_step(r, sizes):
    """Decoding steps of a layer's scan alone, one after another -> dict: microseconds a step."""
    import jax

    from mamba.trapezoid import TrapezoidState, trapezoidal_scan

    x, *others, D = jax.device_put(random_inputs(1, r, **sizes))
    pairs = "interleaved" if r == 1 else "halves"

    @jax.jit
    def steps(x, state):
        def step(carry, _):
            x, state = carry
            y, state = trapezoidal_scan(x, *others, D, pairs=pairs, state=state, return_state=True)
            return (1e-3 * y, state), None

        return jax.lax.scan(step, (x, state), None, STEPS)[0]

    h, p, n, s = (sizes[k] for k in "hpns")
    state = TrapezoidState.zeros(1, h, r, p, n, s)
    times = best(lambda: jax.block_until_ready(steps(x, state)))
    return {"min_us": round(1e3 * times["min_ms"] / STEPS, 2)} | {
        "median_us": round(1e3 * times["median_ms"] / STEPS, 2)
    }


def measure_mamba3(shape):
    """Prefill and greedy decoding of a Mamba-3 -> dict of seconds."""
    from mamba import Mamba3Config

    return measure_model(Mamba3Config(**shape))


def measure(parts, lengths, chunks, sizes, shape):
    """Every point of some of the PARTS -> rows."""
    child = functools.partial(in_child, __file__)
    for l in lengths if "layer" in parts else ():
        for which in PASSES:
            for method, r in (("chunked", 1), ("recurrence", 1), ("ssd", 1), ("chunked", 4)):
                if method == "recurrence" and which != "forward" and l > LENGTH:
                    continue  # it stores every state: gigabytes
                row = {"of": "layer", "method": method, "r": r, "pass": which, "l": l} | sizes
                yield row | child("measure_layer", method, which, l, r, sizes)
    for r in (1, 4) if "chunk" in parts else ():
        for chunk in chunks:
            for which in PASSES:
                row = {"of": "chunk", "chunk": chunk, "r": r, "pass": which, "l": LENGTH} | sizes
                yield row | child("measure_layer", "chunked", which, LENGTH, r, sizes, chunk)
    for r in RANKS if "step" in parts else ():
        yield {"of": "step", "r": r} | sizes | child("measure_step", r, sizes)
    if "model" in parts:
        # Twice in turn, and the quicker of each: the memory of a shared host is not always as fast.
        models = {name: shape | changes for name, changes in MODELS.items()}
        rounds = [{k: child("measure_mamba3", v) for k, v in models.items()} for _ in range(2)]
        for name in models:
            quicker = min((of[name] for of in rounds), key=lambda row: row["decode_s"])
            yield {"of": "model", "way": name} | quicker


def main():
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, writes nothing")
    parser.add_argument("--note", default="", help="what else ran on the machine meanwhile")
    parser.add_argument(
        "--of", nargs="+", default=PARTS, choices=PARTS, help="measure these; keep the other rows"
    )
    parser.add_argument("--part", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        name, *arguments = json.loads(args.part)
        return print(json.dumps(globals()[name](*arguments)))
    before, results = load_average(), []
    if set(args.of) != set(PARTS):
        recorded = json.loads((WRITTEN[0] / "trapezoid.json").read_text(encoding="utf-8"))
        results = [row for row in recorded["results"] if row["of"] not in args.of]
    sizes = ([64], [16], QUICK_SIZES, QUICK_SHAPE | {"vocab_size": 99})
    for row in measure(args.of, *sizes if args.quick else (LENGTHS, CHUNKS, SIZES, SHAPE)):
        print(json.dumps(row), flush=True)
        results.append(row)
    results.sort(key=lambda row: PARTS.index(row["of"]))
    if not args.quick:
        for path in WRITTEN:
            write(path / "trapezoid.json", head(args.note, before), results)


if __name__ == "__main__":
    main()
