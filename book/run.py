"""Execute the book's notebooks and write them in one canonical form.

    python book/run.py                          # every notebook of the book
    python book/run.py book/03_*.ipynb          # these
    python book/run.py --check                  # execute nothing, verify the form

In canonical form running a notebook again changes nothing but what really changed: a fresh kernel,
no timings, no editor's metadata, cell ids that stay. A digest says which code made the outputs, so
that --check finds code that was changed since. Whether this code still prints the same is verified
by ``pytest --nbval``, not by --check. Cells tagged ``nbval-skip`` are not run.
"""

import argparse
import hashlib
import os
import re
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

BOOK = Path(__file__).resolve().parent
SKIP = "nbval-skip"  # the tag of cells that need what is not here (the network)
EXECUTED = "executed"  # the notebook's metadata: the digest of the code that made its outputs


def tags(cell):
    return cell.metadata.get("tags", [])


def clean_source(cell):
    return "\n".join(line.rstrip() for line in cell.source.strip("\n").split("\n"))


def code_digest(notebook):
    """Of the source of all code cells. A picture is not compared by nbval; its code is, by this."""
    code = [clean_source(cell) for cell in notebook.cells if cell.cell_type == "code"]
    return hashlib.sha256("\0".join(filter(None, code)).encode()).hexdigest()[:16]


def canonical(notebook):
    """The notebook's canonical text. Outputs and execution counts are kept as they are."""
    cells, seen = [], set()
    for cell in notebook.cells:
        source = clean_source(cell)
        if not source:
            continue
        identity = cell.get("id", "")
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", identity) or identity in seen:
            identity = hashlib.sha256(f"{len(seen)}{source}".encode()).hexdigest()[:8]
        seen.add(identity)
        metadata = {k: cell.metadata[k] for k in ("mystnb", "tags") if cell.metadata.get(k)}
        if cell.cell_type == "code":
            outputs = [clean_output(output) for output in cell.outputs]
            if SKIP in tags(cell):
                outputs, cell.execution_count = [], None
            new = nbformat.v4.new_code_cell(
                source, outputs=outputs, execution_count=cell.execution_count
            )
        elif cell.cell_type == "markdown":
            new = nbformat.v4.new_markdown_cell(source)
        else:
            raise ValueError(f"a {cell.cell_type} cell: the book has code and markdown cells")
        new.id, new.metadata = identity, nbformat.from_dict(metadata)
        cells.append(new)
    metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    if EXECUTED in notebook.metadata:
        metadata[EXECUTED] = notebook.metadata[EXECUTED]
    notebook = nbformat.v4.new_notebook(cells=cells, metadata=metadata)
    notebook.nbformat_minor = 5
    return nbformat.writes(notebook) + "\n"


def clean_output(output):
    output = nbformat.from_dict(output)
    if "metadata" in output:  # a name under which the page shows this output elsewhere: glue
        output.metadata = {k: output.metadata[k] for k in ("scrapbook",) if k in output.metadata}
    output.pop("transient", None)
    return output


def problems(notebook):
    """What is wrong with an executed notebook, as lines of text."""
    found, expected = [], 1
    for i, cell in enumerate(notebook.cells):
        if cell.cell_type != "code" or SKIP in tags(cell):
            continue
        where = f"cell {i} ({cell.source.strip().splitlines()[0]!r})"
        if cell.execution_count != expected:
            found.append(f"{where}: execution count {cell.execution_count}, not {expected}")
        expected += 1
        for output in cell.outputs:
            if output.output_type == "stream" and output.name == "stderr":
                found.append(f"{where}: writes to stderr: {output.text.strip()[:200]}")
            if output.output_type == "error" and "raises-exception" not in tags(cell):
                found.append(f"{where}: raises {output.ename}: {output.evalue[:200]}")
    if notebook.metadata.get(EXECUTED) != code_digest(notebook):
        found.append("its code was changed since it was executed: run python book/run.py on it")
    return found


def execute(notebook):
    NotebookClient(
        notebook,
        timeout=300,
        kernel_name="python3",
        record_timing=False,
        extra_arguments=["--log-level=ERROR"],  # not one warning per notebook about loopback
        coalesce_streams=True,
        skip_cells_with_tag=SKIP,
        resources={"metadata": {"path": str(BOOK)}},
    ).execute()
    notebook.metadata[EXECUTED] = code_digest(notebook)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebooks", nargs="*", type=Path, default=sorted(BOOK.glob("*.ipynb")))
    parser.add_argument("--check", action="store_true", help="verify the form, execute nothing")
    args = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # the outputs in the repository are a CPU's
    failed = False
    for path in args.notebooks:
        text = path.read_text(encoding="utf-8")
        notebook = nbformat.reads(text, as_version=4)
        found = []
        if args.check:
            if text != canonical(notebook):
                found.append(f"not in canonical form: run python book/run.py {path}")
        else:
            try:
                execute(notebook)
            except CellExecutionError as error:
                print(f"{path}: not written\n{error}", file=sys.stderr)
                failed = True
                continue
        found += problems(notebook)
        if not args.check:
            path.write_text(canonical(notebook), encoding="utf-8")
        for line in found:
            print(f"{path}: {line}", file=sys.stderr)
        failed |= bool(found)
        print(f"{path}: {'FAILED' if found else 'ok'}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
