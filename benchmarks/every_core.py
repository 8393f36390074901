"""One CPU device, and one for each core: a scan, a training step and a prefill, whole.

    python benchmarks/every_core.py            # about six minutes
    python benchmarks/every_core.py --quick    # small sizes, to see that it runs; writes nothing

Scan: one layer of the 130m model (b 1, l 2048, d 1536, n 16), forward and with all gradients;
``selective_scan`` on one device, and with its channels shared out among the devices
(``over_channels``). Beside it the exponentials of the recurrence, added up and nothing else, which
no exact method can go below, on one device and shared out; and a plain `lax.scan` that JAX
differentiates. Training: a step of the laptop presets, with its rows shared out. Prefill: 512
tokens of the 130m shape; on several devices as on one, with parts of the parameters ("model") on
each, and with stretches of the text ("sequence").

Each point is measured in a fresh process, because JAX divides the CPU once, when it starts. The
points take turns, and the best of ROUNDS counts. Writes benchmarks/results/every_core.json and the
same to mamba_book/data, for the chapters.
"""

import argparse
import json
import os
from functools import partial

import numpy as np
from _measure import best, in_child
from _report import head, load_average, record
from scan import exponentials, plain, random_inputs

LAYER, QUICK = (1, 2048, 1536, 16), (1, 128, 64, 16)  # (b, l, d, n)
PASSES = ("forward", "forward+backward")
TRAINED = ("selective-copying", "language-model")  # their laptop presets
ROUNDS = 3


def scan(devices, what, which, shape):
    """One scan on so many devices -> dict of times. what: "scan", "exponentials" or "plain"."""
    import mamba

    mamba.use_every_core(devices)
    import jax
    from jax.sharding import Mesh, NamedSharding
    from jax.sharding import PartitionSpec as P

    from mamba.cores import over_channels

    mesh = Mesh(np.array(jax.devices()), ("channels",))
    last, first, none = P(None, None, "channels"), P("channels"), P()
    specs = (last, last, first, none, none, first)  # x, Δ, A, B, C, D
    run = {"scan": mamba.selective_scan, "exponentials": exponentials, "plain": plain}[what]
    if devices > 1 and what == "scan":
        run = over_channels(run)
    elif devices > 1:  # the exponentials of each device's channels, added up apart
        apart = lambda *v: exponentials(*v)[None]  # noqa: E731
        run = jax.shard_map(apart, mesh=mesh, in_specs=specs, out_specs=first)
    function = run
    if which == "forward+backward":
        function = jax.value_and_grad(lambda *v: (run(*v) ** 2).sum(), argnums=range(6))
    inputs = [  # where the scan needs them: nothing is copied before it
        jax.device_put(v, NamedSharding(mesh, spec))
        for v, spec in zip(random_inputs(*shape), specs, strict=True)
    ]
    jax.block_until_ready(inputs)
    compiled = jax.jit(function).lower(*inputs).compile()
    return best(lambda: jax.block_until_ready(compiled(*inputs)))


def train_step(devices, task, quick):
    """A training step of a laptop preset on so many devices -> dict of times."""
    import mamba

    mamba.use_every_core(devices)
    import jax

    from mamba.train import loop
    from mamba.train.corpus import text_batches
    from mamba.train.devices import row_mesh, spread
    from mamba.train.presets import PRESETS

    preset = PRESETS[task]["laptop"]
    model, length = mamba.Mamba(preset.config()), 32 if quick else preset.length
    if task == "language-model":
        vocab = preset.sizes["vocab_size"]
        ids = np.random.default_rng(0).integers(0, vocab, 2 * preset.batch * length + 99, np.int32)
        batch = text_batches([ids], preset.batch, length)(0)
    else:
        batch = preset.draw(jax.random.key(0), preset.batch, length)
    mesh, rows = row_mesh(preset.batch), preset.batch if preset.carry else None
    state = loop.first_state(model, preset.optimizer(), mesh, 0, rows)
    batch = spread(batch, mesh, "data", "sequence")
    step = partial(loop.train_step, model, preset.optimizer(), mesh, state, batch)
    return best(lambda: jax.block_until_ready(step()))


def prefill(devices, axis, quick):
    """Reading a prompt with a model of the 130m shape, devices along an axis -> dict of times."""
    import mamba

    mamba.use_every_core(devices)
    import jax
    import jax.numpy as jnp

    from mamba.parallel import last_logits_on_mesh, make_mesh, parameter_shardings

    sizes = {"d_model": 64, "n_layer": 2} if quick else {"d_model": 768, "n_layer": 24}
    model = mamba.Mamba(mamba.MambaConfig(**sizes, vocab_size=50277))
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    tokens = np.random.default_rng(0).integers(0, 50277, (1, 512), np.int32)
    state = model.initial_state(1)
    if axis == "none":  # as mamba.text reads it
        read = jax.jit(partial(model.apply, method="last_logits"))
        return best(lambda: jax.block_until_ready(read({"params": params}, tokens, state)))
    mesh = make_mesh(**{axis: devices})
    params = jax.device_put(params, parameter_shardings(params, mesh))
    read = partial(last_logits_on_mesh, model, mesh, params, tokens, state)
    return best(lambda: jax.block_until_ready(read()))


def points(quick, cores):
    """The points to measure: (function, its arguments)."""
    shape = QUICK if quick else LAYER
    for which in PASSES:
        yield scan, 1, "plain", which, shape
        for devices in (1, cores):
            yield scan, devices, "scan", which, shape
            if which == "forward":
                yield scan, devices, "exponentials", which, shape
    for task in TRAINED:
        for devices in (1, cores):
            yield train_step, devices, task, quick
    yield prefill, 1, "none", quick
    for axis in ("none", "model", "sequence"):
        yield prefill, cores, axis, quick


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, writes nothing")
    parser.add_argument("--note", default="", help="what else ran on the machine meanwhile")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        name, *arguments = json.loads(args.part)
        print(json.dumps(globals()[name](*arguments)))
        return
    load, cores = load_average(), len(os.sched_getaffinity(0))
    least = {}
    for _ in range(1 if args.quick else ROUNDS):
        for function, *arguments in points(args.quick, cores):
            point = (function.__name__, *arguments)
            measured = in_child(__file__, *point)
            if point not in least or measured["min_ms"] < least[point]["min_ms"]:
                least[point] = measured
            print(point, measured["min_ms"], flush=True)
    results = [describe(*point) | times for point, times in least.items()]
    ratios = compare(results, cores)
    print(json.dumps(ratios, indent=1))
    if not args.quick:
        report = head(args.note, load) | {"cpu_devices": cores, "ratios": ratios}
        record("every_core", report, results)


def describe(function, devices, *rest):
    """What a point measured -> dict."""
    keys = {
        "scan": ("what", "pass", "shape"),
        "train_step": ("task", "quick"),
        "prefill": ("axis", "quick"),
    }
    return {"measured": function, "devices": devices} | dict(zip(keys.get(function, ()), rest))


def compare(results, cores):
    """What the module is held to."""
    ms = {
        (
            r["measured"],
            r["devices"],
            r.get("what", r.get("task", r.get("axis"))),
            r.get("pass"),
        ): r["min_ms"]
        for r in results
    }
    forward, both = PASSES
    floor = ms["scan", 1, "exponentials", forward]
    ratios = {}
    for n in sorted({1, cores}):
        scans = [ms["scan", n, "scan", which] for which in PASSES]
        plains = [ms["scan", 1, "plain", which] for which in PASSES]
        ratios[f"{n} devices, forward: scan / exponentials"] = scans[0] / floor
        ratios[f"{n} devices, forward: plain lax.scan / scan"] = plains[0] / scans[0]
        ratios[f"{n} devices, forward+backward: plain lax.scan / scan"] = plains[1] / scans[1]
    for task in TRAINED:
        times = [ms["train_step", n, task, None] for n in (1, cores)]
        ratios[f"training step of {task}: one device / {cores}"] = times[0] / times[1]
    for axis in ("none", "model", "sequence"):
        times = [ms["prefill", 1, "none", None], ms["prefill", cores, axis, None]]
        ratios[f"prefill: one device / {cores} along {axis}"] = times[0] / times[1]
    return {name: round(value, 2) for name, value in ratios.items()}


if __name__ == "__main__":
    main()
