"""How far trapezoidal_scan is from recorded outputs of the released Mamba-3 kernels.

    python benchmarks/kernel_records.py FOLDER    # siso/case_*.npz and mimo/case_*.npz, a minute

Where the records are public is in mamba_book/kernel_records.py; FOLDER is not part of this
repository. The errors are root mean squares, relative to the output's: of each method, and of the
scan made wrong in one respect. Also how far the module's own output moves when it is rounded to
bfloat16 as the kernel's was, which no exact computation could avoid. Writes
benchmarks/results/kernel_records.json, and the same to mamba_book/data for chapter 12.
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from _report import head, load_average, record

from mamba.trapezoid import METHODS, trapezoidal_scan
from mamba_book.kernel_records import WRONG, read_call, root_mean_square_error

scan = jax.jit(trapezoidal_scan, static_argnames=("pairs", "method"))


def output_of(call, method="auto"):
    """The module's output for a call, as the kernel returns it -> (b, l, h, p)."""
    inputs = {name: jnp.asarray(v, jnp.float32) for name, v in call.inputs.items()}
    return call.output(np.asarray(scan(**inputs, pairs=call.pairs, method=method)))


def errors_of(path):
    """All errors of a recorded call -> dict."""
    call = read_call(path)
    b, l, h, r, p = call.inputs["x"].shape
    s, n = call.inputs["theta"].shape[-1], call.inputs["B"].shape[-1]
    ours = output_of(call)
    rounded = np.float32(jnp.asarray(ours, jnp.bfloat16))
    return {
        "record": f"{path.parent.name}/{path.stem}",
        "sizes": {"b": b, "l": l, "h": h, "r": r, "p": p, "n": n, "s": s},
        **{m: root_mean_square_error(output_of(call, m), call.out) for m in METHODS},
        "rounding": root_mean_square_error(rounded, ours),
        "wrong": {
            name: root_mean_square_error(output_of(make(call)), call.out)
            for name, make in WRONG.items()
        },
    }


def main():
    """Compare with every record of a folder."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    folder, before = parser.parse_args().folder, load_average()
    paths = sorted(folder.glob("*/case_*.npz"), key=lambda p: (p.parent.name != "siso", p.name))
    if not paths:
        parser.error(f"there is no */case_*.npz in {folder}")
    results = [errors_of(path) for path in paths]
    for row in results:
        worst = min(row["wrong"].values())
        print(f"{row['record']}: {row['chunked']:.2%}; wrong on purpose: {worst:.2%} and more")
    note = "outputs of the official kernels, recorded on a GPU by a third party, are the reference"
    report = head(note, before)
    report["command"] = "python benchmarks/kernel_records.py FOLDER"
    record("kernel_records", report, results)


if __name__ == "__main__":
    main()
