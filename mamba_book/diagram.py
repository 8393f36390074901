"""The block of Mamba, one drawing for all chapters, and the blocks of three generations."""

import matplotlib.pyplot as plt
from IPython.display import display
from matplotlib.patches import FancyBboxPatch

from mamba_book.figures import COLORS, figure, inline_svg

__all__ = ["GENERATIONS", "PARTS", "block_diagram", "three_blocks"]

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


# --- three generations ----------------------------------------------------------------------------

# What all three blocks have. Boxes: x, y, width, text, colour, and "kept", "new" or "gone", seen
# from the generation before. Arrows: colour, corners. Labels: x, y, text, colour.
COMMON = {
    "boxes": [(5, 9.5, 9.4, "in_proj", "ref", "kept"), (5, -0.75, 4, "out_proj", "y", "kept")],
    "arrows": [
        ("ref", (5, 10.7), (5, 9.95)),
        ("z", (9.3, 9.05), (9.3, 1.1), (8.15, 1.1)),
        ("y", (4.4, 2.5), (4.4, 1.55)),
        ("y", (5.2, 0.65), (5.2, -0.3)),
        ("ref", (5.2, -1.2), (5.2, -1.9)),
    ],
    "labels": [(8.85, 8.5, "$z$", "z"), (3.9, 2.1, "$y$", "y")],
}
GENERATIONS = {
    "Mamba": {
        "alt": "Mamba: in_proj makes x and z. x passes the convolution and SiLU; x_proj and "
        "dt_proj make Δ, B and C of it. The scan has the parameter A. Gate, out_proj.",
        "boxes": [
            (3.1, 7.4, 4.2, "conv1d, SiLU", "x", "kept"),
            (5.8, 5.2, 4.8, "x_proj, dt_proj", "delta", "kept"),
            (0.9, 4.9, 0.9, "$A$", "h", "kept"),
            (4, 2.95, 7.4, "selective scan", "h", "kept"),
            (5.6, 1.1, 4.8, "× SiLU(z)", "z", "kept"),
        ],
        "arrows": [
            ("x", (2.4, 9.05), (2.4, 7.85)),
            ("x", (2.4, 6.95), (2.4, 3.4)),
            ("x", (4.4, 6.95), (4.4, 5.65)),
            ("delta", (5.8, 4.75), (5.8, 3.4)),
            ("h", (0.9, 4.45), (0.9, 3.4)),
        ],
        "labels": [
            (1.95, 8.5, "$x$", "x"),
            (1.95, 6.3, "$x$", "x"),
            (7.1, 4.05, r"$\Delta, B, C$", "delta"),
        ],
    },
    "Mamba-2": {
        "alt": "Mamba-2: in_proj makes all of z, x, B, C and dt. The convolution runs over x, B "
        "and C. A softplus makes Δ. New: a norm after the gate. Gone: x_proj and dt_proj.",
        "boxes": [
            (3.1, 7.4, 4.2, "conv1d, SiLU", "x", "kept"),
            (7.15, 7.4, 2.9, "softplus", "delta", "kept"),
            (4.75, 5.2, 4.0, "x_proj, dt_proj", "ref", "gone"),
            (0.9, 4.9, 0.9, "$A$", "h", "kept"),
            (4, 2.95, 7.4, "ssd", "h", "new"),
            (5.6, 1.1, 4.8, "× SiLU(z), norm", "z", "new"),
        ],
        "arrows": [
            ("x", (2.4, 9.05), (2.4, 7.85)),
            ("x", (2.4, 6.95), (2.4, 3.4)),
            ("delta", (7.15, 9.05), (7.15, 7.85)),
            ("delta", (7.15, 6.95), (7.15, 3.4)),
            ("h", (0.9, 4.45), (0.9, 3.4)),
        ],
        "labels": [
            (3.85, 8.5, "$x, B, C$", "x"),
            (3.85, 6.4, "$x, B, C$", "x"),
            (6.5, 8.5, "dt", "delta"),
            (6.7, 4.05, r"$\Delta$", "delta"),
        ],
    },
    "Mamba-3": {
        "alt": "Mamba-3: in_proj also makes A, λ and angles for each token. New: a norm and a bias "
        "for B and C, which then turn by the sum of the angles, θ; a scan by a two-point rule. "
        "Gone: the convolution, the parameter A and the norm after the gate.",
        "boxes": [
            (0.95, 6.9, 2.0, "conv1d", "ref", "gone"),
            (4.1, 6.9, 2.6, "norm,\n+ bias", "x", "new"),
            (7.3, 6.9, 3.0, "softplus,\n−f, σ, tanh", "delta", "new"),
            (4.1, 4.75, 2.6, "turn by θ", "x", "new"),
            (0.9, 4.75, 0.9, "$A$", "ref", "gone"),
            (4, 2.95, 7.4, "trapezoidal scan", "h", "new"),
            (5.6, 1.1, 4.8, "× SiLU(z)", "z", "kept"),
            (1.8, 1.1, 1.6, "norm", "ref", "gone"),
        ],
        "arrows": [
            ("x", (2.3, 9.05), (2.3, 3.4)),
            ("x", (4.1, 9.05), (4.1, 7.8)),
            ("x", (4.1, 6.0), (4.1, 5.2)),
            ("x", (4.1, 4.3), (4.1, 3.4)),
            ("delta", (7.3, 9.05), (7.3, 7.8)),
            ("delta", (6.4, 6.0), (6.4, 4.75), (5.5, 4.75)),
            ("delta", (7.6, 6.0), (7.6, 3.4)),
        ],
        "labels": [
            (1.85, 8.5, "$x$", "x"),
            (5.05, 8.5, "$B, C$", "x"),
            (6.0, 5.4, r"$\varphi$", "delta"),
            (6.35, 3.95, r"$\Delta, A, \lambda$", "delta"),
        ],
    },
}


def three_blocks():
    """Display the blocks of Mamba, Mamba-2 and Mamba-3 beside each other, on a phone in a column.

    A box is filled if it is new, seen from the block before, and a dashed grey outline if the block
    before had it.
    """
    pictures, words = [], []
    middle = {"fontsize": 9, "ha": "center", "va": "center"}
    for name, parts in GENERATIONS.items():
        fig, ax = plt.subplots(figsize=(2.5, 3.3))
        ax.set(xlim=(-0.1, 10.1), ylim=(-2.0, 10.8))
        ax.set_title(name, fontsize=10)
        ax.axis("off")
        boxes, arrows, labels = (COMMON[k] + parts[k] for k in ("boxes", "arrows", "labels"))
        for color, *corners in arrows:
            look = {"color": COLORS[color], "lw": 1.4}
            ax.plot(*zip(*corners[:-1], strict=True), **look)
            head = {"arrowstyle": "-|>", "shrinkA": 0, "shrinkB": 0, "mutation_scale": 9}
            ax.annotate("", corners[-1], corners[-2], arrowprops=head | look)
        for x, y, text, color in labels:
            ax.text(x, y, text, **middle, color=COLORS[color])
        for x, y, width, text, color, change in boxes:
            look = {"ec": COLORS[color], "lw": 1.4, "fc": "none"}
            if change == "new":
                look |= {"fc": COLORS[color] + "38"}
            if change == "gone":
                look |= {"ls": (0, (3, 2)), "lw": 1}
            height = 0.8 if "\n" not in text else 1.7
            place = {"xy": (x - width / 2, y - height / 2), "width": width, "height": height}
            ax.add_patch(FancyBboxPatch(boxstyle="round,pad=0.05", **place | look))
            ink = {"color": COLORS["ref"]} if change == "gone" else {}
            ax.text(x, y, text, **middle, **ink)
        pictures.append(inline_svg(fig, parts["alt"]))
        words.append(parts["alt"])
    beside = "".join(f'<div style="flex: 1 1 13rem; max-width: 20rem">{p}</div>' for p in pictures)
    style = "display: flex; flex-wrap: wrap; justify-content: center; gap: 0.5rem 0"
    page = f'<div class="book-blocks" style="{style}">{beside}</div>'
    display({"text/html": page, "text/plain": f"figure: {' '.join(words)}"}, raw=True)
