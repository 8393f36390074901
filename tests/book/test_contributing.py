"""What CONTRIBUTING.md and CITATION.cff say is so."""

import re
import tomllib

import yaml

from tests.helpers.book import CHAPTERS, CONFIG, REPOSITORY, ROOT

TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_what_is_to_be_run_exists():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, flags=re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z-]+)", TEXT)) <= targets
    for path in re.findall(r"\b(?:scripts|tests|book|mamba|benchmarks)/[\w./]+", TEXT):
        name = path.rstrip("./")
        assert name in ("book/14_name.ipynb", "book/03_") or (ROOT / name).exists(), name


def test_the_hooks_before_a_commit_run_what_lint_runs():
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    lint = (ROOT / "Makefile").read_text(encoding="utf-8").split("\nlint:")[1].split("\n\n")[0]
    (repository,) = config["repos"]  # local: nothing is downloaded
    assert repository["repo"] == "local"
    entries = {hook["id"]: hook["entry"] for hook in repository["hooks"]}
    for hook in repository["hooks"]:
        assert hook["language"] == "system" and re.compile(hook.get("files", ""))
        words = hook["entry"].split()
        assert words[0].startswith(".venv/bin/")
        assert all((ROOT / word).exists() for word in words if word.endswith(".py"))
    for command in ("ruff check", "ruff format", "python book/run.py --check"):
        assert f"$(BIN)/{command}" in lint
        assert any(entry.startswith(f".venv/bin/{command}") for entry in entries.values())
    assert re.match(
        next(h["files"] for h in repository["hooks"] if h["id"] == "notebooks"),
        "book/03_selective_scan.ipynb",
    )


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert citation["version"] == project["version"]
    assert citation["license"] == project["license"]
    assert citation["repository-code"] == REPOSITORY
    assert citation["url"] == CONFIG["html"]["baseurl"]
    assert citation["title"] in (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_chapter_has_its_badge():
    raw = REPOSITORY.replace("github.com", "raw.githubusercontent.com")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in CHAPTERS:
        (row,) = [line for line in readme.splitlines() if f"]({name}.ipynb)" in line]
        assert f"{raw}/badges/{name.split('/')[-1]}.json" in row
