"""Memory and time of loading a checkpoint, compared with reading its file, in every form.

    python benchmarks/loading.py            # the 130m shape in every form, about three minutes
    python benchmarks/loading.py --quick    # a small model, to see that it runs; writes nothing

Random float32 weights of the shape of Mamba-130m are written to a temporary folder in every form
that `from_pretrained` reads. Each form is loaded in processes of its own. One process measures the
peak memory: its growth since the imports, over the size of the parameters. Several measure the
time, and the shortest counts. For comparison, the same process reads the same files from the page
cache, once into memory that was allocated and touched before ("read"), and once into memory that is
new to the process, as that of the parameters is ("fresh read"). And two processes load the model
together, each its own half of every matrix ("of_one_process": the larger peak). Linux only, because
it needs /proc. Writes benchmarks/results/loading.json.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from _report import write

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "loading.json"
PROCESSES = 2  # that share a model, each with a part of every matrix
REPEATS = 5  # processes that measure the time of each form; the shortest time counts
SHARDS = 3
sys.path.insert(0, str(ROOT))  # for tests.helpers


def write_forms(folder, config):
    """Write the same random weights in every form -> names of the folders."""
    from safetensors.numpy import save_file

    from mamba.checkpoint.names import tensor_table, write_config
    from tests.helpers import bin_files  # writes .bin files without PyTorch

    rng = np.random.default_rng(0)
    forms = []
    for naming in ("original", "transformers"):
        embedding = "embedding" if naming == "original" else "embeddings"
        arrays = {
            spec.name: rng.normal(size=spec.shape).astype(np.float32)
            for spec in tensor_table(config, embedding)
        }
        names = list(arrays)
        repeated = {**arrays, "lm_head.weight": arrays[f"backbone.{embedding}.weight"]}

        def new(form, naming=naming):
            path = folder / f"{naming}, {form}"
            path.mkdir()
            if naming == "original":
                write_config(path / "config.json", config)
            else:
                (path / "config.json").write_text(json.dumps(transformers_keys(config)))
            forms.append(path.name)
            return path

        save_file(arrays, new("safetensors") / "model.safetensors")
        if naming == "transformers":
            bin_files.write_bin(new("bin") / "pytorch_model.bin", arrays)
            continue
        save_file(repeated, new("safetensors, head repeated") / "model.safetensors")
        path, where = new("sharded safetensors"), {}
        for i in range(SHARDS):
            file = f"model-{i + 1:05}-of-{SHARDS:05}.safetensors"
            save_file({name: arrays[name] for name in names[i::SHARDS]}, path / file)
            where |= dict.fromkeys(names[i::SHARDS], file)
        index = {"metadata": {}, "weight_map": where}
        (path / "model.safetensors.index.json").write_text(json.dumps(index))
        bin_files.write_bin(new("bin") / "pytorch_model.bin", arrays)
        bin_files.write_bin(new("bin, head repeated") / "pytorch_model.bin", repeated)
    return forms


def transformers_keys(config):
    """The sizes of a model in transformers' spelling of config.json."""
    return {
        "model_type": "mamba",
        "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layer,
        "vocab_size": config.padded_vocab_size,
        "state_size": config.d_state,
    }


def measure(folder, what):
    """Load once in this process -> its peak memory, or its times.

    what: "time", "memory", or the port and the number of one of PROCESSES that share the model.
    """
    import jax
    import jax.numpy as jnp

    from mamba import Mamba

    port, _, process = what.partition(" ")
    options = {}
    if process:  # each process holds a part of every matrix
        jax.distributed.initialize(f"localhost:{port}", PROCESSES, int(process))
        from mamba.parallel import make_mesh, parameter_shardings

        options["shardings"] = partial(parameter_shardings, mesh=make_mesh(model=PROCESSES))
    jnp.zeros(1).block_until_ready()
    Mamba.from_pretrained(ROOT / "mamba" / "weights" / "pystdlib")  # to have all imports done
    if what == "memory" or process:
        before = status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from now
        _, params = Mamba.from_pretrained(folder, **options)
        jax.block_until_ready(params)
        peak = status("VmHWM") - before
        weights = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
        return {"weights_bytes": weights, "peak_bytes": peak}
    files = [path for path in Path(folder).iterdir() if path.suffix in (".safetensors", ".bin")]
    size = sum(path.stat().st_size for path in files)
    buffer = np.ones(max(path.stat().st_size for path in files), np.uint8)
    read_all(files, buffer)  # into the page cache
    before = min(read_all(files, buffer), read_all(files, buffer))
    start = time.perf_counter()
    _, params = Mamba.from_pretrained(folder)
    jax.block_until_ready(params)
    load = time.perf_counter() - start
    start = time.perf_counter()
    contents = [path.read_bytes() for path in files]  # new memory, as the parameters' was
    fresh = time.perf_counter() - start
    assert sum(map(len, contents)) == size
    after = min(read_all(files, buffer), read_all(files, buffer))
    return {
        "file_bytes": size,
        "read_s": (before + after) / 2,
        "fresh_read_s": fresh,
        "load_s": load,
    }


def read_all(files, buffer):
    """Seconds to read the files into the buffer, one after the other."""
    start = time.perf_counter()
    for path in files:
        with open(path, "rb", buffering=0) as file:
            view = memoryview(buffer)
            while count := file.readinto(view):
                view = view[count:]
    return time.perf_counter() - start


def status(key):
    """An entry of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def in_processes(folder):
    """The largest peak of PROCESSES that load the model together, in bytes."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    with ThreadPoolExecutor() as pool:
        parts = pool.map(lambda i: in_child(folder, f"{port} {i}"), range(PROCESSES))
        return max(part["peak_bytes"] for part in parts)


def in_child(folder, what):
    command = [sys.executable, str(Path(__file__).resolve()), "--measure", str(folder), what]
    env = dict(os.environ, JAX_PLATFORMS="cpu", PYTHONPATH=str(ROOT))
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{folder}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a small model, writes nothing")
    parser.add_argument("--note", default="", help="what else ran on the machine meanwhile")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(*args.measure)))
        return
    if not Path("/proc/self/clear_refs").exists():
        print("needs Linux's /proc: skipped")
        return
    from mamba import MambaConfig

    if args.quick:
        config, repeats = MambaConfig(d_model=256, n_layer=2, vocab_size=5000), 1
    else:
        config, repeats = MambaConfig(d_model=768, n_layer=24, vocab_size=50277), REPEATS
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for form in write_forms(Path(folder), config):
            memory = in_child(Path(folder) / form, "memory")
            memory["peak_bytes_of_one_process"] = in_processes(Path(folder) / form)
            times = [in_child(Path(folder) / form, "time") for _ in range(repeats)]
            results.append(
                {"form": form}
                | memory
                | {
                    "file_bytes": times[0]["file_bytes"],
                    "peak_over_weights": round(memory["peak_bytes"] / memory["weights_bytes"], 3),
                    "of_one_process_over_weights": round(
                        memory["peak_bytes_of_one_process"] / memory["weights_bytes"], 3
                    ),
                }
                | {
                    key: round(min(t[key] for t in times), 4)
                    for key in ("read_s", "fresh_read_s", "load_s")
                }
            )
            row = results[-1]
            for key in ("read", "fresh_read"):
                row[f"load_over_{key}"] = round(row["load_s"] / row[f"{key}_s"], 3)
            print(
                f"{form:42s} peak {row['peak_over_weights']:.2f} × weights, in each of "
                f"{PROCESSES} processes {row['of_one_process_over_weights']:.2f}   load "
                f"{row['load_s']:.3f} s = {row['load_over_read']:.2f} × reading, "
                f"{row['load_over_fresh_read']:.2f} × reading into fresh memory",
                flush=True,
            )
    if args.quick:
        return
    from mamba.train.results import (
        describe_run,  # with JAX, which the processes above must not inherit
    )

    report = describe_run() | {"note": args.note, "model": "130m shape, float32, random weights"}
    write(RESULTS, report, results)


if __name__ == "__main__":
    main()
