"""Run the notebooks as Colab does: of this repository they have what their first cell installs.

    python scripts/rehearse_colab.py [NAME ...]     # 03_selective_scan; all without a name

Each notebook is copied into an empty folder and run there, in a fresh virtual environment with the
packages that Colab brings and the book needs. The first cell sees Colab's variable and installs the
package from the repository's address, for which git is given this clone: what is committed on the
branch main is rehearsed. Colab's JAX must survive the installation, to the version.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
# Older on purpose, where Colab is behind: its IPython is of 2022, and its JAX is not the newest.
COLAB = ["jax==0.7.2", "flax==0.11.2", "ipython==7.34.0", "ipykernel", "matplotlib", "nbclient"]
COLAB += ["nbformat", "optax", "scipy", "tqdm", "transformers"]
RUN = """
import sys, nbformat
from nbclient import NotebookClient
notebook = nbformat.read(sys.argv[1], as_version=4)
for cell in notebook.cells:
    cell.pop("outputs", None)
    if cell.cell_type == "code":
        cell.outputs = []
NotebookClient(notebook, timeout=600, skip_cells_with_tag="nbval-skip").execute()
"""
JAX = "import importlib.metadata as m; print(m.version('jax'), m.version('jaxlib'))"


def main(names):
    config = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))
    paths = [ROOT / "book" / f"{name.removesuffix('.ipynb')}.ipynb" for name in names]
    paths = paths or sorted((ROOT / "book").glob("*.ipynb"))
    if missing := [path.name for path in paths if not path.exists()]:
        sys.exit(f"there is no notebook {', '.join(missing)} in {ROOT / 'book'}")
    env = os.environ | {
        "COLAB_RELEASE_TAG": "rehearsal",
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": f"url.{ROOT.as_uri()}.insteadOf",
        "GIT_CONFIG_VALUE_0": config["repository"]["url"],
    }
    env.pop("PYTHONPATH", None)
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        venv = Path(folder) / "venv"
        subprocess.run([sys.executable, "-m", "venv", venv], check=True)
        python = venv / "bin" / "python"
        quiet = ["--quiet", "--disable-pip-version-check"]
        subprocess.run([python, "-m", "pip", "install", *quiet, *COLAB], check=True)
        before = subprocess.check_output([python, "-c", JAX], text=True)
        env["PATH"] = f"{venv / 'bin'}{os.pathsep}{env['PATH']}"
        for path in paths:
            subprocess.run(
                [python, "-m", "pip", "uninstall", "--yes", *quiet, "jax-mamba"],
                check=True,
                stderr=subprocess.DEVNULL,
            )
            place = Path(folder) / path.stem
            place.mkdir()
            shutil.copy(path, place)
            start = time.monotonic()
            run = subprocess.run([python, "-c", RUN, path.name], cwd=place, env=env)
            after = subprocess.check_output([python, "-c", JAX], text=True)
            verdict = "ran" if run.returncode == 0 else "FAILED"
            if after != before:
                verdict = f"FAILED: jax and jaxlib were {before.strip()}, are {after.strip()}"
            failed += [path.stem] * verdict.startswith("FAILED")
            print(f"{path.stem}: {verdict} ({time.monotonic() - start:.0f} s)", flush=True)
    print(f"jax and jaxlib {before.strip()}: {len(paths) - len(failed)} of {len(paths)} ran")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
