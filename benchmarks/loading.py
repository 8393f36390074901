"""Memory and time of loading a checkpoint, beside reading its file, for every form of checkpoint.

    python benchmarks/loading.py            # the 130m shape in every form, about three minutes
    python benchmarks/loading.py --quick    # a small model, to see that it runs; writes nothing

Random weights of the shape of Mamba-130m, float32, are written to a temporary folder in every form
that `from_pretrained` reads. Each form is loaded in processes of its own: one for the peak memory
(growth since the imports, over the size of the parameters), several for the times, of which
the least counts. The yardstick of
time is measured in the same process, from the page cache: the same files are read into memory that
was allocated and touched before (`readinto`: "read"), and into memory new to the process, as the
parameters' must be ("fresh read"). Linux only (/proc). Writes benchmarks/results/loading.json.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from _report import write

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "loading.json"
REPEATS = 5  # processes for the time of each form, of which the quickest counts
SHARDS = 3
sys.path.insert(0, str(ROOT / "tests"))  # bin_files, which writes .bin files without PyTorch


def write_forms(folder, config):
    """Write the same random weights in every form -> names of the folders."""
    import bin_files
    from safetensors.numpy import save_file

    from mamba.naming import tensor_table, write_config

    rng = np.random.default_rng(0)
    forms = []
    for naming in ("original", "transformers"):
        embedding = "embedding" if naming == "original" else "embeddings"
        arrays = {
            row.name: rng.normal(size=row.shape).astype(np.float32)
            for row in tensor_table(config, embedding)
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
    """In this process: peak memory over the parameters' size, or the times, of one load."""
    import jax
    import jax.numpy as jnp

    from mamba import Mamba

    jnp.zeros(1).block_until_ready()
    Mamba.from_pretrained(ROOT / "mamba" / "weights" / "pystdlib")  # imports, and what runs once
    if what == "memory":
        before = status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from now
        _, params = Mamba.from_pretrained(folder)
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
    contents = [path.read_bytes() for path in files]  # beside the parameters: also new memory
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
            times = [in_child(Path(folder) / form, "time") for _ in range(repeats)]
            results.append(
                {"form": form}
                | memory
                | {
                    "file_bytes": times[0]["file_bytes"],
                    "peak_over_weights": round(memory["peak_bytes"] / memory["weights_bytes"], 3),
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
                f"{form:42s} peak {row['peak_over_weights']:.2f} × weights   load "
                f"{row['load_s']:.3f} s = {row['load_over_read']:.2f} × reading, "
                f"{row['load_over_fresh_read']:.2f} × reading into fresh memory",
                flush=True,
            )
    if args.quick:
        return
    from mamba.machine import describe_run  # with JAX, which the processes above must not inherit

    report = describe_run() | {"note": args.note, "model": "130m shape, float32, random weights"}
    write(RESULTS, report, results)


if __name__ == "__main__":
    main()
