"""``book/run.py``: the canonical form of a notebook, and what is wrong with one."""

import nbformat

from tests.helpers.book import load_script

run = load_script("book/run.py")


def test_canonical_form_keeps_what_counts_and_drops_the_rest():
    cell = nbformat.v4.new_code_cell(
        "x = 1 \n", execution_count=3, metadata={"tags": ["a"], "collapsed": True}
    )
    cell.id = "kept"
    unnamed = nbformat.v4.new_markdown_cell("text")
    notebook = nbformat.v4.new_notebook(cells=[cell, unnamed], metadata={"editor": "mine"})
    notebook.cells[1].id = "no such id!"
    text = run.canonical(notebook)
    again = nbformat.reads(text, as_version=4)
    assert run.canonical(again) == text
    assert again.cells[0].source == "x = 1" and again.cells[0].execution_count == 3
    assert again.cells[0].metadata == {"tags": ["a"]} and "editor" not in again.metadata
    assert again.cells[0].id == "kept" and "!" not in again.cells[1].id


def test_problems_are_found():
    cells = [
        nbformat.v4.new_code_cell("1", execution_count=1),
        nbformat.v4.new_code_cell("2"),
        nbformat.v4.new_code_cell("3", metadata={"tags": ["nbval-skip"]}),
        nbformat.v4.new_code_cell("4", execution_count=3),
    ]
    cells[0].outputs = [nbformat.v4.new_output("stream", name="stderr", text="warning")]
    cells[3].outputs = [nbformat.v4.new_output("error", ename="KeyError", evalue="k")]
    notebook = nbformat.v4.new_notebook(cells=cells)
    notebook.metadata[run.EXECUTED] = run.code_digest(notebook)
    found = run.problems(notebook)
    assert [line.split(":")[0] for line in found] == [
        "cell 0 ('1')",
        "cell 1 ('2')",
        "cell 3 ('4')",
    ]
    cells[2].source = "5"
    (line,) = set(run.problems(notebook)) - set(found)
    assert "changed since it was executed" in line
