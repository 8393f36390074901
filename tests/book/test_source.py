"""The code in the book is the code of mamba/: shown once, public, never changed from outside."""

import ast
import re

import pytest

from tests.helpers.book import NOTEBOOKS, ROOT, code_cells, load_script

api = load_script("scripts/make_api.py")

# Attributes with an underscore that are public all the same: a NamedTuple's.
NAMED_TUPLE = {"_replace", "_asdict", "_fields"}
PACKAGES = ("mamba", "mamba_book")
PYTHON = sorted(
    path
    for folder in (*PACKAGES, "scripts", "benchmarks")
    for path in (ROOT / folder).rglob("*.py")
)


def private(name):
    return name.startswith("_") and not name.endswith("__") and name not in NAMED_TUPLE


def public_names():
    return [f"{module}.{node.name}" for module, node in api.public_names()]


def test_public_names_are_found_in_every_folder():
    found = set(public_names())
    assert {"mamba.scan.selective_scan", "mamba.checkpoint.load.read_params"} <= found
    assert not [name for name in found if "__" in name or "._" in name]


def test_no_public_name_is_shown_in_two_chapters():
    shown = api.shown_names()
    assert {name: shown[name] for name in public_names() if len(shown[name]) > 1} == {}


def test_every_public_name_is_shown():
    shown = api.shown_names()
    assert [name for name in public_names() if not shown[name]] == []


def test_only_what_exists_is_shown_and_nothing_private():
    existing = {name.rsplit(".", 1)[0] for name in public_names()}
    for name in api.shown_names():
        assert not [part for part in name.split(".") if private(part)], name
        if name.startswith("mamba.") and ".__" not in name:
            assert any(name.startswith(f"{module}.") for module in existing), name


def test_the_list_of_names_is_up_to_date():
    text = (ROOT / "book" / "api.md").read_text(encoding="utf-8")
    assert text == api.api(), "book/api.md is not what the source says: make api"


def test_every_public_name_says_what_it_does():
    assert [f"{m}.{n.name}" for m, n in api.public_names() if not api.first_sentence(n)] == []


@pytest.mark.parametrize(
    ("docstring", "shown"),
    [
        ("One sentence. Another.", "One sentence."),
        ("Over two\n    lines: y = h C.\n\n    More.", "Over two lines: y = h C."),
        ("The equation:\n\n    y = x", "The equation"),
        ("``a_b`` of x_t * 2, h[0]", r"`a_b` of x\_t \* 2, h\[0]"),
    ],
)
def test_the_first_sentence_of_a_docstring(docstring, shown):
    tree = ast.parse(f'def f():\n    """{docstring}"""')
    assert api.first_sentence(tree.body[0]) == shown


# --- nothing private is used from outside ---------------------------------------------------------


def names_of_packages(tree):
    """What a program calls the modules and objects that it imports from mamba and mamba_book."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            source = getattr(node, "module", None)
            for alias in node.names:
                if (source or alias.name).split(".")[0] in PACKAGES:
                    names.add(alias.asname or (alias.name if source else alias.name.split(".")[0]))
    return names


def root(node):
    """The first name of ``a.b[c].d``, and the attributes behind it."""
    attributes = []
    while isinstance(node, ast.Attribute | ast.Subscript):
        if isinstance(node, ast.Attribute):
            attributes.append(node.attr)
        node = node.value
    return (node.id if isinstance(node, ast.Name) else None), attributes


def private_uses(tree):
    """The private names of mamba and mamba_book that a program imports or reaches."""
    ours, found = names_of_packages(tree), []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in PACKAGES:
            found += [f"{node.module}.{a.name}" for a in node.names if private(a.name)]
        elif isinstance(node, ast.Attribute) and private(node.attr) and root(node)[0] in ours:
            found.append(ast.unparse(node))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):  # patch("mamba.x._y")
            found += re.findall(r"\bmamba(?:_book)?(?:\.\w+)*\._[a-z]\w*", node.value)
    return found


def assigned_attributes(tree):
    """``module.name = ...``, ``module.name[key] = ...`` and ``del``, for what comes from mamba."""
    ours, found = names_of_packages(tree), []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute | ast.Subscript) and isinstance(
            node.ctx, ast.Store | ast.Del
        ):
            name, attributes = root(node)
            if name in ours and attributes:
                found.append(ast.unparse(node))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("setattr", "delattr"):
            found += [ast.unparse(node)] * (root(node.args[0])[0] in ours)
    return found


def test_what_counts_as_private_and_as_assigned():
    private_program = """
import mamba.pallas
from mamba import scan
from mamba.chunked import _pad
from mamba_book import depth
depth._chains, mamba.pallas._call, scan.tree._fun, state._replace, patch("mamba.scan._choose")
"""
    assert sorted(private_uses(ast.parse(private_program))) == [
        "depth._chains",
        "mamba.chunked._pad",
        "mamba.pallas._call",
        "mamba.scan._choose",
        "scan.tree._fun",
    ]
    changing_program = """
from mamba import scan
scan.CHUNKS["chunked"] = 4
scan.CHUNKS = {}
del scan.CHUNKS
setattr(scan, "CHUNKS", {})
scan = other.CHUNKS = x[0] = 1
"""
    assert len(assigned_attributes(ast.parse(changing_program))) == 4


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_no_chapter_uses_what_is_private_or_changes_the_module(path):
    tree = ast.parse("\n".join(cell.source for cell in code_cells(path)))
    assert private_uses(tree) == []
    assert assigned_attributes(tree) == []
    attributes = (node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute))
    assert [name for name in attributes if private(name)] == []  # nor anybody else's


def test_no_file_uses_what_is_private_in_another():
    found = {}
    for path in PYTHON:
        if uses := private_uses(ast.parse(path.read_text(encoding="utf-8"))):
            found[str(path.relative_to(ROOT))] = uses
    assert found == {}
