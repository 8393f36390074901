"""The house of mamba/: small files, imports that go one way, a block on one screen.

The layers are those of the table in CONTRIBUTING.md, from the highest to the lowest.
"""

import ast
import graphlib
import re

import pytest

from tests.helpers.book import ROOT

TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
FILES = {  # dotted name -> path
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for path in sorted((ROOT / "mamba").rglob("*.py"))
}
WITHOUT_FLAX = ("tools", "arrays")  # these layers know nothing of networks


def layers():
    """{layer: its files}, from the highest, as the rows ``| layer | files | what it is |`` say."""
    table = TEXT[TEXT.index("| layer |") :].split("\n\n")[0]
    found = {}
    for name, files in re.findall(r"^\| (\w+) \| (`.+?`) \|", table, flags=re.MULTILINE):
        names = re.findall(r"`([\w/]+)`", files)
        found[name] = [file for name in names for file in files_of(name)]
    return found


def files_of(name):
    """``scan`` -> mamba.scan; ``text/`` -> all files of the folder."""
    dotted = "mamba." + name.rstrip("/")
    return [f for f in FILES if f == dotted or (name.endswith("/") and f.startswith(dotted + "."))]


def imports(path):
    """The files of mamba/ that a file imports, anywhere in it: also inside functions."""
    targets = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            targets |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path.name}: a relative import"
            within = {f"{node.module}.{alias.name}" for alias in node.names}
            # from mamba import scan imports mamba.scan; from mamba import Mamba, mamba/__init__.py
            targets |= within & FILES.keys() or {node.module}
    packages = {name.removesuffix(".__init__"): name for name in FILES}
    return {packages[name] for name in targets if name in packages}


IMPORTS = {name: imports(path) for name, path in FILES.items()}


def test_every_file_stands_in_one_layer():
    listed = sorted(name for names in layers().values() for name in names)
    outside = {"mamba.__init__", "mamba.__main__"}  # the public names and the command
    assert listed == sorted(FILES.keys() - outside)


def test_imports_go_down_or_stay_in_their_layer():
    depth = {name: i for i, names in enumerate(layers().values()) for name in names}
    depth |= {"mamba.__init__": -1, "mamba.__main__": -1}
    up = [
        f"{name} imports {target}"
        for name, targets in IMPORTS.items()
        for target in targets
        if depth[target] < depth[name]
    ]
    assert up == []


def test_the_drawing_shows_real_imports_of_every_layer():
    """Each arrow stands for an import of some file of one layer by some file of another."""
    layer = {name: layer for layer, names in layers().items() for name in names}
    real = {
        (layer[name], layer[target])
        for name, targets in IMPORTS.items()
        for target in targets
        if name in layer
    }
    drawing = re.search(r"```mermaid\n(.+?)```", TEXT, flags=re.DOTALL)[1]
    drawn = set()
    for line in re.sub(r'\[".*?"\]', "", drawing).splitlines():
        ends = [end.strip() for end in line.split("-->")]
        drawn |= set(zip(ends, ends[1:], strict=False))
    assert drawn and drawn <= real
    assert {end for arrow in drawn for end in arrow} == layers().keys() - {"tools"}


def test_there_is_no_cycle():
    assert list(graphlib.TopologicalSorter(IMPORTS).static_order())


@pytest.mark.parametrize("layer", WITHOUT_FLAX)
def test_arrays_know_nothing_of_flax(layer):
    for name in layers()[layer]:
        tree = ast.parse(FILES[name].read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            modules = [node.module] if isinstance(node, ast.ImportFrom) else []
            modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not [m for m in modules if m.split(".")[0] in ("flax", "optax")], name


def test_the_imports_of_this_test_are_the_real_ones():
    assert "mamba.chunked" in IMPORTS["mamba.scan"] and "mamba.pallas" in IMPORTS["mamba.scan"]
    assert "mamba.scan" in IMPORTS["mamba.mamba1"] and not IMPORTS["mamba.discretize"]
    assert sum(map(len, IMPORTS.values())) > 40


@pytest.mark.parametrize("name", ["mamba1.MambaBlock", "mamba2.Mamba2Block", "mamba3.Mamba3Block"])
def test_a_block_is_one_screen(name):
    file, name = name.split(".")
    text = FILES[f"mamba.{file}"].read_text(encoding="utf-8")
    (block,) = [n for n in ast.parse(text).body if isinstance(n, ast.ClassDef) and n.name == name]
    (call,) = [n for n in block.body if isinstance(n, ast.FunctionDef) and n.name == "__call__"]
    source = text.splitlines()
    body = source[call.body[0].lineno - 1 : call.end_lineno]
    code = [line for line in body if line.strip() and not line.strip().startswith("#")]
    assert 10 < len(code) <= 30, len(code)


def test_files_are_small():
    lengths = {path: len(path.read_text("utf-8").splitlines()) for path in FILES.values()}
    assert {str(p.relative_to(ROOT)): n for p, n in lengths.items() if n > 300} == {}
    assert len(list((ROOT / "mamba").glob("*.py"))) <= 23
    tests = {p: len(p.read_text("utf-8").splitlines()) for p in (ROOT / "tests").rglob("*.py")}
    assert {str(p.relative_to(ROOT)): n for p, n in tests.items() if n > 500} == {}
