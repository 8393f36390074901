"""Tests of the landing page, of the primer before chapter 1, and of the sheet with all equations.

What these pages say of the chapters and of the module must be what the chapters and the module say.
"""

import dataclasses
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import nbformat
import pytest
import yaml

from mamba import Mamba, Mamba2Config, Mamba3Config, MambaConfig
from mamba.ssd import ssd
from mamba.trapezoid import trapezoidal_scan

ROOT = Path(__file__).resolve().parents[2]
PARTS = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))["parts"]
CHAPTERS = [e["file"] for part in PARTS if part.get("numbered") for e in part["chapters"]]
INDEX = (ROOT / "book" / "index.md").read_text(encoding="utf-8")
SHEET = (ROOT / "book" / "one_page.md").read_text(encoding="utf-8")
PRIMER = nbformat.read(ROOT / "book" / "jax_primer.ipynb", as_version=4).cells
FOLDED = {"hide-input", "hide-cell", "remove-input", "remove-cell"}


def heading(name):
    """The label, the title and the question of a notebook, from its first cell."""
    first = nbformat.read(ROOT / f"{name}.ipynb", as_version=4).cells[0].source
    return re.match(r"\((\S+)\)=\n# (.+)\n\n\*(.+)\*\n", first).groups()


# --- the landing page -----------------------------------------------------------------------------


@pytest.mark.parametrize("number, name", [*enumerate(CHAPTERS, start=1)])
def test_a_chapter_has_one_name_and_one_question(number, name):
    label, title, question = heading(name)
    assert f"\n| {{ref}}`{number} {title} <{label}>` | {question} | " in INDEX
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"\n| {number} | [{title}]({name}.ipynb) | {question} | " in readme


def test_the_map_has_every_chapter_and_says_what_there_is_to_see():
    rows = re.findall(r"^\| \{ref\}.*\|$", INDEX, flags=re.MULTILINE)
    assert len(rows) == len(CHAPTERS)
    seen = [row.split("|")[3].strip() for row in rows]
    assert all(len(text.split()) >= 8 for text in seen) and len(set(seen)) == len(seen)


def test_the_cover_shows_the_number_that_its_caption_names():
    script = (ROOT / "scripts" / "draw_cover.py").read_text(encoding="utf-8")
    state = map(int, re.search(r"^STATE = (\d+), (\d+), (\d+) ", script, re.MULTILINE).groups())
    layer, channel, component = state
    assert f"state {component} of channel {channel} in layer {layer}, all counted from 0" in INDEX
    ordinals = ("first", "second", "third", "fourth", "fifth", "sixth")
    assert f"one state of the {ordinals[layer]} layer" in INDEX


# --- JAX in one screen ----------------------------------------------------------------------------


def test_the_primer_comes_before_chapter_1_and_shifts_no_number():
    assert PARTS[0]["chapters"] == [{"file": "book/jax_primer"}]
    assert "numbered" not in PARTS[0] and PARTS[1]["chapters"][0]["file"] == CHAPTERS[0]
    prose = "\n".join(cell.source for cell in PRIMER if cell.cell_type == "markdown")
    exercises = prose.count("{exercise}")  # those of the ledger and of verification are numbered on
    assert exercises == prose.count(":nonumber:") == 1
    assert not [cell for cell in PRIMER if "figure" in cell.metadata.get("mystnb", {})]
    assert ":class: dropdown" in prose


def test_the_primer_shows_each_tool_where_it_runs_and_says_which_chapter_needs_it():
    tools = [
        (".at[", "print"),
        ("jax.jit", "print"),
        ("jax.vmap", "jax.vmap"),  # nested
        ("jax.grad", "jax.jvp", "jax.vjp"),
        ("jax.lax.scan",),
        ("jax.tree.map", "jax.tree.leaves"),
        ("jax.random.split",),
    ]
    items = [i for i, cell in enumerate(PRIMER) if cell.source.startswith("**")]
    assert len(items) == len(tools)
    for i, names in zip(items, tools, strict=True):
        code = PRIMER[i + 1]
        assert all(code.source.count(name) >= names.count(name) for name in names), code.source
        assert "{ref}`" in PRIMER[i].source and len(PRIMER[i].source.split()) < 50
        (output,) = code.outputs
        assert re.search(r"\d", output.text)


def test_the_primer_stays_one_screen():
    exercise = next(i for i, cell in enumerate(PRIMER) if cell.source.startswith("## Exercise"))
    seen = [c for c in PRIMER[:exercise] if not FOLDED & set(c.metadata.get("tags", ()))]
    code = [cell.source.splitlines() for cell in seen if cell.cell_type == "code"]
    assert sum(map(len, code)) <= 50
    assert max(len(line) for lines in code for line in lines) <= 46  # beside the text, at 1280 px
    words = sum(len(c.source.split()) for c in seen if c.cell_type == "markdown")
    assert words <= 480


# --- Mamba on one page ----------------------------------------------------------------------------


def table(title, number=0):
    """The rows of a table below this heading, without its head, as lists of words."""
    section = SHEET.split(f"\n## {title}\n")[1].split("\n## ")[0]
    tables = [part for part in section.split("\n\n") if part.startswith("|")]
    rows = re.findall(r"^\|(.*)\|$", tables[number], flags=re.MULTILINE)[2:]
    return [[cell.strip() for cell in row.split("|")] for row in rows]


def whole(words):
    return int(words.replace(",", ""))


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def shapes_of(config):
    """The parameters of one layer and of what is around the layers, as shapes."""
    tokens, one = jnp.zeros((1, 1), jnp.int32), dataclasses.replace(config, n_layer=1)
    shapes = jax.eval_shape(Mamba(one).init, jax.random.key(0), tokens)["params"]
    layer = shapes.pop("layers_0")
    return layer, shapes


SIZES = table("Sizes")
SMALLEST = MambaConfig(d_model=768, n_layer=24, vocab_size=50277)


@pytest.mark.parametrize("row", SIZES, ids=lambda row: row[0])
def test_the_sizes_are_those_of_the_module(row):
    d_model, n_layer, d_inner, rank, parameters, state_bytes = map(whole, row[1:])
    config = MambaConfig(d_model=d_model, n_layer=n_layer, vocab_size=50277)
    assert (config.d_inner, config.rank) == (d_inner, rank) == (2 * d_model, d_model // 16)
    assert (config.d_state, config.d_conv, config.padded_vocab_size) == (16, 4, 50280)
    layer, around = shapes_of(config)
    assert n_layer * count(layer) + count(around) == parameters
    state = jax.eval_shape(lambda: Mamba(config).initial_state(1))
    assert sum(v.size * v.dtype.itemsize for v in jax.tree.leaves(state)) == state_bytes
    # The two formulas, as the sheet writes them.
    assert "$V d + d + L\\,(6\\tfrac14\\, d^2 + 111\\, d)$" in SHEET
    d = d_model
    assert parameters == 50280 * d + d + n_layer * (25 * d**2 // 4 + 111 * d)
    assert "4 `L` `d_inner` (`n` + `d_conv` − 1) bytes" in SHEET
    assert state_bytes == 4 * n_layer * d_inner * (16 + 4 - 1)


def test_the_sheet_has_all_five_sizes():
    assert [row[0] for row in SIZES] == ["130m", "370m", "790m", "1.4b", "2.8b"]
    assert whole(SIZES[0][1]) == SMALLEST.d_model and whole(SIZES[0][2]) == SMALLEST.n_layer


def test_the_parts_of_the_block_have_the_parameters_of_the_module():
    layer, _ = shapes_of(SMALLEST)
    mixer = layer["mixer"]
    expected = {
        "RMSNorm": layer["norm"],
        "`in_proj`": mixer["in_proj"],
        "`conv1d`": mixer["conv1d"],
        "`x_proj`": mixer["x_proj"],
        "`dt_proj`": mixer["dt_proj"],
        "`A_log`, `D`": [mixer["A_log"], mixer["D"]],
        "gate": [],
        "`out_proj`": mixer["out_proj"],
        "a layer": layer,
    }
    rows = table("Block")
    assert {row[0]: whole(row[-1]) for row in rows} == {k: count(v) for k, v in expected.items()}
    widths = {row[0]: [int(n) for n in re.findall(r"\d+", row[3])] for row in rows}
    for name in ("in_proj", "dt_proj", "out_proj", "x_proj"):
        into, *out = widths[f"`{name}`"]
        out = {1: lambda a: a, 2: lambda a, b: a * b, 3: lambda a, b, c: a + b * c}[len(out)](*out)
        assert mixer[name]["kernel"].shape == (into, out), name


def test_the_shapes_are_those_of_the_module():
    b, l, c = 2, 5, MambaConfig(d_model=32, n_layer=1, vocab_size=50)
    sizes = {"b": b, "l": l, "d_model": c.d_model, "d_inner": c.d_inner, "n": c.d_state}
    sizes |= {"R": c.rank, "V": c.padded_vocab_size}
    written = {}
    for row in table("Shapes"):
        for names, shape in (row[:2], row[2:]):
            shape = eval(shape.strip("`"), sizes.copy())  # "(b, l)", from our own page
            written |= dict.fromkeys(names.replace("`", "").split(", "), shape)

    mixer = shapes_of(c)[0]["mixer"]
    (d_model, both), (rank, d_inner) = (mixer[k]["kernel"].shape for k in ("in_proj", "dt_proj"))
    assert both == 2 * d_inner  # x and z
    n = (mixer["x_proj"]["kernel"].shape[1] - rank) // 2  # B, and as many for C
    tokens, model = jnp.zeros((b, l), jnp.int32), Mamba(c)
    logits, (state,) = jax.eval_shape(
        lambda: model.init_with_output(jax.random.key(0), tokens, model.initial_state(b))[0]
    )
    found = {"tokens": tokens.shape, "logits": logits.shape, "dt": (b, l, rank)}
    found |= {"A": mixer["A_log"].shape, "A_log": mixer["A_log"].shape, "D": mixer["D"].shape}
    found |= {"h": state.ssm.shape, "window": state.conv.shape}
    found |= dict.fromkeys(("r", "u"), (b, l, d_model)) | dict.fromkeys(("B", "C"), (b, l, n))
    found |= dict.fromkeys(("x", "z", "y", "delta"), (b, l, d_inner))
    assert written == found


MAMBA2 = {
    "130m": Mamba2Config(d_model=768, n_layer=24, vocab_size=50277),
    "Codestral": Mamba2Config(
        d_model=4096, n_layer=64, vocab_size=32768, n_groups=8, tie_embeddings=False
    ),
}


@pytest.mark.parametrize("row", table("Sizes and shapes of Mamba-2"), ids=lambda row: row[0])
def test_the_sizes_of_mamba2_are_those_of_the_module(row):
    config = MAMBA2[row[0]]
    d_model, n_layer, heads, groups, parameters, state_bytes = map(whole, row[1:])
    assert (d_model, n_layer) == (config.d_model, config.n_layer)
    assert (heads, groups) == (config.n_heads, config.n_groups)
    layer, around = shapes_of(config)
    assert n_layer * count(layer) + count(around) == parameters
    state = jax.eval_shape(lambda: Mamba(config).initial_state(1))
    assert sum(v.size * v.dtype.itemsize for v in jax.tree.leaves(state)) == state_bytes
    assert "4 (`H` `p` `n` + 3 `c`) bytes" in SHEET
    numbers = heads * 64 * 128 + 3 * config.d_conv_channels
    assert state_bytes == 4 * n_layer * numbers


def test_the_parts_of_mamba2s_block_have_the_parameters_of_the_module():
    layer, _ = shapes_of(MAMBA2["130m"])
    mixer = layer["mixer"]
    expected = {
        "RMSNorm": layer["norm"],
        "`in_proj`": mixer["in_proj"],
        "`conv1d`": mixer["conv1d"],
        "`dt_bias`": mixer["dt_bias"],
        "`A_log`, `D`": [mixer["A_log"], mixer["D"]],
        "`norm`": mixer["norm"],
        "`out_proj`": mixer["out_proj"],
        "a layer": layer,
    }
    rows = table("Block of Mamba-2")
    assert {row[0]: whole(row[-1]) for row in rows} == {k: count(v) for k, v in expected.items()}
    widths = {row[0]: [int(n) for n in re.findall(r"\d+", row[3])] for row in rows}
    into, *out = widths["`in_proj`"]
    assert mixer["in_proj"]["kernel"].shape == (into, sum(out))
    assert mixer["out_proj"]["kernel"].shape == tuple(widths["`out_proj`"])
    assert mixer["conv1d"]["kernel"].shape[1] == widths["`conv1d`"][0] == out[1]


def test_the_shapes_of_mamba2_are_those_of_the_module():
    c = Mamba2Config(d_model=32, n_layer=1, vocab_size=50, head_dim=8, d_state=6, n_groups=2)
    b, l, h, g = 2, 5, c.n_heads, c.n_groups
    sizes = {"b": b, "l": l, "h": h, "p": c.head_dim, "g": g, "n": c.d_state}
    sizes |= {"d_inner": c.d_inner}
    written = {}
    for row in table("Sizes and shapes of Mamba-2", 1):
        for names, shape in (row[:2], row[2:]):
            shape = eval(shape.strip("`"), sizes.copy())  # "(b, l, h)", from our own page
            written |= dict.fromkeys(names.replace("`", "").split(", "), shape)
    state = jax.eval_shape(lambda: c.zero_state(b))
    found = {"state": state.ssm.shape, "window": state.conv.shape, "delta": (b, l, h)}
    found |= dict.fromkeys(("A", "D"), shapes_of(c)[0]["mixer"]["A_log"].shape)
    found |= dict.fromkeys(("x", "y"), (b, l, h, c.head_dim))
    found |= dict.fromkeys(("B", "C"), (b, l, g, c.d_state))
    assert written == found
    arrays = {k: jnp.zeros(found[k]) for k in ("x", "delta", "A", "B", "C", "D")}
    y, state = jax.eval_shape(lambda v: ssd(**v, return_state=True), arrays)
    assert y.shape == found["y"] and state.shape == found["state"]


RELEASED = {"d_model": 768, "n_layer": 12, "vocab_size": 128256}
MAMBA3 = {
    "siso-187m": Mamba3Config(**RELEASED, d_intermediate=1536),
    "mimo-187m": Mamba3Config(**RELEASED, d_intermediate=1264, is_mimo=True),
}


@pytest.mark.parametrize("row", table("Sizes and shapes of Mamba-3"), ids=lambda row: row[0])
def test_the_sizes_of_mamba3_are_those_of_the_module(row):
    c = MAMBA3[row[0]]
    d_model, n_layer, heads, rank, width, parameters, state_bytes = map(whole, row[1:])
    assert (d_model, n_layer, heads) == (c.d_model, c.n_layer, c.n_heads)
    assert (rank, width) == (c.rank, c.mlp_width)
    assert (c.head_dim, c.d_state, c.n_groups, c.n_angles) == (64, 128, 1, 32)
    layer, around = shapes_of(c)
    assert n_layer * count(layer) + count(around) == parameters
    state = jax.eval_shape(lambda: Mamba(c).initial_state(1))
    assert sum(v.size * v.dtype.itemsize for v in jax.tree.leaves(state)) == state_bytes
    assert "4 `H` (`p` `n` + `S` + `R` (`n` + `p`)) bytes" in SHEET
    assert state_bytes == 4 * n_layer * heads * (64 * 128 + 32 + rank * (128 + 64))


def test_the_parts_of_mamba3s_block_have_the_parameters_of_the_module():
    layer, _ = shapes_of(MAMBA3["siso-187m"])
    mixer = layer["mixer"]
    expected = {
        "RMSNorm": layer["norm"],
        "`in_proj`": mixer["in_proj"],
        "`dt_bias`": mixer["dt_bias"],
        "norms, biases": [mixer[f"{k}_{v}"] for k in "BC" for v in ("norm", "bias")],
        "`D`": mixer["D"],
        "`out_proj`": mixer["out_proj"],
        "norm, MLP": [layer["norm2"], layer["mlp"]],
        "a layer": layer,
    }
    rows = table("Block of Mamba-3")
    assert {row[0]: whole(row[-1]) for row in rows} == {k: count(v) for k, v in expected.items()}
    widths = {row[0]: [int(n) for n in re.findall(r"\d+", row[3])] for row in rows}
    into, *out = widths["`in_proj`"]
    assert mixer["in_proj"]["kernel"].shape == (into, sum(out))
    assert mixer["out_proj"]["kernel"].shape == tuple(widths["`out_proj`"])
    into, two, width, out = widths["norm, MLP"]
    assert layer["mlp"]["fc1"]["kernel"].shape == (into, two * width)
    assert layer["mlp"]["fc2"]["kernel"].shape == (width, out)


def test_the_shapes_of_mamba3_are_those_of_the_module():
    c = Mamba3Config(
        d_model=32, n_layer=1, vocab_size=50, head_dim=8, d_state=6, is_mimo=True, mimo_rank=3
    )
    b, l, h, r = 2, 5, c.n_heads, c.rank
    sizes = {"b": b, "l": l, "h": h, "r": r, "p": c.head_dim, "n": c.d_state, "s": c.n_angles}
    written = {}
    for row in table("Sizes and shapes of Mamba-3", 1):
        for names, shape in (row[:2], row[2:]):
            shape = eval(shape.strip("`"), sizes.copy())  # "(b, l, h)", from our own page
            written |= dict.fromkeys(names.replace("`", "").split(", "), shape)
    names = ("x", "delta", "A", "lam", "B", "C", "theta")
    arrays = {k: jnp.zeros(written[k]) for k in names} | {"D": jnp.zeros(h)}
    scan = lambda v: trapezoidal_scan(**v, return_state=True)  # noqa: E731
    y, state = jax.eval_shape(scan, arrays)
    first = jax.eval_shape(lambda: c.zero_state(b))
    assert y.shape == written["y"]
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, first)
    assert "$h$ `(b, h, p, n)`, $\\theta$ `(b, h, s)`" in SHEET
    assert state.h.shape == (b, h, c.head_dim, c.d_state) and state.angle.shape == (
        b,
        h,
        c.n_angles,
    )


@pytest.mark.parametrize("name", CHAPTERS)
def test_the_sheet_names_every_chapter(name):
    assert f"<{heading(name)[0]}>`" in SHEET
