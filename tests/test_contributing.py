"""What CONTRIBUTING.md and CITATION.cff say is so."""

import ast
import graphlib
import re
import tomllib
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def imports():
    """{file of mamba/: the files of mamba/ that it imports, anywhere in it}, without __init__."""
    paths = [path for path in (ROOT / "mamba").glob("*.py") if path.stem != "__init__"]
    found = {}
    for path in paths:
        targets = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                targets |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                targets |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        names = {target.split(".")[1] for target in targets if target.startswith("mamba.")}
        found[path.stem] = names & {path.stem for path in paths}
    return found


def test_the_diagram_has_the_real_imports():
    drawn = {}
    for name, targets in re.findall(r"^  (\w+) --> (.+)$", TEXT, flags=re.MULTILINE):
        drawn[name] = set(targets.split(" & "))
    real = {name: targets for name, targets in imports().items() if targets}
    wrong = [name for name in real.keys() | drawn.keys() if real.get(name) != drawn.get(name)]
    lines = [f"  {name} --> {' & '.join(sorted(real.get(name, ['nothing'])))}" for name in wrong]
    assert not wrong, "CONTRIBUTING.md should say:\n" + "\n".join(lines)


def test_imports_go_one_way():
    assert list(graphlib.TopologicalSorter(imports()).static_order())


def test_what_is_to_be_run_exists():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, flags=re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z-]+)", TEXT)) <= targets
    for path in re.findall(r"\b(?:scripts|tests|book|mamba|benchmarks)/[\w./]+", TEXT):
        name = path.rstrip("./")
        assert (
            name in ("book/11_name.ipynb", "book/03_", "mamba/x.py", "tests/test_x.py")
            or (ROOT / name).exists()
        ), name


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    config = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))
    assert citation["version"] == project["version"]
    assert citation["license"] == project["license"]
    assert citation["repository-code"] == config["repository"]["url"]
    assert citation["url"] == config["html"]["baseurl"]
    assert citation["title"] in (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_chapter_has_its_badge():
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
    config = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))
    raw = config["repository"]["url"].replace("github.com", "raw.githubusercontent.com")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    chapters = [c["file"] for p in toc["parts"] if p.get("numbered") for c in p["chapters"]]
    for name in chapters:
        (row,) = [line for line in readme.splitlines() if f"]({name}.ipynb)" in line]
        assert f"{raw}/badges/{name.split('/')[-1]}.json" in row
