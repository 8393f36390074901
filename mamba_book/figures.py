"""Figures that are crisp, small, and legible on a light and on a dark page.

Matplotlib draws text and axes in one sentinel colour; ``figure`` replaces it by ``currentColor`` in
the SVG and puts the SVG into the page itself, where it takes the colour of the text around it.
Importing this module sets the book's style for every figure drawn afterwards.
"""

import hashlib
import html
import io
import re

import matplotlib as mpl
import matplotlib.pyplot as plt
from IPython.display import display

# One colour per quantity, the same in every chapter: legible on a white and on a near-black page,
# and different in lightness as well as in hue, for colour-blind readers.
COLORS = {
    "x": "#3b8bd0",  # input
    "h": "#e07b39",  # state
    "y": "#2a9d74",  # output
    "delta": "#a078d0",  # Δ
    "z": "#c2a11a",  # gate
    "wrong": "#d1495b",  # an error, a divergence
    "ref": "#8a8f98",  # a reference to compare with
    "ink": "#010203",  # none of these: the colour of the page's text, once the SVG is written
}
# One colour per way to compute the scan.
METHODS = {
    "sequential": COLORS["h"],  # one step after the other, in the module's chunks
    "lax.scan": COLORS["x"],  # the plain chain, as one writes it first
    "associative": COLORS["y"],  # the tree
    "chunked": COLORS["delta"],  # trees in a chain
    "doubling": COLORS["z"],  # Hillis and Steele's
    "transformers": COLORS["ref"],  # a loop in PyTorch: what others do
}

_INK = COLORS["ink"]  # a sentinel until then

STYLE = {
    "axes.axisbelow": True,
    "axes.edgecolor": _INK,
    "axes.facecolor": "none",
    "axes.labelcolor": _INK,
    "axes.prop_cycle": mpl.cycler(color=list(COLORS.values())),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": _INK,
    "axes.titlesize": 11,
    "figure.constrained_layout.use": True,
    "figure.facecolor": "none",
    "figure.figsize": (5.2, 2.9),  # inches: on a phone the words are still 11 px tall
    "font.size": 11,
    "grid.alpha": 0.35,
    "grid.color": COLORS["ref"],
    "hatch.color": _INK,
    "image.cmap": "viridis",
    "image.interpolation": "nearest",
    "legend.frameon": False,
    "lines.linewidth": 2,
    "patch.edgecolor": _INK,
    "savefig.facecolor": "none",
    "svg.hashsalt": "book",  # with no date in the metadata: the same figure, the same bytes
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
}
mpl.rcParams.update(STYLE)


def figure(fig, alt, glue=None):
    """Display a Matplotlib figure as inline SVG, described by ``alt``, and close it.

    glue: a name under which the page may show the figure in another place, too.

    The SVG is as wide as its column, up to its natural size. Its ids are made from its content: the
    same on every run, and different from those of every other figure on the page.

    Raises ValueError when ``alt`` is empty: whoever cannot see the figure has only that.
    """
    bundle = {"text/html": inline_svg(fig, alt), "text/plain": f"figure: {alt}"}
    if glue:
        display(bundle, raw=True, metadata={"scrapbook": {"name": glue}})
    else:
        display(bundle, raw=True)


def inline_svg(fig, alt):
    """The figure as SVG for a page, described by ``alt``, with its own ids; closes the figure."""
    if not alt.strip():
        raise ValueError("a figure needs alt text: say what is to be seen in it")
    svg = draw_svg(fig)
    prefix = "f" + hashlib.sha256(svg.encode()).hexdigest()[:8] + "-"
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}", svg)
    return describe_svg(svg, alt)


def draw_svg(fig):
    """The figure as SVG that takes the colour of the page's text; closes the figure."""
    buffer = io.StringIO()
    fig.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    plt.close(fig)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]  # without the XML prolog
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    return svg.replace(_INK, "currentColor").replace("#000000", "currentColor").rstrip()


def describe_svg(svg, alt):
    """The SVG as an image that ``alt`` describes, as wide as its column up to its natural size."""
    width = float(re.search(r'width="([\d.]+)pt"', svg)[1]) * 4 / 3  # pt -> CSS px
    attributes = (
        f'class="book-figure" role="img" aria-label="{html.escape(alt)}" '
        f'fill="currentColor" style="width: 100%; max-width: {width:.0f}px; height: auto"'
    )
    svg = re.sub(r' (?:width|height)="[\d.]+pt"', "", svg, count=2)
    return svg.replace("<svg ", f"<svg {attributes} ", 1)
