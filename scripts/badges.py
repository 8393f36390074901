"""Write one badge per chapter from a run of the tests: what the newest packages say to its cells.

    python scripts/badges.py _build/newest.xml _build/badges

Reads what ``pytest --nbval --junitxml`` wrote and writes, for each chapter of _toc.yml, a JSON file
as shields.io's endpoint badges read it: 01_continuous_ssm.json and so on.
"""

import json
import platform
import sys
import xml.etree.ElementTree as ET
from importlib.metadata import version
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]


def chapters():
    """The names of the numbered chapters, such as 01_continuous_ssm, in order."""
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
    numbered = [part for part in toc["parts"] if part.get("numbered")]
    return [entry["file"].split("/")[-1] for part in numbered for entry in part["chapters"]]


def badge(cases, number, versions):
    """The badge of a chapter whose cells are these <testcase> elements."""
    bad = sum(case.find("failure") is not None or case.find("error") is not None for case in cases)
    if not cases:
        message, color = "not run", "lightgrey"
    elif bad:
        message, color = f"{bad} of {len(cases)} cells differ, {versions}", "red"
    else:
        message, color = f"{len(cases)} cells agree, {versions}", "brightgreen"
    return {
        "schemaVersion": 1,
        "label": f"chapter {number}",
        "message": message,
        "color": color,
    }


def main(report, folder):
    # A run that ended before it wrote a report has run nothing.
    cases = list(ET.parse(report).iter("testcase")) if Path(report).exists() else []
    versions = f"jax {version('jax')}, python {platform.python_version()}"
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(chapters(), start=1):
        own = [case for case in cases if f"{name}.ipynb" in str(sorted(case.attrib.items()))]
        text = json.dumps(badge(own, number, versions), indent=1) + "\n"
        (folder / f"{name}.json").write_text(text, encoding="utf-8")
        print(f"{name}: {json.loads(text)['message']}")


if __name__ == "__main__":
    main(*sys.argv[1:])
