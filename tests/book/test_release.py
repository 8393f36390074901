"""What a release would upload: the module, the model that ships, the notebooks' helpers, no more.

Deselected by default. `make dist` builds both files and runs it.
"""

import os
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes

import pytest

from mamba import __version__
from tests.helpers.book import ROOT

pytestmark = pytest.mark.release
NAME = f"jax_mamba-{__version__}"


def tracked(*folders):
    """The files of these folders that are part of the repository."""
    listed = subprocess.run(["git", "ls-files", *folders], cwd=ROOT, capture_output=True, text=True)
    return set(listed.stdout.split())


@pytest.fixture(scope="module")
def wheel():
    return zipfile.ZipFile(ROOT / "dist" / f"{NAME}-py3-none-any.whl")


def test_the_wheel_holds_the_module_and_nothing_else(wheel):
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert names == tracked("mamba", "mamba_book")
    assert "mamba/weights/pystdlib/model.safetensors" in names and "mamba/py.typed" in names
    for name in names:
        assert wheel.read(name) == (ROOT / name).read_bytes(), name


def test_the_sdist_holds_no_more_than_it_takes_to_build():
    with tarfile.open(ROOT / "dist" / f"{NAME}.tar.gz") as archive:
        names = {m.name.removeprefix(f"{NAME}/") for m in archive.getmembers() if m.isfile()}
    others = {"PKG-INFO", "setup.cfg"} | {n for n in names if n.startswith("jax_mamba.egg-info/")}
    at_the_top = {"CHANGELOG.md", "CITATION.cff", "LICENSE", "MANIFEST.in", "README.md"}
    at_the_top |= {"pyproject.toml"}
    assert names - others == tracked("mamba", "mamba_book") | at_the_top


def test_what_pypi_shows(wheel):
    data = message_from_bytes(wheel.read(f"{NAME}.dist-info/METADATA"))
    assert (data["Name"], data["Version"]) == ("jax-mamba", __version__)
    assert data["License-Expression"] == "MIT" and data["Requires-Python"] == ">=3.11"
    assert data["Description-Content-Type"] == "text/markdown"
    assert wheel.read(f"{NAME}.dist-info/top_level.txt").split() == [b"mamba", b"mamba_book"]


def test_the_wheel_runs_outside_the_repository(tmp_path):
    """Unpacked elsewhere, it continues a text with the model that it holds."""
    place, empty = tmp_path / "place", tmp_path / "empty"
    empty.mkdir()
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    file = str(ROOT / "dist" / f"{NAME}-py3-none-any.whl")
    subprocess.run([*pip, "--target", str(place), file], check=True)
    environment = os.environ | {"PYTHONPATH": str(place), "JAX_PLATFORMS": "cpu"}

    def run(*arguments):
        command = [sys.executable, *arguments]
        done = subprocess.run(command, cwd=empty, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert run("-c", "import mamba; print(mamba.__file__)").startswith(str(place))
    assert run("-m", "mamba", "--version") == f"jax-mamba {__version__}\n"
    out = run("-m", "mamba", "--n-tokens", "8", "--temperature", "0", "def __init__(self")
    assert out.startswith("def __init__(self") and len(out) > 20
    assert list(empty.iterdir()) == []
