"""The repository has one address, names no machine, and lists every page of the book."""

import re
import subprocess
import tomllib

from tests.helpers.book import CONFIG, REPOSITORY, ROOT


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
    assert REPOSITORY in (ROOT / "README.md").read_text(encoding="utf-8")


def test_nothing_names_a_machine():
    folder = re.compile(r"(?<![\w.:/~-])/(root|home|Users|work|tmp)/\w+")
    ours = ((p, text) for p, text in texts() if p.name != "passages.json")  # Python's own code
    found = [f"{p.relative_to(ROOT)}: {m[0]}" for p, text in ours for m in folder.finditer(text)]
    assert found == []


def test_every_page_of_the_book_is_in_the_table_of_contents():
    toc = (ROOT / "_toc.yml").read_text(encoding="utf-8")
    listed = set(re.findall(r"(?:root|file): (\S+)", toc))
    pages = [p for p in (ROOT / "book").iterdir() if p.suffix in (".ipynb", ".md")]
    assert {f"book/{page.stem}" for page in pages} <= listed
