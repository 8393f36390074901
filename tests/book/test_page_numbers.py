"""Figures on pages without a chapter number are counted from 1 on each page."""

import re
import sys

import pytest
from sphinx.application import Sphinx
from sphinx.util.docutils import docutils_namespace

from tests.helpers.book import ROOT

FIGURE = (
    "```{{figure}} a.svg\n:name: fig-{0}-{1}\n\nA caption.\n```\n\nSee {{numref}}`fig-{0}-{1}`.\n"
)


@pytest.mark.parametrize("numbered", [False, True])
def test_every_page_begins_with_figure_1(tmp_path, numbered):
    (tmp_path / "a.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>", "utf-8")
    toctree = f"```{{toctree}}\n{':numbered:' * numbered}\nfirst\nsecond\n```\n"
    (tmp_path / "index.md").write_text("# Book\n\n" + toctree, "utf-8")
    for page in ("first", "second"):
        figures = "\n".join(FIGURE.format(page, i) for i in (1, 2))
        (tmp_path / f"{page}.md").write_text(f"# {page}\n\n{figures}", "utf-8")
    out = tmp_path / "out"
    config = {"extensions": ["myst_parser", "page_numbers"], "numfig": True, "html_theme": "basic"}
    config["source_suffix"] = {".md": "markdown"}  # Sphinx adds to its default, for every later app
    with pytest.MonkeyPatch.context() as patch, docutils_namespace():
        patch.setattr(sys, "path", [str(ROOT / "book" / "_ext"), *sys.path])
        Sphinx(tmp_path, None, out, tmp_path / "trees", "html", config, status=None).build()
    for chapter, page in enumerate(("first", "second"), 1):
        words = re.sub(r"<[^>]+>", "", (out / f"{page}.html").read_text("utf-8"))
        prefix = f"{chapter}." if numbered else ""
        for i in (1, 2):  # in the caption, and where the text refers to it
            assert words.count(f"Fig. {prefix}{i}") == 2
