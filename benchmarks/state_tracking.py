"""What a block can count: parity, addition modulo 5 and permutations of three things.

    python benchmarks/state_tracking.py            # hours on two cores; one process at a time
    python benchmarks/state_tracking.py --tasks parity --preset minute    # five minutes
    python benchmarks/state_tracking.py --quick    # few steps, to see that it runs; writes nothing

The training is that of a preset of each task ("laptop", or --preset), with one layer (of width 32,
for more than two values 64) and three seeds: Mamba, Mamba-2, Mamba-3, and Mamba-3 whose states do
not turn. Accuracy is that of held-out sequences, over all places ("all") and over the last quarter
of the places ("late"): the early places of a long sequence are those of a short one. A run that is
already in the file is not repeated. Writes benchmarks/results/state_tracking.json and the same to
mamba_book/data for chapter 12.
"""

import argparse
import dataclasses
import json

import jax
import numpy as np
from _report import FOLDERS, head, load_average, record

from mamba.train.experiment import run
from mamba.train.metrics import evaluate
from mamba.train.presets import PRESETS

TASKS = ("parity", "modular-addition", "permutations")
LENGTHS = (40, 160, 256, 512, 1024, 4096)
LONGEST = 16384  # for Mamba-3 and parity, too
SEQUENCES = 64  # held out, of each length


def variants(task, size):
    """name -> Preset, of a size such as "laptop"."""
    base = dataclasses.replace(PRESETS[task][size], held_out=SEQUENCES)

    def preset(block, **model):
        return dataclasses.replace(base, block=block, model=base.model | model)

    variants = {
        "Mamba": preset("mamba"),
        "Mamba-2": preset("mamba2"),
        "Mamba-3": preset("mamba3"),
        "Mamba-3, no rotation": preset("mamba3", rope_fraction=None),
    }
    if task == "permutations":  # one layer turns in planes only, where the order does not matter
        variants["Mamba-3, 2 layers"] = preset("mamba3", n_layer=2)
    return variants


def accuracies(preset, model, params, length):
    """Accuracy over all places, and over the last quarter of them."""
    batches = preset.held_out_batches(length)
    late = [b._replace(mask=b.mask & (np.arange(length) >= 3 * length // 4)) for b in batches]
    return [round(evaluate(model, params, part)[1], 4) for part in (batches, late)]


def measure(task, name, preset, seed):
    """One run -> a row."""
    model, trained = run(preset, seed=seed)
    lengths = (*LENGTHS, LONGEST) if (task, name) == ("parity", "Mamba-3") else LENGTHS
    by_length = {length: accuracies(preset, model, trained.params, length) for length in lengths}
    row = {
        "task": task,
        "variant": name,
        "seed": seed,
        "parameters": sum(p.size for p in jax.tree.leaves(trained.params)),
        "seconds": round(trained.seconds, 1),
        "loss": round(float(trained.curve[-50:, 0].mean()), 5),  # of the last training batches
        "all": {length: accuracy for length, (accuracy, _) in by_length.items()},
        "late": {length: accuracy for length, (_, accuracy) in by_length.items()},
    }
    return row


def settings(task, size):
    """What the runs of a task have in common, in types that JSON has."""
    settings = dataclasses.asdict(PRESETS[task][size])
    return {name: value for name, value in settings.items() if name not in ("block", "lengths")}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", default=TASKS, choices=TASKS)
    parser.add_argument("--seeds", nargs="+", default=range(3), type=int)
    parser.add_argument("--preset", default="laptop", help="size of the runs (default: laptop)")
    parser.add_argument("--quick", action="store_true", help="few steps, writes nothing")
    parser.add_argument("--note", default="", help="what else ran on the machine meanwhile")
    args = parser.parse_args()
    load, done = load_average(), FOLDERS[0] / "state_tracking.json"
    earlier = {"results": [], "settings": {}}
    if done.exists() and not args.quick:
        earlier = json.loads(done.read_text(encoding="utf-8"))
    of = {t: json.loads(json.dumps(settings(t, args.preset))) for t in args.tasks}
    results = [r for r in earlier["results"] if earlier["settings"][r["task"]] == of.get(r["task"])]
    known = {(row["task"], row["variant"], row["seed"]) for row in results}
    for task in args.tasks:
        for seed in args.seeds:
            for name, preset in variants(task, args.preset).items():
                if (task, name, seed) in known:
                    continue
                if args.quick:
                    preset = dataclasses.replace(preset, steps=5, held_out=8)
                row = measure(task, name, preset, seed)
                results.append(row)
                print(json.dumps(row), flush=True)
                if args.quick:
                    continue
                results.sort(key=lambda r: (TASKS.index(r["task"]), r["variant"], r["seed"]))
                record("state_tracking", head(args.note, load) | {"settings": of}, results)


if __name__ == "__main__":
    main()
