"""Where the parts of the book stand, and how tests read its notebooks."""

import importlib.util
import re
from pathlib import Path
from typing import NamedTuple

import nbformat
import yaml

ROOT = Path(__file__).resolve().parents[2]
CONFIG = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))
REPOSITORY = CONFIG["repository"]["url"]
TOC = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
CHAPTERS = [c["file"] for part in TOC["parts"] if part.get("numbered") for c in part["chapters"]]
NOTEBOOKS = sorted((ROOT / "book").glob("*.ipynb"))


def load_script(path):
    """The module that a file outside of every package makes, by its path in the repository."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read(path):
    return nbformat.read(path, as_version=4)


def code_cells(path):
    return [cell for cell in read(path).cells if cell.cell_type == "code"]


def prose(path):
    """The text of all Markdown cells."""
    return "\n".join(cell.source for cell in read(path).cells if cell.cell_type == "markdown")


FOLDED_SOURCE = {"hide-input", "hide-cell", "remove-input", "remove-cell"}  # tags: code not in view
FOLDED_OUTPUT = {"hide-output", "hide-cell", "remove-output", "remove-cell"}


class InView(NamedTuple):
    """What a reader of a page sees without opening a fold."""

    words: int  # of prose, without the solutions of exercises and without equations
    code_lines: int  # that are not blank, of all cells, those of the solutions included
    true_lines: int  # lines of printed output that end in True


def in_view(notebook):
    """Count what is in view on the page that a notebook makes -> InView."""
    words = code_lines = true_lines = 0
    in_solution = False
    for cell in notebook.cells:
        tags = set(cell.metadata.get("tags", []))
        if cell.cell_type == "markdown":
            text, in_solution = _without_solutions(cell.source, in_solution)
            words += _count_words(text)
        elif cell.cell_type == "code":
            if not tags & FOLDED_SOURCE:
                code_lines += sum(bool(line.strip()) for line in cell.source.split("\n"))
            if not tags & FOLDED_OUTPUT:
                text = "\n".join(output.get("text", "") for output in cell.outputs)
                true_lines += sum(line.rstrip().endswith("True") for line in text.split("\n"))
    return InView(words, code_lines, true_lines)


def _without_solutions(text, in_solution):
    """A solution begins in one cell and ends in another. -> the rest, and whether one is open."""
    mark = r"(```+\{solution-start\}[\s\S]*?```+|```+\{solution-end\}\s*```+)"
    kept = []
    for part in re.split(mark, text):
        if "{solution-start}" in part:
            in_solution = True
        elif "{solution-end}" in part:
            in_solution = False
        elif not in_solution:
            kept.append(part)
    return "\n".join(kept), in_solution


def _count_words(text):
    """Words outside of closed boxes. A formula in a line is one word; an equation is none."""
    closed_box = (
        r"(`{3,})\{(?:admonition|dropdown|note|tip)\}[^\n]*\n"
        r"(?=(?:[^\n]*\n)?:class:[^\n]*dropdown)[\s\S]*?\n\1(?!`)"
    )
    text = re.sub(closed_box, "", text)
    text = re.sub(r"\$\$[\s\S]*?\$\$( \([^)]*\))?", "", text)
    # Fences, options, labels and the rules of tables.
    text = re.sub(r"^```+.*$|^:\w+:.*$|^\([a-z-]+\)=$|^\|[-| ]+\|$", "", text, flags=re.MULTILINE)
    text = re.sub(r"\]\([^)]*\)", "]", text)  # a link's words without its address
    text = re.sub(r"\$[^$]*\$", "X", text)
    return sum(bool(re.search(r"\w", word)) for word in re.findall(r"[\w’'{}`.-]+", text))
