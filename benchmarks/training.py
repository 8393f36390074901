"""Gather the recorded training runs for the book, after ``python -m mamba.train ... --results``.

    python benchmarks/training.py   # results/training/*.json -> mamba_book/data/training.json

Each file says which command recorded it. Chapter 8 reads the copy, in which the runs that repeat
another with a further seed have no curve.
"""

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def gather():
    """What chapter 8 reads -> {run's name: its record}."""
    runs = sorted((ROOT / "benchmarks" / "results" / "training").glob("*.json"))
    gathered = {run.stem: json.loads(run.read_text(encoding="utf-8")) for run in runs}
    for name, run in gathered.items():
        if "-seed-" in name:
            del run["curve"]
    return gathered


def main():
    gathered = gather()
    path = ROOT / "mamba_book" / "data" / "training.json"
    path.write_text(json.dumps(gathered, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"{len(gathered)} runs -> {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
