"""The block diagram of Mamba, one drawing for all chapters, with the parts at hand lit."""

import matplotlib.pyplot as plt
from matplotlib.patches import FancyBboxPatch

from mamba_book.figures import COLORS, figure

__all__ = ["PARTS", "block_diagram"]

# name: what it is, in words for the alt text; then its boxes: x, y, width, text, short text, colour
PARTS = {
    "norm": ("the norm", [(3, 11, 2.8, "RMSNorm", "norm", "ref")]),
    "in_proj": ("in_proj", [(5.1, 9.8, 6.9, "in_proj", "in_proj", "ref")]),
    "conv": ("the convolution", [(3, 8.3, 2.8, "conv1d, 4 taps", "conv1d", "x")]),
    "silu": ("the SiLU of x", [(3, 7.1, 2.8, "SiLU", "SiLU", "x")]),
    "x_proj": ("the projection to dt, B and C", [(6, 5.9, 2.2, "x_proj", "x_proj", "delta")]),
    "dt_proj": (
        "the projection of dt and the softplus that makes Δ",
        [(5.2, 4.4, 2.8, "dt_proj, softplus", "softplus", "delta")],
    ),
    "scan": (
        "the scan",
        [(4.4, 2.9, 5.4, "selective scan", "scan", "h"), (4.4, 1.7, 0, "+", "+", "h")],
    ),
    "gate": ("the gate", [(8.2, 8.3, 1.5, "SiLU", "SiLU", "z"), (4.4, 0.5, 0, "×", "×", "z")]),
    "out_proj": ("out_proj", [(4.4, -0.8, 2.8, "out_proj", "out_proj", "y")]),
    "residual": ("the residual stream", [(4.4, -2.0, 0, "+", "+", "ref")]),
}
BOTH = {"selection": ("x_proj", "dt_proj")}  # one name for two parts
REMEMBERS = ("conv1d, 4 taps", "selective scan")  # a thick border: they look at other tokens

# the part that an arrow leads to, its colour, the corners of its path
ARROWS = [
    ("norm", "ref", (3, 12.1), (3, 11.4)),
    ("in_proj", "ref", (3, 10.6), (3, 10.2)),
    ("residual", "ref", (3, 11.7), (0.5, 11.7), (0.5, -2.0), (4.1, -2.0)),
    ("conv", "x", (3, 9.4), (3, 8.7)),
    ("silu", "x", (3, 7.9), (3, 7.5)),
    ("scan", "x", (3, 6.7), (3, 3.3)),
    ("scan", "x", (3, 4.4), (1.2, 4.4), (1.2, 3.3)),  # past the scan, times D
    ("scan", "x", (1.2, 2.6), (1.2, 1.7), (4.1, 1.7)),
    ("x_proj", "x", (3, 5.9), (4.8, 5.9)),
    ("dt_proj", "delta", (5.2, 5.5), (5.2, 4.8)),
    ("scan", "delta", (5.2, 4.0), (5.2, 3.3)),
    ("scan", "delta", (6.8, 5.5), (6.8, 3.3)),
    ("scan", "h", (2.1, 3.75), (2.1, 3.3)),  # A
    ("scan", "y", (4.4, 2.5), (4.4, 2.0)),
    ("gate", "y", (4.4, 1.4), (4.4, 0.85)),
    ("gate", "z", (8.2, 9.4), (8.2, 8.7)),
    ("gate", "z", (8.2, 7.9), (8.2, 0.5), (4.8, 0.5)),
    ("out_proj", "y", (4.4, 0.15), (4.4, -0.4)),
    ("residual", "y", (4.4, -1.2), (4.4, -1.65)),
    ("residual", "ref", (4.4, -2.3), (4.4, -3.0)),
]
LABELS = [  # the part that is lit with it, x, y, text, colour
    ("conv", 2.6, 9.05, "$x$", "x"),
    ("gate", 7.8, 9.05, "$z$", "z"),
    ("scan", 2.6, 5.4, "$x$", "x"),
    ("dt_proj", 4.75, 5.15, "dt", "delta"),
    ("scan", 4.8, 3.65, r"$\Delta$", "delta"),
    ("scan", 7.45, 3.65, "$B, C$", "delta"),
    ("scan", 2.1, 4.0, "$A$", "h"),
    ("scan", 1.2, 2.95, "$D$", "h"),
    ("gate", 4.0, 1.15, "$y$", "y"),
]
# x, y of the numbers of features; d: of the model, i: inside the block, r: of dt, n: states
WIDTHS = [
    (3.2, 10.4, "{d:,}"),
    (3.15, 9.05, "{i:,}"),
    (8.35, 9.05, "{i:,}"),
    (5.35, 5.15, "{r}"),
    (5.35, 3.65, "{i:,}"),
    (7.05, 4.3, "{n}, {n}"),
    (4.55, 2.25, "{i:,}, state {i:,} × {n}"),
    (4.55, 1.1, "{i:,}"),
    (4.55, -1.4, "{d:,}"),
]


def block_diagram(lit=tuple(PARTS), width=4.9, d_model=None):
    """Display the Mamba block between two points of the residual stream.

    lit: names of PARTS, or "selection" for the two projections; these are filled and in their
    colours, the others are outlines in grey. width: in inches; below 4 there are fewer words, large
    enough for the margin of a page. d_model: with it, the number of features stands at the arrows,
    as in the published model of this width. A thick border marks what looks at other tokens.
    Raises ValueError for a name that is no part.
    """
    parts = {part for name in lit for part in BOTH.get(name, (name,))}
    if unknown := parts - set(PARTS):
        raise ValueError(f"no such part: {sorted(unknown)}; there are {[*PARTS, *BOTH]}")
    some, small = len(parts) < len(PARTS), width < 4
    scale = width / 4.9
    size = width * (4.1 if small else 2.4)  # of the words, in points
    fig, ax = plt.subplots(figsize=(width, 1.7 * width))

    def colour(part, name):
        return COLORS[name if part in parts else "ref"]

    for part, name, *corners in ARROWS:
        look = {"color": colour(part, name), "lw": 1.8 * scale}
        look["alpha"] = 1 if part in parts else 0.55
        ax.plot(*zip(*corners[:-1], strict=True), **look)
        head = {"arrowstyle": "-|>", "shrinkA": 0, "shrinkB": 0, "mutation_scale": 12 * scale}
        ax.annotate("", corners[-1], corners[-2], arrowprops=head | look)
    middle = {"ha": "center", "va": "center"}
    for part, x, y, text, name in LABELS:
        ax.text(x, y, text, fontsize=size, color=colour(part, name), **middle)
    if not small:
        ax.text(3.3, 11.95, "residual stream, float32", fontsize=size, color=COLORS["ref"])
    for part, (_, boxes) in PARTS.items():
        for x, y, w, text, short, name in boxes:
            words = {"weight": "bold" if some and part in parts else "normal", **middle}
            ax.text(x, y, short if small else text, fontsize=size if w else 1.6 * size, **words)
            if w:
                thick = 4 if text in REMEMBERS else 1.4
                place = {"xy": (x - w / 2, y - 0.3), "width": w, "height": 0.6, "fc": "none"}
                look = {"ec": colour(part, name), "lw": thick * scale}
                if some and part in parts:
                    look |= {"fc": colour(part, name) + "38"}
                ax.add_patch(FancyBboxPatch(boxstyle="round,pad=0.06", **place | look))
    alt = (
        "Block diagram. The residual stream passes a norm and in_proj, which makes x and z. x goes "
        "through convolution and SiLU into the scan and x_proj, which makes dt, B and C; dt_proj "
        "and softplus make Δ. D times x is added to the scan's output. The sum times SiLU of z "
        "goes through out_proj and is added back."
    )
    if d_model is not None:
        widths = {"d": d_model, "i": 2 * d_model, "r": -(-d_model // 16), "n": 16}
        for x, y, text in WIDTHS:
            ax.text(x, y, text.format(**widths), fontsize=0.85 * size, va="center")
        alt += f" {d_model:,} features come in, {2 * d_model:,} are inside, {d_model:,} go out."
    ax.set(xlim=(0.2, 9.2 if d_model is None else 9.5), ylim=(-3.1, 12.4))
    ax.axis("off")
    if some and parts:
        alt += f" Lit: {', '.join(PARTS[part][0] for part in PARTS if part in parts)}."
    figure(fig, alt=alt)
