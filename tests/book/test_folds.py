"""Folds say what they hold and stand below what they belong to: a page with a cell of each kind."""

import io
import re
import sys
from pathlib import Path

import nbformat
import pytest
from sphinx.application import Sphinx
from sphinx.util.docutils import docutils_namespace

ROOT = Path(__file__).resolve().parents[2]
FIGURE = {"text/html": "<svg></svg>", "text/plain": "figure: a line"}
TABLE = {"text/markdown": "| a | b |\n|---|---|\n| 1 | 2 |", "text/plain": "table"}


def listing(name, file="mamba/chunked.py"):
    module = file.removesuffix(".py").replace("/", ".")
    source = f"`{file}`\n\n```python\ndef {name}(): ...\n```"
    return {"text/markdown": source, "text/plain": f"source of {module}.{name}"}


def code(source, *outputs, tags=(), **mystnb):
    outputs = [nbformat.v4.new_output("display_data", data=data) for data in outputs]
    metadata = {"tags": list(tags), "mystnb": mystnb}
    return nbformat.v4.new_code_cell(source, outputs=outputs, metadata=metadata, execution_count=1)


def text(words):
    return nbformat.v4.new_markdown_cell(words)


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """A function: the cells of a page -> its HTML."""

    def build(*cells):
        folder = tmp_path_factory.mktemp("book")
        notebook = nbformat.v4.new_notebook(cells=[text("# A title"), *cells])
        notebook.metadata["language_info"] = {"name": "python"}
        nbformat.write(notebook, folder / "page.ipynb")
        (folder / "index.md").write_text("# Book\n\n```{toctree}\n:numbered:\npage\n```\n", "utf-8")
        config = {
            "extensions": ["myst_nb", "folds", "nobreak"],
            "nb_execution_mode": "off",
            "nb_render_markdown_format": "myst",
            "myst_enable_extensions": ["dollarmath"],
            "numfig": True,
            "html_theme": "basic",
            # Without it, Sphinx adds to its default, which every later app gets.
            "source_suffix": {".md": "myst-nb", ".ipynb": "myst-nb"},
        }
        out = folder / "out"
        said = io.StringIO()
        with docutils_namespace():
            app = Sphinx(
                folder, None, out, folder / "trees", "html", config, status=None, warning=said
            )
            app.build()
        assert said.getvalue() == ""
        return (out / "page.html").read_text("utf-8")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(ROOT / "book" / "_ext"), *sys.path])
        yield build


def bars(page):
    return re.findall(r"<summary>(.*?)</summary>", page)


def test_a_bar_says_what_is_behind_it(build):
    cells = {
        "code of Fig. 1.1": code("draw()", FIGURE, tags=["hide-input"], figure={
            "name": "fig-a", "caption": "A line."}),
        "listing: one, two (mamba/chunked.py); three (mamba_book/depth.py)": code(
            "show_source(one, two, three)", listing("one"), listing("two"),
            listing("three", "mamba_book/depth.py"), tags=["remove-input", "hide-output"]),
        "imports": code("import os\nfrom sys import path", tags=["hide-cell"]),
        "checks": code("x = 1\nchecks.close('a', 'b', x, 1)", tags=["hide-cell"]),
        "table of all checks": code("checks.table()", TABLE, tags=["hide-cell"]),
        "code of this table": code("show(x)", TABLE, tags=["hide-input"]),
        "code: f, G": code("def f(): ...\nclass G: ...", tags=["hide-input"]),
        "setup": code("x = 1", tags=["hide-input"]),
        "five checks agree to 1e-5": code(
            "assert x", tags=["hide-cell"], code_prompt_show="five checks agree to 1e-5"),
    }  # fmt: skip
    page = build(*(cell for cell in cells.values() for cell in (cell, text("Between."))))
    assert bars(page) == list(cells)
    assert "Show code" not in page and "Toggle hidden" not in page
    for summary in re.findall(r"<summary[^>]*>", page):
        assert summary == "<summary>"  # nothing hides its text from a screen reader


def test_a_bar_stands_below_what_is_in_view(build):
    page = build(
        code("draw_it()", FIGURE, tags=["hide-input"]),
        text("Between."),
        code("seen_code()", FIGURE, tags=["hide-output"]),
    )
    order = [page.index(word) for word in ("<svg>", "<summary>", "draw_it", "seen_code")]
    assert order == sorted(order)
    assert page.rindex("<summary>") < page.rindex("<svg>")  # folded


def test_two_bars_on_each_other_become_one(build):
    page = build(
        code("draw_it()", FIGURE, tags=["hide-input"]),
        code("show_source(f)", listing("f"), tags=["remove-input", "hide-output"]),
        text("Between."),
        code("import os", tags=["hide-cell"]),
        code("assert os", tags=["hide-cell"]),
        code("assert os.path", tags=["hide-cell"]),
    )
    assert bars(page) == [
        "code of this figure · listing: f (mamba/chunked.py)".replace("figure", "output"),
        "imports · checks",
    ]
    assert all(word in page for word in ("draw_it", "def", "path"))


def test_what_a_figure_needs_goes_into_its_fold_unless_it_has_a_name(build):
    needed = code("def needed(): ...", tags=["hide-input"])
    drawn = code("needed()", FIGURE, tags=["hide-input"])
    assert bars(build(needed, drawn)) == ["code of this output"]
    needed.metadata["mystnb"] = {"code_prompt_show": "the data"}
    assert bars(build(needed, drawn)) == ["the data", "code of this output"]


def test_cells_that_fold_nothing_are_left_alone(build):
    page = build(code("a()", FIGURE), code("b()", FIGURE, tags=["remove-input"]), code("c()"))
    assert bars(page) == [] and "<details" not in page


def test_what_touches_a_formula_stays_with_it(build):
    page = build(text("the state $h$: it has ($N$) parts, $x$ and extraordinarily$y$."))
    kept = re.findall(r'<span class="nobreak">(.*?</span>.*?)</span>', page)
    assert [re.sub(r"<[^>]+>|\\[()]", "", words) for words in kept] == ["h:", "(N)", "y."]


def test_equal_words_beside_two_formulas_do_not_change_places(build):
    page = build(text("`a`, `b` and $A$, `c`."))
    words = re.sub(r"<[^>]+>|\\[()]", "", page[page.index('<code class="docutils') :])
    assert words.split("\n")[0].startswith("a, b and A, c.")
