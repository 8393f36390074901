"""What benchmarks/accelerator.py recorded, as a table and as a roofline.

A report is the dict that the kit writes: the machine, and results, one row for each measurement.
"""

import json
import math
from importlib.resources import files
from pathlib import Path

import jax
import jax.numpy as jnp

from mamba import selective_scan
from mamba_book.depth import bytes_moved
from mamba_book.figures import COLORS, METHODS

__all__ = ["asked_bytes", "cpu_report", "draw_roofline", "points", "recorded", "table"]

LOOKS = {"pallas": COLORS["x"], "mosaic": COLORS["z"]}
LOOKS |= {name: METHODS[name] for name in ("associative", "chunked", "sequential")}
ON_CHIP = 2**23  # bytes: what stays on the chip in the count of a method's bytes
LENGTH = 2048  # of the points in the roofline


def recorded():
    """The reports of all accelerators that were measured so far -> list, by name of the file."""
    folder = Path(str(files("mamba_book"))) / "data" / "accelerator"
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]


def cpu_report():
    """The record of chapter 9, of a CPU, in the form of a report."""
    path = files("mamba_book") / "data" / "hardware.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    shape = {k: record[k] for k in "bldn"} | {"dtype": "float32"}
    memory, exponentials = (
        next(r for r in record["results"] if r.get("of") == of)
        for of in ("memory read", "exponentials")
    )
    read = memory["bytes_per_s"]
    rates = {"read": read, "copy": read, "exponentials": exponentials["exp_per_s"]}
    rows = [
        {"of": "scan", "method": r["method"], "pass": r["pass"], "ms": r["min_ms"]} | shape
        for r in record["results"]
        if r.get("method") in LOOKS and r["choice"] == "method"
    ]
    device = f"{record['processor']}, {record['cores']} cores"
    return record | {"device": device, "results": [{"of": "limits"} | rates, *rows]}


def asked_bytes(row):
    """Bytes that a point of selective_scan asks to carry to and from the main memory.

    Counted on its program, without a gate; a kernel's are its inputs and its output, once.
    """
    b, l, d, n = (row[k] for k in "bldn")
    if row["method"] in ("pallas", "mosaic"):
        return 4 * (4 * b * l * d + 2 * b * l * n)
    shapes = [(b, l, d), (b, l, d), (d, n), (b, l, n), (b, l, n), (d,)]
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]

    def run(*v):
        return selective_scan(*v, method=row["method"])

    least = 4 * (3 * b * l * d + 2 * b * l * n)  # also where every array would fit on the chip
    return max(least, bytes_moved(run, *arrays, on_chip=ON_CHIP))


def points(report):
    """The measured points for a roofline: forward, float32, one row -> rows, one for a method."""
    rows = [
        r
        for r in report["results"]
        if r["of"] == "scan" and "ms" in r and r["pass"] == "forward"
        if (r["dtype"], r["b"]) == ("float32", 1) and r["method"] in LOOKS
    ]
    lengths = {r["l"] for r in rows}
    length = LENGTH if LENGTH in lengths else max(lengths, default=None)
    return [r for r in rows if r["l"] == length]


def draw_roofline(ax, report):
    """Exponentials per second against those per byte asked for, under the machine's two limits."""
    (rates,) = (r for r in report["results"] if r["of"] == "limits")
    beta, epsilon = max(rates["read"], rates["copy"]), rates["exponentials"]
    intensity = [10 ** (k / 20) for k in range(-60, 41)]
    roof = [min(epsilon, beta * x) / 1e9 for x in intensity]
    ax.loglog(intensity, roof, color=COLORS["ref"])
    for r in points(report):
        exponentials = r["b"] * r["l"] * r["d"] * r["n"]
        x, y = exponentials / asked_bytes(r), exponentials / r["ms"] / 1e6
        ax.loglog(x, y, "o", ms=9, color=LOOKS[r["method"]])
        ax.annotate(
            r["method"],
            (x, y),
            xytext=(9, 0),
            textcoords="offset points",
            color=LOOKS[r["method"]],
            va="center",
        )
    ax.set(
        xlabel="exponentials per byte asked for",
        ylabel="exponentials per second (10⁹)",
        title=report["device"],
        ylim=(min(roof) / 3, 3 * max(roof)),
    )


def table(report):
    """A report's scans of one row in float32, as a Markdown table: time and share of the limit."""
    rows = [
        r for r in report["results"] if r["of"] == "scan" and (r["dtype"], r["b"]) == ("float32", 1)
    ]
    names = list(dict.fromkeys(r["method"] for r in rows))
    lines = ["| tokens | pass | " + " | ".join(names) + " |", "|---" * (len(names) + 2) + "|"]
    for l, which in sorted({(r["l"], r["pass"]) for r in rows}):
        of = {r["method"]: r for r in rows if (r["l"], r["pass"]) == (l, which)}
        cells = [_cell(of[name]) if name in of else "" for name in names]
        lines.append(f"| {l:,} | {which} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(row):
    if "ms" not in row:
        return row.get("skipped", "does not run")
    share = f" ({row['of_limit']:.0%})" if "of_limit" in row else ""
    digits = max(0, 2 - math.floor(math.log10(row["ms"])))  # three in all
    return f"{row['ms']:,.{digits}f} ms{share}"
