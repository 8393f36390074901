"""The book's ready-made drawings: the block, text with values behind it, figures with a slider."""

import re

import matplotlib.pyplot as plt
import numpy as np
import pytest

import mamba_book.figures
import mamba_book.interactive
from mamba_book import block_diagram, diagram, frames, heat_text, sliders, three_blocks
from mamba_book.diagram import COMMON, GENERATIONS, PARTS
from mamba_book.heat import LEVELS


@pytest.fixture
def displayed(monkeypatch):
    pages = []
    for module in (mamba_book.figures, mamba_book.interactive, diagram):
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
    assert plt.get_fignums() == []


def test_the_selection_is_both_projections(displayed):
    block_diagram(lit=("selection",), width=3.2)
    block_diagram(lit=("x_proj", "dt_proj"), width=3.2)
    assert displayed[0] == displayed[1]


def test_the_block_has_the_widths_of_the_published_model(displayed):
    block_diagram(d_model=2560)
    assert "2,560 features come in, 5,120 are inside" in displayed[0]["text/plain"]
    texts = re.findall(r"<!-- (.*?) -->", displayed[0]["text/html"])
    assert texts.count("2,560") == 2 and "160" in texts and "5,120, state 5,120 × 16" in texts


def test_in_the_margin_the_words_of_the_block_can_be_read(displayed):
    """On a page of 1280 px the margin is 208 px wide. Its words are as tall as a caption's."""
    block_diagram(lit=("scan",), width=3.2)
    svg = displayed[0]["text/html"]
    drawn = float(re.search(r'viewBox="0 0 ([\d.]+)', svg)[1])
    sizes = [float(s) for s in re.findall(r"scale\((0\.\d+) -", svg)]  # of glyphs of 100 units
    assert len(PARTS) < len(sizes) and min(sizes) * 100 * 208 / drawn >= 11.5


def test_three_blocks_are_three_pictures_with_words_of_their_own(displayed):
    three_blocks()
    (bundle,) = displayed
    page = bundle["text/html"]
    alts = re.findall(r'role="img" aria-label="([^"]+)"', page)
    assert [alt.split(":")[0] for alt in alts] == ["Mamba", "Mamba-2", "Mamba-3"]
    assert bundle["text/plain"] == "figure: " + " ".join(alts)
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(set(ids)) == len(ids) and plt.get_fignums() == []
    drawn, *_ = (float(w) for w in re.findall(r'viewBox="0 0 ([\d.]+)', page))
    sizes = [float(s) for s in re.findall(r"scale\((0\.\d+) -", page)]  # of glyphs of 100 units
    assert min(sizes) * 100 * 208 / drawn >= 10  # px, where a third of the column is 208 px wide


def test_what_is_marked_as_gone_was_there_before_and_what_is_new_was_not():
    """The words of the boxes say the same as their marks, from each block to the next."""

    def words(name, *changes):
        boxes = [box for box in GENERATIONS[name]["boxes"] if box[-1] in changes]
        return {word for box in boxes for word in re.split(r"[,\s]+", box[3])}

    for before, after in (("Mamba", "Mamba-2"), ("Mamba-2", "Mamba-3")):
        there = words(before, "kept", "new")
        assert words(after, "gone") and words(after, "gone") <= there
        assert words(after, "kept") <= there | {"softplus"}  # of dt_proj, without the projection
        assert words(after, "new") - there
    marks = [box[-1] for parts in (COMMON, *GENERATIONS.values()) for box in parts["boxes"]]
    assert set(marks) == {"kept", "new", "gone"}
    for name, parts in GENERATIONS.items():
        said = parts["alt"].partition("Gone:")
        assert bool(said[1]) == any(box[-1] == "gone" for box in parts["boxes"]), name


def test_no_word_of_the_three_blocks_is_wider_than_its_box():
    fig, ax = plt.subplots(figsize=(2.5, 3.3))
    ax.set(xlim=(-0.1, 10.1), ylim=(-2.0, 10.8))
    ax.axis("off")
    for parts in (COMMON, *GENERATIONS.values()):
        for x, y, width, text, *_ in parts["boxes"]:
            words = ax.text(x, y, text, fontsize=9, ha="center")
            fig.draw_without_rendering()
            box = words.get_window_extent().transformed(ax.transData.inverted())
            assert box.width <= width, text
    plt.close(fig)


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


SECONDS = 0.8


def draw_level(rate, time):
    fig, axes = plt.subplots()
    axes.bar([0], [1 + rate * time])
    axes.set(ylim=(0, 20))
    return fig, f"At rate {rate}, the level after {time} s is {1 + rate * time}."


def playing(displayed, **options):
    """The page of a figure that plays through three times, at a rate that the reader chooses."""
    controls = {"rate": [1, 2], "time (s)": [0, 3, 6]}
    frames(draw_level, controls, alt="a level that rises", play=SECONDS, **options)
    return displayed[-1]["text/html"]


def seen_at(page, rate, second):
    """The frames of which everything is seen while this rate plays, and of which anything is."""
    names = dict(re.findall(r"@keyframes (\S+) \{(.*)\}$", page, flags=re.MULTILINE))
    rule = r':has\(#\w+-0-(\d):checked\):has\(:is\(.* \[class="f ([^"]+)"\] \{.*: (\S+) (\S+)s step'
    parts = []
    for row, classes, name, period in re.findall(rule, page):
        stops = re.findall(r"(\S+)% \{visibility: (\w+)\}", names[name])
        now = 100 * (second % float(period)) / float(period)
        shown = [state for at, state in stops if float(at) <= now][-1] == "visible"
        if int(row) == rate:
            parts.append((shown, classes.split()))
    frames_of_rate = range(3 * rate, 3 * rate + 3)
    everything = {k for k in frames_of_rate if all(s for s, of in parts if f"f{k}" in of)}
    anything = {int(of[0][1:]) for shown, of in parts if shown and len(of) == 1}
    return everything, anything


@pytest.mark.parametrize("rate", [0, 1])
def test_a_figure_that_plays_shows_one_frame_after_the_other(displayed, rate):
    page = playing(displayed)
    times = [0.5, 1.5, 2.5, 3.5, 4.5, 5.5]  # frames; the last one stays for two more
    for time, place in zip(times, [0, 1, 2, 2, 2, 0], strict=True):
        frame = 3 * rate + place
        assert seen_at(page, rate, time * SECONDS) == ({frame}, {frame})


def test_a_figure_plays_only_for_whoever_wants_motion(displayed):
    page = playing(displayed, start=(2, 3))
    motion, still = (
        page.index("(prefers-reduced-motion: no-preference)"),
        page.index("@media print, "),
    )
    assert motion < page.index("@keyframes") and page.rindex("step-end infinite") < still
    (frame,) = set(
        re.findall(r":has\(#\w+-0-1:checked\):has\(:is\(.*\)\)? \.(f\d) \{", page[still:])
    )
    assert frame == "f4"  # rate 2, time 3: where it starts
    assert re.search(r"reduced-motion: reduce\) \{#\w+ \.play \{display: none\}\}", page)


def test_play_and_pause_are_buttons_of_the_last_row_and_wait_for_the_reader(displayed):
    page = playing(displayed)
    assert re.findall(r"checked><span>(.*?)</span>", page) == ["1", "0"]
    rows = re.findall(r"<fieldset>.*?</fieldset>", page)
    assert "play" not in rows[0] and rows[1].count('type="radio" name=') == 5
    assert len(set(re.findall(r'name="(\S+)"', rows[1]))) == 1  # one choice among all of them
    moving = playing(displayed, autoplay=True)
    assert re.findall(r"checked><span>(.*?)</span>", moving) == ["1", "▶\ufe0e play"]
    assert "<script" not in page + moving


def test_a_row_of_many_values_is_a_track(displayed):
    for values in (list(range(6)), list(range(7))):
        frames(lambda v: draw_level(1, v), {"time": values}, alt="a level that rises")
    few, many = (bundle["text/html"] for bundle in displayed)
    assert 'class="track"' in many and 'class="track"' not in few


@pytest.mark.parametrize(
    "options, complaint",
    [({"play": 0.2}, "flickers"), ({"autoplay": True}, "needs play")],
)
def test_what_flickers_or_plays_at_no_speed_is_refused(displayed, options, complaint):
    with pytest.raises(ValueError, match=complaint):
        frames(lambda v: draw_level(1, v), {"time": [1, 2]}, alt="a level", **options)
    assert displayed == [] and plt.get_fignums() == []
