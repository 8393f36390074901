"""Tests of the book itself: its notebooks, its promises, its addresses.

What the cells compute is verified by ``pytest --nbval``; here, that nbval has something to compare
(a cell without a count and outputs passes whatever it prints), and what DESIGN promises a reader.
"""

import ast
import importlib.util
import json
import re
import subprocess
import tomllib
from collections import defaultdict
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import nbformat
import pytest
import yaml

import mamba_book.figures
import mamba_book.interactive
import mamba_book.source
from mamba_book import figure, frames, show_source

ROOT = Path(__file__).resolve().parents[1]
CONFIG = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))
REPOSITORY = CONFIG["repository"]["url"]
CHAPTERS = [
    entry["file"]
    for part in yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))["parts"]
    if part.get("numbered")
    for entry in part["chapters"]
]
COMPLETE = all((ROOT / f"{name}.ipynb").exists() for name in CHAPTERS)
NOTEBOOKS = sorted((ROOT / "book").glob("*.ipynb"))
SETUP = f"""\
import os, subprocess, sys
if os.environ.get("COLAB_RELEASE_TAG"):
    subprocess.check_call([sys.executable, "-m", "pip", "install", "-q", \
"jax-mamba @ git+{REPOSITORY}@{CONFIG["repository"]["branch"]}"])"""

_spec = importlib.util.spec_from_file_location("book_run", ROOT / "book" / "run.py")
run = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(run)

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
when_complete = pytest.mark.skipif(not COMPLETE, reason="not every chapter is written")


def read(path):
    return nbformat.read(path, as_version=4)


def code_cells(path):
    return [cell for cell in read(path).cells if cell.cell_type == "code"]


def texts():
    """Every text file of the repository that people wrote, with its content."""
    try:
        listed = subprocess.run(
            ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.splitlines()
        paths = [ROOT / name for name in listed]
    except (OSError, subprocess.CalledProcessError):  # an archive, not a clone
        paths = [path for path in ROOT.rglob("*") if ".venv" not in path.parts]
    for path in paths:
        if path.is_file() and "mathjax" not in path.parts and "weights" not in path.parts:
            try:
                yield path, path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                pass


# --- the notebooks --------------------------------------------------------------------------------


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


@pytest.mark.parametrize("name", CHAPTERS)
def test_a_chapter_has_all_its_parts(name):
    path = ROOT / f"{name}.ipynb"
    if not path.exists():
        pytest.skip("not written yet")
    notebook = read(path)
    prose = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    figures = [
        output
        for cell in code_cells(path)
        for output in cell.outputs
        if "<svg" in output.get("data", {}).get("text/html", "")
    ]
    assert re.match(r"\(ch-[a-z-]+\)=\n# .+\n\n\*[^*]+\?\*", prose), "label, title, question"
    assert 2 <= len(solved_exercises(prose)) <= 4
    assert len(figures) >= 2
    assert ":class: takeaway" in prose
    assert re.search(r"\$\$ \(eq-\S+\)|:label: eq-", prose), "a numbered equation"
    for heading in ("What we checked", "Exercises", "Further reading"):
        assert re.search(rf"^## {heading}$", prose, flags=re.MULTILINE), heading


def solved_exercises(prose):
    """The labels of the exercises; each is followed by its solution, folded."""
    exercises = re.findall(r"^```+\{exercise\}.*\n:label: (\S+)", prose, flags=re.MULTILINE)
    solution = r"^```+\{solution-start\} (\S+)\n:class: dropdown"
    assert exercises == re.findall(solution, prose, flags=re.MULTILINE)
    return exercises


@pytest.mark.parametrize("name", ["paper_vs_code", "verification"])
def test_a_notebook_for_reference_has_its_parts(name):
    """They are no chapters, and need no equation of their own; the rest holds for them, too."""
    path = ROOT / "book" / f"{name}.ipynb"
    prose = "\n".join(cell.source for cell in read(path).cells if cell.cell_type == "markdown")
    assert re.match(r"\(ch-[a-z-]+\)=\n# .+\n\n\*[^*]+\?\*", prose), "label, title, question"
    assert 2 <= len(solved_exercises(prose)) <= 4
    assert ":class: takeaway" in prose
    for heading in ("Exercises", "Further reading"):
        assert re.search(rf"^## {heading}$", prose, flags=re.MULTILINE), heading
    # What stands at its top was made by a cell further down.
    shown = set(re.findall(r"^```\{glue(?::md)?\} (\S+)$", prose, flags=re.MULTILINE))
    outputs = [output for cell in code_cells(path) for output in cell.outputs]
    made = [output.metadata["scrapbook"]["name"] for output in outputs if output.get("metadata")]
    assert shown and sorted(made) == sorted(shown)


def test_the_ledger_has_one_form_and_one_line_for_each_entry():
    path = ROOT / "book" / "paper_vs_code.ipynb"
    cells = [cell.source for cell in read(path).cells if cell.cell_type == "markdown"]
    entries = [re.match(r"\(ledger-([a-z-]+)\)=\n### .+\n\n", source) for source in cells]
    labels = [entry[1] for entry in entries if entry]
    for entry, source in zip(entries, cells, strict=True):
        if entry:
            parts = re.findall(r"^\*\*(\w+)\.?\*\*", source, flags=re.MULTILINE)
            assert parts == ["Paper", "Code", "Why", "Asked", "Number"], source
    (table,) = (
        output.data["text/markdown"]
        for cell in code_cells(path)
        for output in cell.outputs
        if output.get("metadata")
    )
    assert re.findall(r"\(ledger-([a-z-]+)\)", table) == labels and len(labels) >= 16


# --- the code in the book is the code in mamba/ ---------------------------------------------------


def public_names():
    """module.name of every function and class that a file of mamba/ defines for its readers."""
    for path in sorted((ROOT / "mamba").glob("*.py")):
        if path.stem in ("__init__", "__main__"):
            continue
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                yield f"mamba.{path.stem}.{node.name}"


def shown_names():
    """Where each object was shown: what show_source wrote into the outputs."""
    shown = defaultdict(set)
    for path in NOTEBOOKS:
        for cell in code_cells(path):
            for output in cell.outputs:
                text = output.get("data", {}).get("text/plain", "")
                if match := re.fullmatch(r"source of (\S+)", text):
                    shown[match[1]].add(path.stem)
    return shown


def test_no_public_name_is_shown_in_two_chapters():
    shown = shown_names()
    assert {name: where for name in public_names() if len(where := shown[name]) > 1} == {}


@when_complete
def test_every_public_name_is_shown():
    shown = shown_names()
    assert [name for name in public_names() if not shown[name]] == []


@pytest.mark.parametrize("name", ["generate", "hardware", "language_model", "scan"])
def test_the_measurements_that_a_chapter_reads_are_those_of_the_benchmark(name):
    folders = ROOT / "mamba_book" / "data", ROOT / "benchmarks" / "results"
    copy, original = (json.loads((f / f"{name}.json").read_text("utf-8")) for f in folders)
    if name == "scan":  # the copy has fewer columns
        for row, short in zip(original["results"], copy["results"], strict=True):
            assert short.items() <= row.items()
        copy["results"] = original["results"]
    assert copy == original


def test_the_runs_that_a_chapter_reads_are_those_that_were_recorded():
    runs = sorted((ROOT / "benchmarks" / "results" / "training").glob("*.json"))
    copy = json.loads((ROOT / "mamba_book" / "data" / "training.json").read_text("utf-8"))
    assert copy == {run.stem: json.loads(run.read_text("utf-8")) for run in runs}


# --- addresses ------------------------------------------------------------------------------------


def test_the_repository_has_one_address():
    owner, name = REPOSITORY.removeprefix("https://github.com/").split("/")
    assert CONFIG["html"]["baseurl"] == f"https://{owner.lower()}.github.io/{name}/"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["urls"]["Repository"] == REPOSITORY
    assert project["name"] == name
    # Everyone's address of a repository of this name, or of this owner, is this one.
    address = re.compile(rf"github\.com[/:]([\w.-]+)/({name})\b|github\.com[/:]({owner})/([\w.-]+)")
    pages = re.compile(rf"([\w-]+)\.github\.io/{name}\b")
    for path, text in texts():
        for match in address.finditer(text):
            found = "https://github.com/" + "/".join(group for group in match.groups() if group)
            assert found.removesuffix(".git") == REPOSITORY, f"{path}: {match[0]}"
        assert set(pages.findall(text)) <= {owner.lower()}, path


def test_the_readme_names_the_repository():
    readme = ROOT / "README.md"
    if not readme.exists():
        pytest.skip("not written yet")
    assert REPOSITORY in readme.read_text(encoding="utf-8")


def test_nothing_names_a_machine():
    folder = re.compile(r"(?<![\w.:/~-])/(root|home|Users|work|tmp)/\w+")
    found = [f"{p.relative_to(ROOT)}: {m[0]}" for p, text in texts() for m in folder.finditer(text)]
    assert found == []


def test_every_page_of_the_book_is_in_the_table_of_contents():
    toc = (ROOT / "_toc.yml").read_text(encoding="utf-8")
    listed = set(re.findall(r"(?:root|file): (\S+)", toc))
    pages = [p for p in (ROOT / "book").iterdir() if p.suffix in (".ipynb", ".md")]
    assert {f"book/{page.stem}" for page in pages} <= listed


# --- the tools that the notebooks use -------------------------------------------------------------


@pytest.fixture
def displayed(monkeypatch):
    bundles = []
    for module in (mamba_book.figures, mamba_book.interactive, mamba_book.source):
        monkeypatch.setattr(module, "display", lambda bundle, raw: bundles.append(bundle))
    return bundles


def plain():
    return "plain"


@jax.jit
def jitted(x):
    return x


@jax.custom_vjp
def custom(x):
    return x


class Thing:
    @classmethod
    def method(cls):
        return "method"


def test_show_source_shows_what_stands_in_the_file(displayed):
    show_source(plain, jitted, custom, Thing, Thing.method)
    names = [bundle["text/plain"].removeprefix(f"source of {__name__}.") for bundle in displayed]
    assert names == ["plain", "jitted", "custom", "Thing", "Thing.method"]
    file = Path(__file__).read_text(encoding="utf-8")
    for bundle in displayed:
        source = re.search(r"```python\n(.*)\n```$", bundle["text/markdown"], flags=re.DOTALL)[1]
        assert source in file and source.startswith(("def", "@", "class", "    @"))


def draw():
    fig, axes = plt.subplots()
    axes.plot([0, 1], [1, 0])
    axes.set_xlabel("time")
    return fig


def test_figure_takes_the_colour_of_the_page_and_is_the_same_each_time(displayed):
    figure(draw(), alt='a "line" < 1')
    figure(draw(), alt='a "line" < 1')
    svg, again = (bundle["text/html"] for bundle in displayed)
    assert svg == again
    assert "currentColor" in svg and "#010203" not in svg and "#000000" not in svg
    assert 'aria-label="a &quot;line&quot; &lt; 1"' in svg and 'role="img"' in svg
    ids = re.findall(r'\bid="([^"]+)"', svg)
    used = re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', svg)
    assert len(ids) == len(set(ids)) and {a or b for a, b in used} <= set(ids)
    assert plt.get_fignums() == []


def test_figures_on_one_page_share_no_id(displayed):
    figure(draw(), alt="falling")
    fig = draw()
    fig.axes[0].set_ylabel("state")
    figure(fig, alt="falling")
    first, second = (set(re.findall(r'\bid="([^"]+)"', b["text/html"])) for b in displayed)
    assert not first & second


def test_figure_needs_alt_text():
    with pytest.raises(ValueError, match="alt text"):
        figure(plt.figure(), alt=" ")
    plt.close("all")


def draw_frame(height, colour):
    fig, axes = plt.subplots()
    axes.bar([0, 1], [1, height], color=colour)
    axes.set(ylim=(0, 4), xlabel="token", title=f"x{height}", clip_on=True)
    return fig, f"The {colour} bar is {height} high."


CONTROLS = {"height <h>": [1, 2, 3], "colour": ["red", "blue"]}


def framed(displayed, controls=CONTROLS, **options):
    frames(draw_frame, controls, alt='bars & "heights"', **options)
    return displayed[-1]["text/html"]


def shown_in(page, *values):
    """The classes that the page's own rules show when these values are checked."""
    chosen = {
        re.search(rf'name="(\S+-{c})" id="(\S+)"[^>]*><span>{value}</span>', page)[2]
        for c, value in enumerate(values)
    }
    rule = r"^(#\S+:checked\)) \.(f\d+) \{display: inline !important\}"  # against Bootstrap's
    rules = re.findall(rule, page, flags=re.MULTILINE)
    return {name for rule, name in rules if set(re.findall(r"\(#(\S+?):checked", rule)) == chosen}


def test_frames_have_every_combination_and_each_control_picks_its_own(displayed):
    page = framed(displayed)
    pictures = set()
    for height in (1, 2, 3):
        for colour, code in (("red", "#ff0000"), ("blue", "#0000ff")):
            (name,) = shown_in(page, height, colour)
            said = re.search(rf'<span class="f {name}"[^>]*>(.*?)</span>', page)[1]
            assert said == f"The {colour} bar is {height} high."
            drawn = re.findall(rf'<g class="[^"]*\b{name}\b[^"]*".*?</g>', page)
            assert any(code in part for part in drawn)
            pictures.add("".join(drawn))
    assert len(pictures) == 6
    assert plt.get_fignums() == []


def test_frames_work_without_script_network_and_style(displayed):
    page = framed(displayed, start=(3, "red"))
    assert not re.search(r"<script|javascript:|\bon\w+=|@import|<(img|iframe|link)", page)
    addresses = set(re.findall(r"https?://[^\"]+", page))
    assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    (first,) = shown_in(page, 3, "red")
    checked = re.findall(r"checked><span>(.*?)</span>", page)
    assert checked == ["3", "red"]
    # Attributes, not the style, hide the other frames: one picture stays where styles are stripped.
    for classes, hidden in re.findall(r'<g class="f ([^"]+)"( display="none")?', page):
        assert bool(hidden) == (first not in classes.split())
    for name, hidden in re.findall(r'<span class="f (f\d+)"( hidden)?', page):
        assert bool(hidden) == (name != first)


def test_frames_are_drawn_once_where_they_agree_and_the_same_each_time(displayed):
    page, again = framed(displayed), framed(displayed)
    assert page == again
    assert "currentColor" in page and "#010203" not in page
    ids = re.findall(r'\bid="([^"]+)"', page)
    used = re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', page)
    assert len(ids) == len(set(ids)) and {a or b for a, b in used} <= set(ids)
    other = framed(displayed, {"height": [1, 2], "colour": ["red", "blue"]})
    assert not set(ids) & set(re.findall(r'\bid="([^"]+)"', other))
    fig, _ = draw_frame(1, "red")
    figure(fig, alt="one frame")
    assert len(page) < 2 * len(displayed[-1]["text/html"])  # six frames


def test_frames_can_be_used_and_read_without_seeing_them(displayed):
    page = framed(displayed)
    assert 'aria-label="bars &amp; &quot;heights&quot;"' in page and 'role="img"' in page
    assert "<legend>height &lt;h&gt;</legend>" in page and 'aria-live="polite"' in page
    names = set(re.findall(r'<input type="radio" name="(\S+)"', page))
    assert len(names) == len(CONTROLS)  # one group of buttons each: the arrow keys stay inside it


@pytest.mark.parametrize(
    "controls, options, complaint",
    [
        (CONTROLS, {"alt": " "}, "alt text"),
        (CONTROLS, {"start": (4, "red")}, "start"),
        ({"height": [1, 2], "colour": ["red"]}, {}, "colour"),
        ({"height": [1, 1], "colour": ["red", "blue"]}, {}, "height"),
    ],
)
def test_frames_say_what_is_missing(displayed, controls, options, complaint):
    with pytest.raises(ValueError, match=complaint):
        frames(draw_frame, controls, **{"alt": "bars"} | options)
    with pytest.raises(ValueError, match="sentence"):
        frames(lambda *v: (draw_frame(*v)[0], ""), CONTROLS, alt="bars")
    plt.close("all")
    assert displayed == []


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
