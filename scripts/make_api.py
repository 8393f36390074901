"""Write book/api.md: every public name of the module, in one line, with the chapter that shows it.

    python scripts/make_api.py

The names and their lines are read from the files of mamba/, the chapters from the outputs that
``mamba_book.show_source`` left in the notebooks. Nothing is imported and nothing is executed.
"""

import ast
import json
import re
from collections import defaultdict
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "book" / "api.md"
READING_ORDER = (
    *("discretize", "lti", "scan", "chunked", "kernels", "pallas", "ssd", "rotation", "trapezoid"),
    *("collectives", "stretches"),
    *("layers", "config", "mamba1", "mamba2", "mamba3", "model", "parallel"),
    *("checks", "cores", "interrupts", "checkpoint", "text", "train"),
)
HEAD = """\
(ch-api)=
# The module, name by name

Each public function and class of `mamba/` in one line, with the chapter that shows its source. The
files stand in the order in which one reads them. A name that begins with `mamba.` can be imported
from `mamba` itself. `make api` writes this page from the source, and a test compares the two.
"""


def parse(*parts):
    """The syntax tree of a file of mamba/."""
    path = (ROOT / "mamba").joinpath(*parts).with_suffix(".py")
    return ast.parse(path.read_text(encoding="utf-8"))


def public_names():
    """(dotted name of the file, node) of every public function and class, in reading order."""
    files = [p.relative_to(ROOT).with_suffix("") for p in (ROOT / "mamba").rglob("*.py")]
    files = [path.parts[1:] for path in files if not path.stem.startswith("__")]
    for parts in sorted(files, key=lambda parts: (READING_ORDER.index(parts[0]), parts)):
        for node in parse(*parts).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                yield ".".join(("mamba", *parts)), node


def shown_names():
    """{dotted name: the notebooks that show it}, from what show_source wrote into their outputs."""
    shown = defaultdict(set)
    for path in sorted((ROOT / "book").glob("*.ipynb")):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            for output in cell.get("outputs", []):
                text = "".join(output.get("data", {}).get("text/plain", ""))
                if match := re.fullmatch(r"source of (\S+)", text):
                    shown[match[1]].add(path.stem)
    return shown


def exported_names():
    """The names in ``mamba.__all__``."""
    for node in parse("__init__").body:
        if isinstance(node, ast.Assign) and node.targets[0].id == "__all__":
            return set(ast.literal_eval(node.value))


def chapter_links():
    """{notebook: a link to it, by its number in the table of contents or its title}."""
    links = {}
    for part in yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))["parts"]:
        for number, entry in enumerate(part["chapters"], 1):
            stem = entry["file"].removeprefix("book/")
            text = f"chapter {number}" if part.get("numbered") else stem.replace("_", " ")
            links[stem] = f"[{text}]({stem}.ipynb)"
    return links


def first_sentence(node):
    """The first sentence of a docstring, on one line of Markdown."""
    paragraph = (ast.get_docstring(node) or "").split("\n\n")[0]
    sentence = re.match(r".+?[.](?=\s|$)|.+", " ".join(paragraph.split()))
    text = sentence[0].rstrip(":,") if sentence else ""
    code = re.split(r"``(.+?)``", text)  # every second part stands between double backticks
    prose = [re.sub(r"([*_$<`\[])", r"\\\1", part) for part in code[::2]]
    verbatim = [f"`{part}`" for part in code[1::2]]
    return "".join(a + b for a, b in zip(prose, [*verbatim, ""], strict=True))


def headings(module, last):
    """What stands before the first name of a file, and of a folder."""
    _, *parts = module.split(".")
    lines = []
    if len(parts) > 1 and not (last or "").startswith(f"mamba.{parts[0]}."):
        lines += ["", f"## {parts[0]}", "", first_sentence(parse(parts[0], "__init__"))]
    path = "/".join(("mamba", *parts)) + ".py"
    title = f"{'#' * (len(parts) + 1)} {parts[-1]}"
    return [*lines, "", title, "", f"`{path}`", "", first_sentence(parse(*parts))]


def api():
    """The text of the page."""
    shown, exported, links = shown_names(), exported_names(), chapter_links()
    lines, last = [HEAD.rstrip()], None
    for module, node in public_names():
        if module != last:
            lines += headings(module, last)
            last = module
        name = f"mamba.{node.name}" if node.name in exported else node.name
        where = ", ".join(links[stem] for stem in sorted(shown[f"{module}.{node.name}"]))
        lines += ["", f"`{name}` ({where or 'in no chapter'})", f": {first_sentence(node)}"]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(api(), encoding="utf-8")
    print(PAGE.relative_to(ROOT))
