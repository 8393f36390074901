"""One text on 1, 2, 4 and 8 devices: messages, bytes on the wire, memory, time.

    python benchmarks/devices.py            # measures everything, some minutes
    python benchmarks/devices.py --quick    # small sizes, to see that it runs; writes nothing

The devices are virtual: JAX cuts the CPU into n of them (jax_num_cpu_devices). Messages, bytes and
memory are read from the compiled program, which is that of n real devices. Times are of a machine
whose cores the devices share. So the time that the processor spends for all devices together is
recorded as well (cpu_ms): it is their work, also where other programs take turns with them.

Each point is measured in a fresh process. Writes benchmarks/results/devices.json, and the same to
mamba_book/data for chapter 13.
"""

import time

import numpy as np
from _measure import best, in_child, run_by_part

DEVICES = [1, 2, 4, 8]
BLOCKS = ["Mamba", "Mamba-2", "Mamba-3"]
SHAPE = {"d_model": 64, "n_layer": 2, "vocab_size": 256}
MEMORY_AT, TIMED_AT, MILLION = 262_144, 16_384, 1_048_576
QUICK = {"d_model": 8, "n_layer": 1, "vocab_size": 16}


def program(block, devices, l, shape):
    """Reading a text of l tokens on n devices -> the compiled program, its arguments."""
    import jax

    jax.config.update("jax_num_cpu_devices", devices)
    import jax.numpy as jnp

    from mamba import Mamba, Mamba2Config, Mamba3Config, MambaConfig
    from mamba.parallel import last_logits_on_mesh, make_mesh, parameter_shardings

    heads = {"d_state": 16, "head_dim": 8}
    config = {
        "Mamba": lambda: MambaConfig(**shape),
        "Mamba-2": lambda: Mamba2Config(**shape, **heads),
        "Mamba-3": lambda: Mamba3Config(**shape, **heads),
    }[block]()
    model, mesh = Mamba(config), make_mesh(sequence=devices)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    params = jax.device_put(params, parameter_shardings(params, mesh))
    cut = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data", "sequence"))
    tokens = np.random.default_rng(0).integers(0, shape["vocab_size"], (1, l), np.int32)
    arguments = params, jax.device_put(tokens, cut), model.initial_state(1)

    def read(params, tokens, state):
        return last_logits_on_mesh(model, mesh, params, tokens, state)

    return jax.jit(read).lower(*arguments).compile(), arguments


def measure_program(block, devices, l, shape):
    """What the compiled program says -> dict; nothing runs."""
    from mamba_book.messages import messages

    compiled, _ = program(block, devices, l, shape)
    plan, sent = compiled.memory_analysis(), messages(compiled)
    permutes = [size for kind, size in sent if kind == "collective-permute"]
    parts = plan.temp_size_in_bytes, plan.output_size_in_bytes, plan.argument_size_in_bytes
    return {
        "permutes": len(permutes),
        "permuted_bytes": sum(permutes),
        "other_messages": len(sent) - len(permutes),
        "other_bytes": sum(size for kind, size in sent if kind != "collective-permute"),
        "device_bytes": sum(parts),
    }


def with_work(function):
    """As ``best``, and the least processor time of several calls, over all threads."""
    times, used = best(function), []
    for _ in range(10):
        start = time.process_time()
        function()
        used.append(time.process_time() - start)
    return times | {"cpu_ms": round(1e3 * min(used), 3)}


def measure_time(block, devices, l, shape):
    """One reading, the best of several -> dict."""
    import jax

    compiled, arguments = program(block, devices, l, shape)
    return with_work(lambda: jax.block_until_ready(compiled(*arguments)))


def measure_scan(l, shape):
    """The scan of one layer of Mamba on one device, the best of several -> dict."""
    import jax

    from mamba import selective_scan

    rng, d, n = np.random.default_rng(0), 2 * shape["d_model"], 16
    x, B, C = (rng.normal(size=(1, l, k)).astype(np.float32) for k in (d, n, n))
    delta = np.exp(rng.uniform(np.log(1e-3), np.log(0.1), (1, l, d))).astype(np.float32)
    A = -np.tile(np.arange(1, n + 1, dtype=np.float32), (d, 1))
    inputs = jax.device_put((x, delta, A, B, C, np.ones(d, np.float32)))
    run = jax.jit(selective_scan)
    return with_work(lambda: jax.block_until_ready(run(*inputs)))


def measure_once(block, devices, l, shape):
    """One reading of a long text, and what it says -> dict."""
    import jax

    compiled, arguments = program(block, devices, l, shape)
    plan = compiled.memory_analysis()
    start = time.perf_counter()
    logits, _ = jax.block_until_ready(compiled(*arguments))
    return {
        "seconds": round(time.perf_counter() - start, 2),
        "device_bytes": plan.temp_size_in_bytes
        + plan.output_size_in_bytes
        + plan.argument_size_in_bytes,
        "finite": bool(np.isfinite(np.asarray(logits)).all()),
    }


def measure_all(memory_at, timed_at, million, shape):
    for block in BLOCKS:
        for l in (memory_at // 8, memory_at):
            for n in DEVICES:
                row = {"of": "program", "block": block, "devices": n, "l": l} | shape
                yield row | in_child(__file__, "measure_program", block, n, l, shape)
    row = {"of": "scan", "devices": 1, "l": timed_at} | shape
    yield row | in_child(__file__, "measure_scan", timed_at, shape)
    for n in DEVICES:
        row = {"of": "time", "block": "Mamba", "devices": n, "l": timed_at} | shape
        yield row | in_child(__file__, "measure_time", "Mamba", n, timed_at, shape)
    row = {"of": "long", "block": "Mamba", "devices": 8, "l": million} | shape
    yield row | in_child(__file__, "measure_once", "Mamba", 8, million, shape)


if __name__ == "__main__":
    run_by_part(
        "devices",
        measure_all,
        full=(MEMORY_AT, TIMED_AT, MILLION, SHAPE),
        quick=(512, 256, 1024, QUICK),
    )
