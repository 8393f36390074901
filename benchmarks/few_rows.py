"""What the small products of ``mamba.layers`` gain when a few texts are decoded together.

    python benchmarks/few_rows.py            # one step of the 130m shape, about three minutes
    python benchmarks/few_rows.py --quick    # a small shape, to see that it runs; writes nothing

A/B in one process: the same step compiled twice, once with ``few_rows_dot`` and ``tied_logits`` as
they are, once with FEW_ROWS empty, so that every product is the plain one. The two are timed in
turn, so that a change of the machine's speed meets both. Random weights: speed does not depend on
their values. Writes benchmarks/results/few_rows.json.
"""

import argparse
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from _report import head, load_average, write

from mamba import Mamba, MambaConfig, layers

RESULTS = Path(__file__).resolve().parent / "results" / "few_rows.json"
SHAPE = {"d_model": 768, "n_layer": 24, "vocab_size": 50277}  # 130m
QUICK = {"d_model": 64, "n_layer": 2, "vocab_size": 1000}
ROWS = [1, 2, 3, 4, 6, 8]  # texts decoded together
STEPS, ROUNDS = 5, 6  # steps timed together; how often the two are timed in turn


def random_params(model):
    """Parameters of the model's shape, drawn with NumPy: that is quick."""
    tree = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda p: jnp.asarray(0.02 * rng.standard_normal(p.shape, np.float32)), tree
    )


def compiled_step(model, params, rows, few_rows):
    """The decoding step for so many rows, with small products for the numbers in few_rows."""
    kept, layers.FEW_ROWS = layers.FEW_ROWS, few_rows
    try:
        step = jax.jit(lambda p, token, state: model.apply({"params": p}, token, state))
        token, state = jnp.ones((rows, 1), jnp.int32), model.initial_state(rows)
        return step.lower(params, token, state).compile(), token, state
    finally:
        layers.FEW_ROWS = kept


def seconds_per_step(step, params, token, state):
    start = time.perf_counter()
    for _ in range(STEPS):
        logits, state = step(params, token, state)
    jax.block_until_ready((logits, state))
    return (time.perf_counter() - start) / STEPS


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a small shape; writes nothing")
    args = parser.parse_args()
    load_before = load_average()
    shape = QUICK if args.quick else SHAPE
    model = Mamba(MambaConfig(**shape))
    params = random_params(model)
    results = []
    for rows in ROWS:
        ways = {
            "small products": compiled_step(model, params, rows, layers.FEW_ROWS),
            "plain products": compiled_step(model, params, rows, range(0)),
        }
        best = dict.fromkeys(ways, float("inf"))
        for _ in range(ROUNDS):
            for name, (step, token, state) in ways.items():
                best[name] = min(best[name], seconds_per_step(step, params, token, state))
        for name, seconds in best.items():
            results.append(
                {"rows": rows, "way": name, "ms_per_step": round(1e3 * seconds, 3)}
                | {"tokens_per_s": round(rows / seconds, 1)}
            )
        gain = best["plain products"] / best["small products"]
        print(f"{rows} rows: {gain:.2f} times as fast with small products", flush=True)
    if not args.quick:
        note = "the least of several times; a step of decoding, from the tokens to the logits"
        write(RESULTS, head(note, load_before) | {"shape": shape}, results)


if __name__ == "__main__":
    main()
