"""The notebooks: their form, and the parts that a chapter must have.

What the cells compute is verified by ``pytest --nbval``. Here: that nbval has something to compare,
since a cell without a count and outputs passes whatever it prints.
"""

import re

import pytest

from tests.helpers.book import (
    CHAPTERS,
    CONFIG,
    NOTEBOOKS,
    REPOSITORY,
    ROOT,
    code_cells,
    load_script,
    prose,
    read,
)

SETUP = f"""\
import os, subprocess, sys
if os.environ.get("COLAB_RELEASE_TAG"):
    subprocess.check_call([sys.executable, "-m", "pip", "install", "-q", \
"jax-mamba @ git+{REPOSITORY}@{CONFIG["repository"]["branch"]}"])"""

run = load_script("book/run.py")
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@each_notebook
def test_notebook_is_canonical(path):
    assert path.read_text(encoding="utf-8") == run.canonical(read(path)), (
        f"run python book/run.py {path.relative_to(ROOT)}"
    )


@each_notebook
def test_every_cell_was_executed_in_order_and_without_error(path):
    assert run.problems(read(path)) == []


@each_notebook
def test_nothing_escapes_the_comparison(path):
    used = {tag for cell in code_cells(path) for tag in run.tags(cell)}
    assert not used & {"nbval-ignore-output", "skip-execution", "raises-exception"}


@each_notebook
def test_first_code_cell_installs_in_colab(path):
    cell = code_cells(path)[0]
    assert cell.source == SETUP
    assert run.tags(cell) == ["remove-cell"]


@each_notebook
def test_cells_are_small(path):
    folded = {"hide-input", "hide-cell", "remove-input", "remove-cell"}
    for cell in code_cells(path)[1:]:
        lines = cell.source.splitlines()
        assert len(lines) <= (40 if folded & set(run.tags(cell)) else 25), cell.source
        assert max(map(len, lines)) <= 100, cell.source


@each_notebook
def test_no_line_that_a_check_prints_ends_in_true(path):
    """Checks go through ``mamba_book.Checks``, whose lines say what holds."""
    for cell in code_cells(path):
        assert not re.search(r"\bdef (check|finding|difference)\b|checks_table", cell.source)
        for output in cell.outputs:
            if output.output_type == "stream":
                assert not re.search(r": True$", output.text, flags=re.MULTILINE), output.text


@pytest.mark.parametrize("name", CHAPTERS)
def test_a_chapter_has_all_its_parts(name):
    path = ROOT / f"{name}.ipynb"
    text = prose(path)
    figures = [
        output
        for cell in code_cells(path)
        for output in cell.outputs
        if "<svg" in output.get("data", {}).get("text/html", "")
    ]
    assert re.match(r"\(ch-[a-z-]+3?\)=\n# .+\n\n\*[^*]+\?\*", text), "label, title, question"
    assert 2 <= len(solved_exercises(text)) <= 4
    assert len(figures) >= 2
    assert ":class: takeaway" in text
    assert re.search(r"\$\$ \(eq-\S+\)|:label: eq-", text), "a numbered equation"
    for heading in ("What we checked", "Exercises", "Further reading"):
        assert re.search(rf"^## {heading}$", text, flags=re.MULTILINE), heading


def solved_exercises(text):
    """The labels of the exercises; each is followed by its solution, folded."""
    exercises = re.findall(r"^```+\{exercise\}.*\n:label: (\S+)", text, flags=re.MULTILINE)
    solution = r"^```+\{solution-start\} (\S+)\n:class: dropdown"
    assert exercises == re.findall(solution, text, flags=re.MULTILINE)
    return exercises


@pytest.mark.parametrize("name", ["paper_vs_code", "verification"])
def test_a_notebook_for_reference_has_its_parts(name):
    """They are no chapters and need no equation of their own. The rest holds for them, too."""
    path = ROOT / "book" / f"{name}.ipynb"
    text = prose(path)
    assert re.match(r"\(ch-[a-z-]+\)=\n# .+\n\n\*[^*]+\?\*", text), "label, title, question"
    assert 2 <= len(solved_exercises(text)) <= 4
    assert ":class: takeaway" in text
    for heading in ("Exercises", "Further reading"):
        assert re.search(rf"^## {heading}$", text, flags=re.MULTILINE), heading
    # What stands at its top was made by a cell further down.
    shown = set(re.findall(r"^```\{glue(?::md|:figure)?\} (\S+)$", text, flags=re.MULTILINE))
    outputs = [output for cell in code_cells(path) for output in cell.outputs]
    made = [output.metadata["scrapbook"]["name"] for output in outputs if output.get("metadata")]
    assert shown and sorted(made) == sorted(shown)


def glued_table(name):
    """The Markdown table that a notebook for reference displays at its top."""
    (table,) = (
        output.data["text/markdown"]
        for cell in code_cells(ROOT / "book" / f"{name}.ipynb")
        for output in cell.outputs
        if output.get("metadata") and "text/markdown" in output.data
    )
    return table


KINDS = {"differs", "paper silent", "same, misread", "ports err"}


def test_the_ledger_has_one_form_and_one_line_for_each_entry():
    notebook = read(ROOT / "book" / "paper_vs_code.ipynb")
    cells = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    kinds = {}
    entries = [re.match(r"\(ledger-([a-z-]+)\)=\n### .+\n\n", source) for source in cells]
    labels = [entry[1] for entry in entries if entry]
    for entry, source in zip(entries, cells, strict=True):
        if entry:
            parts = re.findall(r"^\*\*(\w+)\.?\*\*", source, flags=re.MULTILINE)
            assert parts == ["Kind", "Paper", "Code", "Why", "Asked", "Number"], source
            kinds[entry[1]] = re.search(r"^\*\*Kind\.\*\* (.+)\.$", source, re.MULTILINE)[1].lower()
    rows = re.findall(
        r"\(ledger-([a-z-]+)\) \| ([^|]+) \| ([^|]+) \|", glued_table("paper_vs_code")
    )
    assert sorted(label for label, _, _ in rows) == sorted(labels) and len(labels) >= 17
    assert {label: kind for label, kind, _ in rows} == kinds and set(kinds.values()) == KINDS
    prices = [float(price.strip("<– ") or 0) for _, _, price in rows]
    assert prices == sorted(prices, reverse=True) and sum(p > 0 for p in prices) >= 8


def test_the_ledger_links_to_code_that_does_not_change():
    """To a commit, or to a release of transformers."""
    links = re.findall(
        r"https://github\.com/[^)\s]+/blob/([^/]+)/", prose(ROOT / "book" / "paper_vs_code.ipynb")
    )
    assert len(links) >= 30
    assert [link for link in links if not re.fullmatch(r"[0-9a-f]{40}|v\d+\.\d+\.\d+", link)] == []


def test_the_ledger_prints_words_and_no_markup():
    for cell in code_cells(ROOT / "book" / "paper_vs_code.ipynb"):
        for output in cell.outputs:
            assert not re.search(r"[`$\\]", output.get("text", "")), output.text


def test_every_link_of_the_chain_names_a_test_that_exists():
    named = re.findall(r"blob/main/(tests/\S+\.py)\)", glued_table("verification"))
    assert len(named) >= 13 and [name for name in named if not (ROOT / name).exists()] == []
