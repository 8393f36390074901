"""The main line of a chapter: what is in view without opening a fold stays within limits."""

import nbformat
import pytest

from tests.helpers.book import CHAPTERS, NOTEBOOKS, ROOT, TOC, in_view, read

MOST_WORDS = 3_300
MOST_CODE_LINES = 180
MOST_TRUE_LINES = 3

REFERENCE = ["book/jax_primer", "book/paper_vs_code", "book/verification"]
REFERENCE += ["book/measure_your_gpu"]


def test_every_notebook_is_on_some_list():
    stems = {path.stem for path in NOTEBOOKS}
    assert stems == {name.removeprefix("book/") for name in [*CHAPTERS, *REFERENCE]}
    assert {chapter["file"] for part in TOC["parts"] for chapter in part["chapters"]} >= set(
        REFERENCE
    )


@pytest.mark.parametrize("name", [*CHAPTERS, *REFERENCE])
def test_what_is_in_view_stays_within_the_limits(name):
    seen = in_view(read(ROOT / f"{name}.ipynb"))
    assert seen.words <= MOST_WORDS, seen
    assert seen.code_lines <= MOST_CODE_LINES, seen
    assert seen.true_lines <= MOST_TRUE_LINES, seen


def test_no_page_asks_for_a_fold_without_a_name():
    """MyST-NB's own words for a fold; book/_ext/folds.py replaces them, check_html looks again."""
    pages = [*NOTEBOOKS, *(ROOT / "book").glob("*.md")]
    assert [p.name for p in pages if "Show code cell" in p.read_text("utf-8")] == []


def markdown(*lines):
    return nbformat.v4.new_markdown_cell("\n".join(lines))


def code(source, output, *tags):
    cell = nbformat.v4.new_code_cell(source, metadata={"tags": list(tags)})
    cell.outputs = [nbformat.v4.new_output("stream", name="stdout", text=output)]
    return cell


def count(*cells):
    return tuple(in_view(nbformat.v4.new_notebook(cells=list(cells))))


def test_words_are_counted_outside_of_folds_and_equations():
    assert count(markdown("(ch-a)=", "# A title", "", "The state $h_t$, [here](b.ipynb).")) == (
        6,
        0,
        0,
    )
    assert count(markdown("$$", "a = b c d", "$$ (eq-a)", "", "Two words.")) == (2, 0, 0)
    box = ("```{admonition} Why", ":class: dropdown", "Many more words.", "```", "Two words.")
    assert count(markdown(*box)) == (2, 0, 0)
    open_box = ("```{admonition} Takeaway", ":class: takeaway", "Three words more.", "```")
    assert count(markdown(*open_box)) == (3, 0, 0)


def test_the_prose_of_a_solution_is_not_in_view_but_its_code_counts():
    begin = ("Three words here.", "```{solution-start} ex", ":class: dropdown", "```", "Not these.")
    end = ("Nor this.", "```{solution-end}", "```", "One.")
    assert count(markdown(*begin), code("x = 1\n\ny = 2", ""), markdown(*end)) == (4, 2, 0)


@pytest.mark.parametrize(
    ("tag", "expected"),
    [
        (None, (0, 2, 1)),
        ("hide-input", (0, 0, 1)),
        ("remove-input", (0, 0, 1)),
        ("hide-output", (0, 2, 0)),
        ("hide-cell", (0, 0, 0)),
        ("remove-cell", (0, 0, 0)),
    ],
)
def test_code_and_lines_that_end_in_true_are_counted_where_they_are_in_view(tag, expected):
    cell = code("a = 1\n\nprint(a)", "equal: True\nTrue or not\n", *filter(None, [tag]))
    assert count(cell) == expected
