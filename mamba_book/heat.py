"""Text with a value behind every token, as a figure."""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import to_rgba
from matplotlib.patches import PathPatch
from matplotlib.path import Path
from matplotlib.transforms import Affine2D

__all__ = ["heat_text"]

LEVELS = 8  # shades; few, so that the frames of an interactive figure share most of their squares

ADVANCE = 1233 / 2048  # width of a character of DejaVu Sans Mono, in font sizes
NOWHERE = Affine2D().scale(0).translate(-9, -9)


def heat_text(words, values, color, ticks, fontsize=11):
    """A figure of the text, each token on a shade of ``color`` from ``ticks[0]`` to ``ticks[-1]``.

    words: the text of each token, joined the text itself. values: one number for each, nan for
    none. ticks: (label, value) pairs in rising order, evenly spaced on the scale that is meant; the
    value of a token is placed between them linearly. A line break is shown as ⏎.
    """
    labels, marks = zip(*ticks, strict=True)
    place = np.interp(values, marks, np.linspace(0, 1, len(marks)))  # nan stays nan
    levels = np.round(place * (LEVELS - 1))
    lines = "".join(words).split("\n")
    columns, rows = max(map(len, lines)) + 2, len(lines) + 1.7
    width, height = ADVANCE * fontsize / 72, 1.5 * fontsize / 72  # of a character
    fig = plt.figure(figsize=(columns * width, rows * height), layout="none")
    ax = fig.add_axes((0, 0, 1, 1))
    style = {"family": "DejaVu Sans Mono", "fontsize": fontsize, "va": "center"}
    # level: its rectangles, drawn as one path, which keeps the file small; none is ever empty
    shaded = {level: [Path.unit_rectangle().transformed(NOWHERE)] for level in range(LEVELS)}

    def shade(x, y, length, level):
        if np.isfinite(level):
            x0, x1, y0, y1 = x + 0.04, x + length - 0.04, y + 0.04, y + 0.96
            outline = Path([(x0, y0), (x1, y0), (x1, y1), (x0, y1), (x0, y0)], closed=True)
            shaded[int(level)].append(outline)

    for y, line in enumerate(lines[:-1]):
        ax.text(0, y + 0.5, line, **style)
        ax.text(len(line) + 0.5, y + 0.5, "⏎", ha="center", alpha=0.6, **style)
    ax.text(0, len(lines) - 0.5, lines[-1], **style)
    x = y = 0
    for word, level in zip(words, levels, strict=True):
        for i, piece in enumerate(word.split("\n")):
            if i:  # the line break itself, then the next line
                shade(x, y, 1, level)
                x, y = 0, y + 1
            if piece:
                shade(x, y, len(piece), level)
                x += len(piece)
    y = rows - 1.3
    for k, level in enumerate(np.round(np.linspace(0, LEVELS - 1, len(labels)))):
        shade(7 * k, y, 1.6, level)
        ax.text(7 * k + 2, y + 0.5, labels[k], **style | {"fontsize": 0.85 * fontsize})
    for level in shaded:
        fc = to_rgba(color, 0.04 + 0.76 * level / (LEVELS - 1))
        shape = Path.make_compound_path(*shaded[level])
        ax.add_patch(PathPatch(shape, fc=fc, lw=0, zorder=0))
    ax.set(xlim=(0, columns), ylim=(rows, 0))
    ax.axis("off")
    return fig
