"""Draw the picture on the landing page and in the README: the six chapters, each by its own code.

    python scripts/draw_cover.py        # writes book/_static/cover.svg

Every panel is computed with the module, the third and the last with the checkpoint that ships with
it. The ink is a grey that is legible on a light and on a dark page: an image cannot take the
page's colour.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from mamba import EMBEDDED, Mamba, generate
from mamba.discretize import zoh
from mamba.lti import exact_solution, recurrence
from mamba.pretrained import load_tokenizer
from mamba_book import COLORS

TARGET = Path(__file__).resolve().parents[1] / "book" / "_static" / "cover.svg"
INK = "#7d8590"
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


def mean_delta(model, params, tokens):
    """What `dt_proj` gave in every layer, through softplus, mean over channels: (n_layer, l)."""
    _, seen = model.apply(
        {"params": params},
        tokens,
        capture_intermediates=lambda module, _: module.name == "dt_proj",
    )
    layers = seen["intermediates"]
    values = [
        layers[f"layers_{i}"]["mixer"]["dt_proj"]["__call__"][0][0]
        for i in range(model.config.n_layer)
    ]
    return np.stack([jax.nn.softplus(v).mean(axis=-1) for v in values])


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
    fig.savefig(TARGET, metadata={"Date": None, "Creator": None})
    print(f"wrote {TARGET}")


if __name__ == "__main__":
    main()
