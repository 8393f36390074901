"""What one decay a head costs: Mamba and Mamba-2 learn selective copying at equal size.

    python benchmarks/decays.py            # a quarter of an hour on one core
    python benchmarks/decays.py --quick    # few steps, to see that it runs; writes nothing

The task, its sizes and the training are those of the preset "minute" of chapter 8: 64 tokens, four
of them data, one layer of width 32. The variants have that width, and are trained with several
seeds. Each answer is compared with the right one, and with the four data tokens as a set.
"Mamba, one rate a channel" is Mamba's block with the mean of a channel's sixteen log-rates in the
place of each of them. Writes benchmarks/results/decays.json, and the same to mamba_book/data for
chapter 11; and the last variant's model, seed 0, to mamba_book/data/selective_copying_mamba2.
"""

import argparse
import dataclasses
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from _report import ROOT, head, load_average, record

from mamba import MambaConfig
from mamba.mamba1 import MambaBlock
from mamba.train.experiment import Preset, evaluate_at, run
from mamba.train.presets import PRESETS

SAVED = ROOT / "mamba_book/data/selective_copying_mamba2"
SEEDS = range(5)
TASK, SIZE = "selective-copying", "minute"


def share_rates(variables):
    """The variables of a MambaBlock, with the mean of each channel's log-rates for all of them."""
    variables = dict(variables)
    if "params" in variables and "A_log" in variables["params"]:
        A_log = variables["params"]["A_log"]  # (d, n)
        shared = jnp.broadcast_to(A_log.mean(-1, keepdims=True), A_log.shape)
        variables["params"] = dict(variables["params"]) | {"A_log": shared}
    return variables


SharedRates = nn.map_variables(MambaBlock, "params", trans_in_fn=share_rates, init=True)


class SharedRatesConfig(MambaConfig):
    """A MambaConfig whose channels have one rate each."""

    def block(self, name):
        return SharedRates(self, name=name)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SharedRatesPreset(Preset):
    """A Preset that trains that block."""

    def config(self, selective=(), dtype="float32"):
        return SharedRatesConfig(vocab_size=self.sizes["vocab_size"], dtype=dtype, **self.model)


def variants():
    """name -> Preset."""
    minute = PRESETS[TASK][SIZE]

    def preset(block, kind=Preset, **model):
        values = {f.name: getattr(minute, f.name) for f in dataclasses.fields(minute)}
        return kind(**values | {"block": block, "model": minute.model | model})

    return {
        "Mamba": preset("mamba"),
        "Mamba, one rate a channel": preset("mamba", SharedRatesPreset),
        "Mamba-2, 1 head": preset("mamba2", head_dim=64, d_state=16),
        "Mamba-2, 1 head, 128 states": preset("mamba2", head_dim=64, d_state=128),
        "Mamba-2, 4 heads": preset("mamba2", head_dim=16, d_state=16),
        "Mamba, 2 layers": preset("mamba", n_layer=2),
        "Mamba-2, 1 head, 2 layers": preset("mamba2", head_dim=64, d_state=16, n_layer=2),
    }


def in_the_set(preset, model, params):
    """Share of the answers that are one of the sequence's data tokens, at whatever place."""
    hits = []
    for batch in preset.held_out_batches(preset.length):
        logits = model.apply({"params": params}, batch.tokens)
        answers = np.asarray(logits.argmax(-1))[np.asarray(batch.mask)].reshape(len(logits), -1)
        data = np.asarray(batch.targets)[np.asarray(batch.mask)].reshape(len(logits), -1)
        hits.append((answers[:, :, None] == data[:, None]).any(-1))
    return float(np.concatenate(hits).mean())


def measure(name, preset, seed):
    """One run -> a row, the model, its parameters."""
    start = time.perf_counter()
    model, trained = run(preset, seed=seed)
    seconds = time.perf_counter() - start
    loss, accuracy, n = evaluate_at(preset, model, trained.params, preset.length)
    state = model.initial_state(1)
    row = {
        "variant": name,
        "seed": seed,
        "steps": preset.steps,
        "loss": round(float(loss), 4),
        "accuracy": round(float(accuracy), 4),
        "in_the_set": round(in_the_set(preset, model, trained.params), 4),
        "sequences": n,
        "parameters": sum(p.size for p in jax.tree.leaves(trained.params)),
        "state_numbers": sum(layer.ssm.size for layer in state),
        "seconds": round(seconds, 1),
    }
    return row, model, trained.params


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few steps, writes nothing")
    parser.add_argument("--note", default="", help="what else ran on the machine meanwhile")
    args = parser.parse_args()
    load, results = load_average(), []
    for name, preset in variants().items():
        if args.quick:
            preset = dataclasses.replace(preset, steps=3, held_out=32)
        for seed in SEEDS[:1] if args.quick else SEEDS:
            row, model, params = measure(name, preset, seed)
            results.append(row)
            print(row, flush=True)
            if seed == 0:
                last = model, params
    if not args.quick:
        model, params = last
        model.save_pretrained(params, SAVED)
        record("decays", head(args.note, load), results)


if __name__ == "__main__":
    main()
