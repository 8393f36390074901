"""The book's ready-made drawings: the block, text with values behind it, figures with a slider."""

import re

import matplotlib.pyplot as plt
import numpy as np
import pytest

import mamba_book.figures
import mamba_book.interactive
from mamba_book import block_diagram, heat_text, sliders
from mamba_book.diagram import PARTS
from mamba_book.heat import LEVELS


@pytest.fixture
def displayed(monkeypatch):
    pages = []
    for module in (mamba_book.figures, mamba_book.interactive):
        monkeypatch.setattr(module, "display", lambda bundle, raw: pages.append(bundle))
    return pages


def test_the_block_says_which_parts_are_lit(displayed):
    block_diagram(lit=("scan", "gate"), width=3.2)
    block_diagram()
    some, whole = (bundle["text/plain"] for bundle in displayed)
    assert some.endswith("Lit: the scan, the gate.") and "Lit" not in whole
    assert displayed[0]["text/html"] != displayed[1]["text/html"]
    assert plt.get_fignums() == []


def test_the_block_knows_its_parts():
    with pytest.raises(ValueError, match=r"'attention'.*selection"):
        block_diagram(lit=("attention",))
    assert plt.get_fignums() == [] and len(PARTS) == 8


def test_every_token_has_its_shade_where_it_stands():
    words = ["def", " f", "()", ":\n   ", " pass"]
    values = [0.0, 1.0, np.nan, 0.5, 2.0]
    fig = heat_text(words, values, "#a078d0", [("low", 0.0), ("high", 1.0)])
    ax = fig.axes[0]
    assert [t.get_text() for t in ax.texts] == ["def f():", "⏎", "    pass", "low", "high"]
    shades = {}  # level: (x, y) of the left upper corners of its rectangles, on the page
    for level, patch in enumerate(ax.patches):
        corners = patch.get_path().vertices.reshape(-1, 5, 2)[:, 0]
        shades[level] = {(int(x), int(y)) for x, y in corners if y >= 0 and y < 2}
    assert len(shades) == LEVELS
    assert shades[0] == {(0, 0)}  # def
    assert shades[LEVELS - 1] == {(3, 0), (3, 1)}  # f, and pass: beyond the scale, its end
    middle = shades[round(0.5 * (LEVELS - 1))]
    assert middle == {(7, 0), (8, 0), (0, 1)}  # the colon, the line break, the indentation
    plt.close(fig)


@pytest.mark.parametrize("name", sliders.__all__)
def test_a_slider_shows_another_picture_and_sentence_for_each_value(displayed, name):
    getattr(sliders, name)()
    page = displayed[-1]["text/html"]
    sentences = re.findall(r'<span class="f f\d+"[^>]*>(.*?)</span>', page)
    assert len(set(sentences)) == len(sentences) >= 6
    assert len(page) < 400_000 and plt.get_fignums() == []
