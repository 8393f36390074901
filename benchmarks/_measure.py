"""What several benchmarks measure alike: the best of several times, a model, a fresh process."""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from _report import FOLDERS, ROOT, head, load_average, record

PREFILL, PROMPT, TOKENS = 512, 8, 40
SECONDS = 1.0  # for the calls of one point


def best(function):
    """The least of several times of function(), after one call."""
    start = time.perf_counter()
    function()
    first = time.perf_counter() - start
    times = []
    for _ in range(max(3, min(30, int(SECONDS / first)))):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return {
        "min_ms": round(1e3 * min(times), 3),
        "median_ms": round(1e3 * float(np.median(times)), 3),
        "runs": len(times),
    }


def measure_model(config, reading=None):
    """Prefill and greedy decoding of a model with random weights -> dict of seconds.

    reading: bytes per second; measured here if it is not known.
    """
    import jax
    import jax.numpy as jnp

    from mamba import Mamba
    from mamba_book.reference_models import in_bfloat16

    model = Mamba(config)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    params = in_bfloat16(params) if config.dtype == jnp.bfloat16 else params
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (1, PREFILL), np.int32)

    @jax.jit
    def read(params, tokens):
        state = model.initial_state(1)
        return model.apply({"params": params}, tokens, state, method="last_logits")

    @jax.jit
    def write(params, read, n):
        def step(_, carry):
            logits, state = carry
            token = logits.argmax(-1)[:, None]  # (1, 1)
            return model.apply({"params": params}, token, state, method="last_logits")

        return jax.lax.fori_loop(0, n, step, read)

    prefill = best(lambda: jax.block_until_ready(read(params, tokens)))["min_ms"] / 1e3
    start = read(params, jnp.asarray(tokens[:, :PROMPT]))
    times = [
        best(lambda n=n: jax.block_until_ready(write(params, start, n)))["min_ms"] / 1e3
        for n in (1, 1 + TOKENS)
    ]
    per_token = (times[1] - times[0]) / TOKENS
    weights, state = (
        sum(v.nbytes for v in jax.tree.leaves(tree)) for tree in (params, model.initial_state(1))
    )
    reading = reading or read_bytes_per_s()
    return {
        "prefill_s": round(prefill, 4),
        "decode_s": round(per_token, 5),
        "weights_bytes": weights,
        "state_bytes": state,
        "read_bytes_per_s": reading,
        "of_bandwidth_limit": round(weights / reading / per_token, 3),
        "of_it_with_state": round((weights + 2 * state) / reading / per_token, 3),
    }


def read_bytes_per_s():
    """How fast this machine reads memory: a matrix of 256 MB times a vector."""
    import jax
    import jax.numpy as jnp

    matrix, vector = jnp.ones((2**13, 2**13)), jnp.ones(2**13)
    run = jax.jit(jnp.dot)
    seconds = best(lambda: jax.block_until_ready(run(matrix, vector)))["min_ms"] / 1e3
    return round(matrix.nbytes / seconds)


def in_child(script, name, *arguments):
    """A function of a benchmark's file, called in a fresh process as its flag --part says."""
    command = [
        sys.executable,
        str(Path(script).resolve()),
        "--part",
        json.dumps([name, *arguments]),
    ]
    env = dict(os.environ, JAX_PLATFORMS="cpu")
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name} {arguments}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def run_by_part(name, measure, full, quick, parts=()):
    """The command of a benchmark that measures each point in a fresh process.

    Args:
        name: of the record.
        measure: function of the sizes -> rows; with parts, of those to measure and the sizes.
        full: the sizes of a measurement.
        quick: those of --quick, which writes nothing.
        parts: the values of a row's "of", in the order of the record; --of measures some of them
            and keeps the other rows.
    """
    script = sys.modules["__main__"]
    parser = argparse.ArgumentParser(description=script.__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, writes nothing")
    parser.add_argument("--note", default="", help="what else ran on the machine meanwhile")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    if parts:
        parser.add_argument("--of", nargs="+", default=parts, choices=parts, help="measure these")
    args = parser.parse_args()
    if args.part:
        function, *arguments = json.loads(args.part)
        return print(json.dumps(getattr(script, function)(*arguments)))
    before, results, sizes = load_average(), [], quick if args.quick else full
    if parts:
        if set(args.of) != set(parts):
            recorded = json.loads((FOLDERS[0] / f"{name}.json").read_text(encoding="utf-8"))
            results = [row for row in recorded["results"] if row["of"] not in args.of]
        sizes = (args.of, *sizes)
    for row in measure(*sizes):
        print(json.dumps(row), flush=True)
        results.append(row)
    if parts:
        results.sort(key=lambda row: parts.index(row["of"]))
    if not args.quick:
        record(name, head(args.note, before), results)
