"""Draw the cover, what previews of links show, and the six chapters, each by its own code.

    python scripts/draw_cover.py        # writes cover.svg, social.png, chapters.svg in book/_static

The cover: a line of Python, read by one state of the checkpoint that ships with the module, and the
tree in which its scan composes the steps. What is lit is what the state still holds at the end.
Everything is computed with the module. The ink is a grey that is legible on a light and on a dark
page: an image cannot take the page's colour.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from mamba import EMBEDDED, Mamba, generate
from mamba.checkpoint.hub import load_tokenizer
from mamba.discretize import zoh
from mamba.lti import exact_solution, recurrence
from mamba_book import COLORS

STATIC = Path(__file__).resolve().parents[1] / "book" / "_static"
INK = "#7d8590"
LINE = "def mean(values):\n    return sum(values) / len("
STATE = 4, 174, 9  # layer, channel, component: one of many, and one that holds on to a call
PROMPT = "def mean(values):\n    return sum("
A = jnp.array([[0.0, 1.0], [-4.0, -0.6]])  # a mass on a spring, with friction
B, C = jnp.array([0.0, 4.0]), jnp.array([1.0, 0.0])


def continuous(ax):
    t = jnp.linspace(0, 10, 300)
    push = jnp.array([1.0, 1, 1, 1, 0, 0, 0, 0, 0, 0])  # one value a second
    y = exact_solution(A, B, push, 1.0, t) @ C
    ax.fill_between(t, jnp.repeat(push, 30), color=COLORS["x"], alpha=0.25, lw=0)
    ax.plot(t, y, color=COLORS["h"])
    ax.text(2.0, 0.25, "input", color=COLORS["x"], ha="center")
    ax.text(7.4, 0.62, "state", color=COLORS["h"], ha="center")


def discretized(ax):
    t, step = jnp.linspace(0, 6, 300), 0.5
    push = jnp.where(jnp.arange(12) < 8, 1.0, 0.0)
    ax.plot(t, exact_solution(A, B, push, step, t) @ C, color=COLORS["ref"], lw=1.5)
    y, _ = recurrence(*zoh(A, B, step), C, 0.0, push)
    times = step * jnp.arange(1, 13)
    ax.vlines(times, 0, y, color=COLORS["h"], lw=1, alpha=0.6)
    ax.plot(times, y, "o", color=COLORS["h"], ms=6)


def selective(ax, model, params, tokenizer):
    """Mean Δ over the channels of a layer, per token: how much of each token the layer takes in."""
    ids = tokenizer.encode(PROMPT).ids
    delta = mean_delta(model, params, jnp.array([ids]))  # (n_layer, l)
    delta = delta / delta.max(axis=1, keepdims=True)
    ax.imshow(delta, aspect="auto", cmap="Purples", vmin=0, vmax=1.1)
    words = [tokenizer.decode([i]).replace("\n", "⏎").strip(" ") or "␣" for i in ids]
    ax.set_xticks(range(len(words)), words, rotation=60, fontsize=8, family="monospace")
    ax.set_ylabel("layer", fontsize=9)
    ax.tick_params(length=0)


def shares(model, params, tokenizer):
    """The words of LINE, and which share of STATE's memory each of them is at the end.

    Under zero-order hold, with B = 1, a state is a weighted mean of its inputs, and of the 0 from
    which it starts: token s weighs 1 - exp(Δ_s A), times exp(Δ A) of every later one.
    """
    layer, channel, n = STATE
    ids = tokenizer.encode(LINE).ids
    raw = dt_proj_outputs(model, params, jnp.array([ids]))[layer][:, channel]
    rate = jnp.exp(params[f"layers_{layer}"]["mixer"]["A_log"][channel, n])
    decay = jnp.exp(-rate * jax.nn.softplus(raw))
    kept = jnp.append(jnp.cumprod(decay[:0:-1])[::-1], 1.0)
    words = [tokenizer.decode([i]).replace("\n", "⏎").replace(" ", "") for i in ids]
    return words, np.asarray((1 - decay) * kept)


def mix(share, ink):
    """From the ink, for what is forgotten, to the colour of the state."""
    weight = min(1.0, share**0.5 * 1.4)
    low, high = np.array(to_rgb(ink)), np.array(to_rgb(COLORS["h"]))
    return tuple((1 - weight) * low + weight * high)


def hero(ax, words, share, ink=INK, size=11.0):
    """The tokens in a row, the tree above them, and what came through lit."""
    level, nodes = 0, [(float(x), 0.0, float(s)) for x, s in enumerate(share)]
    for (x, y, s), word in zip(nodes, words, strict=True):
        style = {"color": mix(s, ink), "weight": "bold" if s > 0.1 else "normal"}
        ax.text(x + 0.15, y - 0.35, word, rotation=50, ha="right", va="top", rotation_mode="anchor",
                family="monospace", fontsize=size, **style)  # fmt: skip
    while nodes:
        for x, y, s in nodes:
            ax.plot(x, y, "o", ms=size * (0.45 + 1.3 * s**0.5), color=mix(s, ink), zorder=2 + s)
        if len(nodes) == 1:
            break
        level += 1
        parents = []
        for pair in (nodes[k : k + 2] for k in range(0, len(nodes), 2)):
            here = sum(x for x, _, _ in pair) / len(pair), 1.15 * level, sum(s for *_, s in pair)
            for x, y, s in pair:
                ax.plot([x, here[0]], [y, here[1]], color=mix(s, ink), lw=1 + 5 * s, zorder=1 + s,
                        solid_capstyle="round")  # fmt: skip
            parents.append(here)
        nodes = parents
    ax.set(xlim=(-1, len(words) - 0.2), ylim=(-2.6, 1.15 * level + 0.5))
    ax.axis("off")


def social(words, share):
    """1200 x 630, dark: what is seen where a link to the book is passed on."""
    fig = plt.figure(figsize=(12, 6.3), dpi=100, layout="none")
    hero(fig.add_axes((0.42, 0.04, 0.56, 0.92)), words, share, ink="#6d7681", size=14)
    fig.text(
        0.05, 0.66, "The Annotated\nMamba, in JAX", color="#f2f4f7", fontsize=42, weight="bold"
    )
    fig.text(0.05, 0.44, "From a mass on a spring\nto a pretrained language model,\n"
             "every step checked.", color="#b9c1cb", fontsize=20, linespacing=1.4)  # fmt: skip
    fig.text(0.05, 0.09, "Lit: what one state still holds\nafter reading this line of Python.",
             color=COLORS["h"], fontsize=15, linespacing=1.4)  # fmt: skip
    fig.savefig(STATIC / "social.png", facecolor="#12161c", metadata={"Software": None})


def dt_proj_outputs(model, params, tokens):
    """What `dt_proj` gave in every layer, before softplus: a list of (l, d)."""
    _, seen = model.apply(
        {"params": params},
        tokens,
        capture_intermediates=lambda module, _: module.name == "dt_proj",
    )
    layers = seen["intermediates"]
    names = [f"layers_{i}" for i in range(model.config.n_layer)]
    return [layers[name]["mixer"]["dt_proj"]["__call__"][0][0] for name in names]


def mean_delta(model, params, tokens):
    """Δ in every layer, mean over channels: (n_layer, l)."""
    outputs = dt_proj_outputs(model, params, tokens)
    return np.stack([jax.nn.softplus(raw).mean(axis=-1) for raw in outputs])


def tree(ax):
    """The up-sweep of a scan over eight steps."""
    position = {(0, i): (i, 0.0) for i in range(8)}
    for level in range(1, 4):
        for i in range(8 >> level):
            left, right = position[level - 1, 2 * i], position[level - 1, 2 * i + 1]
            here = position[level, i] = (right[0], 1.0 * level)
            for child in (left, right):
                ax.plot(*zip(child, here, strict=True), color=COLORS["ref"], lw=1.3, zorder=1)
    for (level, _), (x, y) in position.items():
        color = COLORS["x"] if level == 0 else COLORS["h"]
        ax.plot(x, y, "o", ms=10, color=color)
    ax.text(-0.2, 2.7, "8 steps\nin 3 levels")
    ax.set_ylim(-0.4, 3.4)


def block(ax):
    def box(x, y, text, color, w=1.5):
        ax.add_patch(
            FancyBboxPatch(
                (x - w / 2, y - 0.3), w, 0.6, boxstyle="round,pad=0.06", fc="none", ec=color, lw=1.6
            )
        )
        ax.text(x, y, text, ha="center", va="center", fontsize=9.5)

    def arrow(*points):
        for start, end in zip(points, points[1:], strict=False):
            style = "-|>" if end == points[-1] else "-"
            ax.add_patch(
                FancyArrowPatch(
                    start, end, arrowstyle=style, mutation_scale=9, color=INK, shrinkA=0
                )
            )

    box(0, 0, "project", INK)
    box(-1.1, 1.3, "conv", COLORS["x"])
    box(-1.1, 2.6, "selective scan", COLORS["h"], 2.0)
    box(1.3, 1.95, "gate", COLORS["z"], 1.1)
    box(0, 3.9, "project", INK)
    arrow((-0.4, 0.36), (-1.1, 0.94))
    arrow((0.4, 0.36), (1.3, 1.59))
    arrow((-1.1, 1.66), (-1.1, 2.24))
    arrow((-1.1, 2.96), (-0.3, 3.54))
    arrow((1.3, 2.31), (0.3, 3.54))
    ax.set_xlim(-2.4, 2.4)
    ax.set_ylim(-0.5, 4.4)


def pretrained(ax, model, params, tokenizer):
    text = generate(
        model,
        key=jax.random.PRNGKey(0),
        params=params,
        tokenizer=tokenizer,
        prompt="def __init__(self",
        n_tokens_to_gen=40,
        temperature=0,
    )
    lines = [line[:34] for line in text.splitlines() if line.strip()][:6]
    ax.text(0, 1, "\n".join(lines), va="top", fontsize=8.5, family="monospace", linespacing=1.5)
    ax.set_xlim(0, 1)
    ax.set_ylim(0, 1)


def main():
    model, params = Mamba.from_pretrained(EMBEDDED)
    tokenizer = load_tokenizer(EMBEDDED)
    names = "text.color axes.labelcolor axes.edgecolor axes.titlecolor xtick.color ytick.color"
    plt.rcParams.update(
        dict.fromkeys(names.split(), INK) | {"svg.hashsalt": "cover", "font.size": 10}
    )
    words, share = shares(model, params, tokenizer)
    for word, part in zip(words, share, strict=True):
        print(f"{part:5.2f} {word}")
    fig, ax = plt.subplots(figsize=(6.4, 4.0))
    hero(ax, words, share)
    fig.savefig(STATIC / "cover.svg", metadata={"Date": None, "Creator": None})
    social(words, share)

    fig, axes = plt.subplots(2, 3, figsize=(9.6, 5.4))
    panels = [
        ("1  A state remembers", continuous),
        ("2  A clock samples it", discretized),
        ("3  The input sets the clock, Δ", lambda ax: selective(ax, model, params, tokenizer)),
        ("4  Steps compose in a tree", tree),
        ("5  A block surrounds the scan", block),
        ("6  And it writes Python", lambda ax: pretrained(ax, model, params, tokenizer)),
    ]
    for ax, (title, draw) in zip(axes.flat, panels, strict=True):
        draw(ax)
        ax.set_title(title, loc="left", fontsize=11)
        ax.spines[:].set_visible(False)
        ax.set_yticks([])
        if draw in (continuous, discretized, tree, block) or title.startswith("6"):
            ax.set_xticks([])
    fig.savefig(STATIC / "chapters.svg", metadata={"Date": None, "Creator": None})
    print(f"wrote cover.svg, social.png and chapters.svg in {STATIC}")


if __name__ == "__main__":
    main()
