"""The block diagram of Mamba, one drawing for all chapters, with the parts at hand lit."""

import matplotlib.pyplot as plt
from matplotlib.patches import FancyBboxPatch

from mamba_book.figures import COLORS, figure

__all__ = ["PARTS", "block_diagram"]

# name: what it is, in words for the alt text; then its boxes: x, y, width, text, colour
PARTS = {
    "norm": ("the norm", [(3, 11, 2.6, "RMSNorm", "ref")]),
    "in_proj": ("in_proj", [(5, 9.8, 6.6, "in_proj", "ref")]),
    "conv": (
        "the convolution",
        [(3, 8.3, 2.6, "conv1d, 4 taps", "x"), (3, 7.1, 2.6, "SiLU", "x")],
    ),
    "selection": (
        "the projections to Δ, B and C",
        [(6, 5.9, 2.0, "x_proj", "delta"), (5.2, 4.4, 2.8, "dt_proj, softplus", "delta")],
    ),
    "scan": ("the scan", [(4.4, 2.9, 5.4, "selective scan", "h")]),
    "gate": ("the gate", [(8.2, 8.3, 1.4, "SiLU", "z"), (4.4, 1.6, 0, "×", "z")]),
    "out_proj": ("out_proj", [(4.4, 0.3, 2.6, "out_proj", "y")]),
    "residual": ("the residual stream", [(4.4, -0.9, 0, "+", "ref")]),
}
REMEMBERS = ("conv1d, 4 taps", "selective scan")  # a thick border: they look at other tokens

# the part that an arrow leads to, its colour, the corners of its path
ARROWS = [
    ("norm", "ref", (3, 12.1), (3, 11.4)),
    ("in_proj", "ref", (3, 10.6), (3, 10.2)),
    ("residual", "ref", (3, 11.7), (0.5, 11.7), (0.5, -0.9), (4.1, -0.9)),
    ("conv", "x", (3, 9.4), (3, 8.7)),
    ("conv", "x", (3, 7.9), (3, 7.5)),
    ("scan", "x", (3, 6.7), (3, 3.3)),
    ("selection", "x", (3, 5.9), (4.9, 5.9)),
    ("selection", "delta", (5.2, 5.5), (5.2, 4.8)),
    ("selection", "delta", (5.2, 4.0), (5.2, 3.3)),
    ("selection", "delta", (6.8, 5.5), (6.8, 3.3)),
    ("gate", "y", (4.4, 2.5), (4.4, 1.95)),
    ("gate", "z", (8.2, 9.4), (8.2, 8.7)),
    ("gate", "z", (8.2, 7.9), (8.2, 1.6), (4.8, 1.6)),
    ("out_proj", "y", (4.4, 1.25), (4.4, 0.7)),
    ("residual", "y", (4.4, -0.1), (4.4, -0.55)),
    ("residual", "ref", (4.4, -1.2), (4.4, -1.9)),
]
LABELS = [  # the part that is lit with it, x, y, text, colour
    ("residual", 5.6, 11.95, "residual stream, float32", "ref"),
    ("conv", 3.4, 9.05, "$x$", "x"),
    ("gate", 8.6, 9.05, "$z$", "z"),
    ("scan", 2.6, 5, "$x$", "x"),
    ("selection", 4.75, 5.15, "dt", "delta"),
    ("selection", 5.6, 3.65, r"$\Delta$", "delta"),
    ("selection", 7.5, 3.65, "$B, C$", "delta"),
    ("scan", 4.0, 2.2, "$y$", "y"),
]


def block_diagram(lit=tuple(PARTS), width=4.9):
    """Display the Mamba block between two points of the residual stream.

    lit: names of PARTS; these are filled and in their colours, the others are outlines in grey.
    width: in inches; 3.2 is as small as the words stay legible on a phone. A thick border marks
    what looks at other tokens.
    Raises ValueError for a name that is no part.
    """
    if unknown := set(lit) - set(PARTS):
        raise ValueError(f"no such part: {sorted(unknown)}; there are {list(PARTS)}")
    some = len(lit) < len(PARTS)
    scale = width / 4.9
    fig, ax = plt.subplots(figsize=(width, 6.9 * scale))

    def colour(part, name):
        return COLORS[name if part in lit else "ref"]

    for part, name, *corners in ARROWS:
        look = {"color": colour(part, name), "lw": 1.8 * scale}
        look["alpha"] = 1 if part in lit else 0.55
        ax.plot(*zip(*corners[:-1], strict=True), **look)
        head = {"arrowstyle": "-|>", "shrinkA": 0, "shrinkB": 0, "mutation_scale": 12 * scale}
        ax.annotate("", corners[-1], corners[-2], arrowprops=head | look)
    for part, x, y, text, name in LABELS:
        color = colour(part, name)
        ax.text(x, y, text, ha="center", va="center", fontsize=12 * scale, color=color)
    for part, (_, boxes) in PARTS.items():
        for x, y, w, text, name in boxes:
            words = {"ha": "center", "va": "center", "fontsize": (12 if w else 19) * scale}
            ax.text(x, y, text, **words, weight="bold" if some and part in lit else "normal")
            if w:
                thick = 4 if text in REMEMBERS else 1.4
                place = {"xy": (x - w / 2, y - 0.3), "width": w, "height": 0.6, "fc": "none"}
                look = {"ec": colour(part, name), "lw": thick * scale}
                if some and part in lit:
                    look |= {"fc": colour(part, name) + "38"}
                ax.add_patch(FancyBboxPatch(boxstyle="round,pad=0.06", **place | look))
    ax.set(xlim=(0.2, 9), ylim=(-2, 12.3))
    ax.axis("off")
    alt = (
        "Block diagram. The residual stream passes a norm and in_proj, which makes x and z. x goes "
        "through convolution and SiLU into the scan and x_proj, which makes dt, B and C. The "
        "scan's output times SiLU of z goes through out_proj and is added back."
    )
    if some and lit:
        alt += f" Lit: {', '.join(PARTS[part][0] for part in PARTS if part in lit)}."
    figure(fig, alt=alt)
