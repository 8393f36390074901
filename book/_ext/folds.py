"""Folds that say what they hold, below what they belong to.

A cell with the tag hide-input, hide-output or hide-cell becomes what is in view, and below it one
bar that the reader opens. MyST-NB puts the bar above and calls it "Show code cell source"; here its
text is the cell's own (``"mystnb": {"code_prompt_show": "five checks agree to 1e-5"}``) or, without
one, made from what it holds: the number of the figure, the functions of a listing, imports, checks.
Bars that would stand on each other become one, with both texts.
"""

import ast
import html
import re

from docutils import nodes
from sphinx.transforms.post_transforms import SphinxPostTransform


class fold(nodes.Element):
    """A closed part of a page: ``says`` has the texts of its bar, its children are folded away."""


def visit_fold(self, node):
    text = html.escape(" · ".join(dict.fromkeys(node["says"])), quote=False)
    self.body.append(f'<details class="fold">\n<summary>{text}</summary>\n')


def depart_fold(self, node):
    self.body.append("</details>\n")


def part(cell, element):
    """The cell's source or its output, None where it was removed."""
    kinds = {child.get("nb_element"): child for child in cell.children}
    return kinds.get(f"cell_code_{element}")


class FoldCells(SphinxPostTransform):
    """Before MyST-NB chooses among the forms of an output (4), and folds by itself (199)."""

    default_priority = 3
    formats = ("html",)

    def run(self, **kwargs):
        cells = [
            node
            for node in self.document.findall(nodes.container)
            if node.get("nb_element") == "cell_code"
        ]
        for cell in cells:
            self.fold(cell)
        for cell in cells:
            join_with_next(cell)

    def fold(self, cell):
        """Put what the cell's tags fold away into one fold, the last thing in the cell."""
        mode = cell.attributes.pop("hide_mode", None)
        source, output = part(cell, "source"), part(cell, "output")
        folded = {
            "all": [source, output],
            "input+output": [source, output],
            "input": [source],
            "output": [output],
        }.get(mode, [])
        folded = [child for child in folded if child is not None]
        if not folded:
            return
        named = cell["cell_metadata"].get("mystnb", {}).get("code_prompt_show")
        seen = output if output not in folded else None
        name = named or self.describe(source, output, seen)
        bar = fold(says=[name], named=bool(named))
        for child in folded:
            cell.remove(child)
            bar.append(child)
        cell.append(bar)

    def describe(self, source, output, seen):
        """What a cell holds, in the words of its bar; ``seen`` is its output, if it is in view."""
        if output is not None and (listed := shown_sources(output)):
            return "listing: " + "; ".join(
                f"{', '.join(names)} ({file})" for file, names in listed.items()
            )
        code = source.astext() if source is not None else ""
        if seen is None:
            return describe_hidden(code, output)
        for figure in seen.findall(nodes.figure):
            return f"code of {self.number(figure)}"
        return f"code of this {'table' if has_table(seen) else 'output'}"

    def number(self, figure):
        """A figure's number, as its caption has it."""
        numbers = self.env.toc_fignumbers.get(self.env.docname, {}).get("figure", {})
        if found := next((numbers[name] for name in figure["ids"] if name in numbers), None):
            return self.config.numfig_format["figure"] % ".".join(map(str, found))
        return "this figure"


def shown_sources(output):
    """{file: names} of what ``show_source`` displays in a cell's output."""
    files = {}
    for bundle in output.findall(nodes.container):
        if bundle.get("nb_element") != "mime_bundle":
            continue
        forms = {child["mime_type"]: child for child in bundle.children}
        plain = forms["text/plain"].astext() if "text/plain" in forms else ""
        if plain.startswith("source of ") and "text/markdown" in forms:
            file = next(forms["text/markdown"].findall(nodes.literal)).astext()
            module = file.removesuffix(".py").replace("/", ".")
            name = plain.removeprefix("source of ").strip().removeprefix(module + ".")
            files.setdefault(file, []).append(name)
    return files


def has_table(output):
    return any(True for _ in output.findall(nodes.table))


def describe_hidden(code, output):
    """What a cell of which nothing is in view is for, from its statements and its output."""
    try:
        statements = ast.parse(code).body
    except SyntaxError:  # a cell with a magic command
        statements = []
    if statements and all(isinstance(s, ast.Import | ast.ImportFrom) for s in statements):
        return "imports"
    if "checks.table()" in code:
        return "table of all checks"
    if re.search(r"^\s*(checks\.(close|holds)\(|assert\b)", code, flags=re.MULTILINE):
        return "checks"
    if output is not None and has_table(output):
        return "table"
    defined = [s.name for s in statements if isinstance(s, ast.FunctionDef | ast.ClassDef)]
    return f"code: {', '.join(defined)}" if defined else "setup" if code else "output"


def join_with_next(cell):
    """Two cells in a row that would show a bar each, with nothing in view between: one bar."""
    siblings = cell.parent.children
    place = siblings.index(cell)
    after = siblings[place + 1] if place + 1 < len(siblings) else None
    if not (isinstance(after, nodes.container) and after.get("nb_element") == "cell_code"):
        return
    if not cell.children or not after.children:
        return
    first, second = cell.children[-1], after.children[-1]
    if not (isinstance(first, fold) and isinstance(second, fold)):
        return
    if len(after.children) == 1:  # both bars stand below what the first cell shows
        second.insert(0, first.children)
        second["says"] = first["says"] + second["says"]
        second["named"] = first["named"] or second["named"]
        after.insert(0, cell.children[:-1])
    elif len(cell.children) == 1 and not first["named"] and "imports" not in first["says"]:
        second.insert(0, first.children)  # what the next cell's figure needs goes into its fold
    else:
        return
    cell.parent.remove(cell)


def setup(app):
    app.add_node(fold, html=(visit_fold, depart_fold))
    app.add_post_transform(FoldCells)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
