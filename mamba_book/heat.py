"""Text with a value behind every token, as a figure."""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import to_rgba
from matplotlib.patches import PathPatch
from matplotlib.path import Path

__all__ = ["heat_text"]

LEVELS = 8  # shades; few, so that the frames of an interactive figure share most of their squares


def heat_text(words, values, color, ticks, fontsize=11):
    """A figure of the text, each token on a shade of ``color`` from ``ticks[0]`` to ``ticks[-1]``.

    words: the text of each token, joined the text itself. values: one number for each, nan for
    none. ticks: (label, value) pairs in rising order, evenly spaced on the scale that is meant; the
    value of a token is placed between them linearly. A line break is shown as ⏎.
    """
    labels, marks = zip(*ticks, strict=True)
    place = np.interp(values, marks, np.linspace(0, 1, len(marks)))  # nan stays nan
    levels = np.round(place * (LEVELS - 1))
    text = "".join(words)
    columns = max(map(len, text.split("\n"))) + 2
    rows = text.count("\n") + 3.2
    width, height = 0.61 * fontsize / 72, 1.5 * fontsize / 72  # of a character
    fig = plt.figure(figsize=(columns * width, rows * height), layout="none")
    ax = fig.add_axes((0, 0, 1, 1))
    style = {"family": "DejaVu Sans Mono", "fontsize": fontsize, "va": "center"}

    shaded = {}  # level: its rectangles, drawn as one path, which keeps the file small

    def shade(x, y, length, level):
        if np.isfinite(level):
            x0, x1, y0, y1 = x + 0.04, x + length - 0.04, y + 0.04, y + 0.96
            outline = Path([(x0, y0), (x1, y0), (x1, y1), (x0, y1), (x0, y0)], closed=True)
            shaded.setdefault(level, []).append(outline)

    x = y = 0
    for word, level in zip(words, levels, strict=True):
        for i, piece in enumerate(word.split("\n")):
            if i:  # the line break itself, then the next line
                shade(x, y, 1, level)
                ax.text(x + 0.5, y + 0.5, "⏎", ha="center", alpha=0.6, **style)
                x, y = 0, y + 1
            if piece:
                shade(x, y, len(piece), level)
                ax.text(x, y + 0.5, piece, **style)
                x += len(piece)
    y = rows - 1.3
    for k, level in enumerate(np.round(np.linspace(0, LEVELS - 1, len(labels)))):
        shade(7 * k, y, 1.6, level)
        ax.text(7 * k + 2, y + 0.5, labels[k], **style | {"fontsize": 0.85 * fontsize})
    for level in sorted(shaded):
        fc = to_rgba(color, 0.04 + 0.76 * level / (LEVELS - 1))
        shape = Path.make_compound_path(*shaded[level])
        ax.add_patch(PathPatch(shape, fc=fc, lw=0, zorder=0))
    ax.set(xlim=(0, columns), ylim=(rows, 0))
    ax.axis("off")
    return fig
