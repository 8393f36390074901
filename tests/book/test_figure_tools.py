"""What the notebooks show: the module's source, figures, and figures that the reader drives."""

import re
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import pytest

import mamba_book.figures
import mamba_book.interactive
import mamba_book.source
from mamba_book import figure, frames, show_source


@pytest.fixture
def displayed(monkeypatch):
    bundles = []
    for module in (mamba_book.figures, mamba_book.interactive, mamba_book.source):
        monkeypatch.setattr(module, "display", lambda bundle, raw: bundles.append(bundle))
    return bundles


def plain():
    return "plain"


@jax.jit
def jitted(x):
    return x


@jax.custom_vjp
def custom(x):
    return x


class Thing:
    @classmethod
    def method(cls):
        return "method"


def test_show_source_shows_what_stands_in_the_file(displayed):
    show_source(plain, jitted, custom, Thing, Thing.method)
    names = [bundle["text/plain"].removeprefix(f"source of {__name__}.") for bundle in displayed]
    assert names == ["plain", "jitted", "custom", "Thing", "Thing.method"]
    file = Path(__file__).read_text(encoding="utf-8")
    for bundle in displayed:
        source = re.search(r"```python\n(.*)\n```$", bundle["text/markdown"], flags=re.DOTALL)[1]
        assert source in file and source.startswith(("def", "@", "class", "    @"))


def draw():
    fig, axes = plt.subplots()
    axes.plot([0, 1], [1, 0])
    axes.set_xlabel("time")
    return fig


def test_figure_takes_the_colour_of_the_page_and_is_the_same_each_time(displayed):
    figure(draw(), alt='a "line" < 1')
    figure(draw(), alt='a "line" < 1')
    svg, again = (bundle["text/html"] for bundle in displayed)
    assert svg == again
    assert "currentColor" in svg and "#010203" not in svg and "#000000" not in svg
    assert 'aria-label="a &quot;line&quot; &lt; 1"' in svg and 'role="img"' in svg
    ids = re.findall(r'\bid="([^"]+)"', svg)
    used = re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', svg)
    assert len(ids) == len(set(ids)) and {a or b for a, b in used} <= set(ids)
    assert plt.get_fignums() == []


def test_figures_on_one_page_share_no_id(displayed):
    figure(draw(), alt="falling")
    fig = draw()
    fig.axes[0].set_ylabel("state")
    figure(fig, alt="falling")
    first, second = (set(re.findall(r'\bid="([^"]+)"', b["text/html"])) for b in displayed)
    assert not first & second


def test_figure_needs_alt_text():
    with pytest.raises(ValueError, match="alt text"):
        figure(plt.figure(), alt=" ")
    plt.close("all")


def draw_frame(height, colour):
    fig, axes = plt.subplots()
    axes.bar([0, 1], [1, height], color=colour)
    axes.set(ylim=(0, 4), xlabel="token", title=f"x{height}", clip_on=True)
    return fig, f"The {colour} bar is {height} high."


CONTROLS = {"height <h>": [1, 2, 3], "colour": ["red", "blue"]}


def framed(displayed, controls=CONTROLS, **options):
    frames(draw_frame, controls, alt='bars & "heights"', **options)
    return displayed[-1]["text/html"]


def shown_in(page, *values):
    """The classes that the page's own rules show when these values are checked."""
    chosen = {
        re.search(rf'name="(\S+-{c})" id="(\S+)"[^>]*><span>{value}</span>', page)[2]
        for c, value in enumerate(values)
    }
    rule = r"^(#\S+:checked\)) \.(f\d+) \{display: inline !important\}"  # against Bootstrap's
    rules = re.findall(rule, page, flags=re.MULTILINE)
    return {name for rule, name in rules if set(re.findall(r"\(#(\S+?):checked", rule)) == chosen}


def test_frames_have_every_combination_and_each_control_picks_its_own(displayed):
    page = framed(displayed)
    pictures = set()
    for height in (1, 2, 3):
        for colour, code in (("red", "#ff0000"), ("blue", "#0000ff")):
            (name,) = shown_in(page, height, colour)
            said = re.search(rf'<span class="f {name}"[^>]*>(.*?)</span>', page)[1]
            assert said == f"The {colour} bar is {height} high."
            drawn = re.findall(rf'<g class="[^"]*\b{name}\b[^"]*".*?</g>', page)
            assert any(code in part for part in drawn)
            pictures.add("".join(drawn))
    assert len(pictures) == 6
    assert plt.get_fignums() == []


def test_frames_work_without_script_network_and_style(displayed):
    page = framed(displayed, start=(3, "red"))
    assert not re.search(r"<script|javascript:|\bon\w+=|@import|<(img|iframe|link)", page)
    addresses = set(re.findall(r"https?://[^\"]+", page))
    assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    (first,) = shown_in(page, 3, "red")
    checked = re.findall(r"checked><span>(.*?)</span>", page)
    assert checked == ["3", "red"]
    # Attributes, not the style, hide the other frames: one picture stays where styles are stripped.
    for classes, hidden in re.findall(r'<g class="f ([^"]+)"( display="none")?', page):
        assert bool(hidden) == (first not in classes.split())
    for name, hidden in re.findall(r'<span class="f (f\d+)"( hidden)?', page):
        assert bool(hidden) == (name != first)


def test_frames_are_drawn_once_where_they_agree_and_the_same_each_time(displayed):
    page, again = framed(displayed), framed(displayed)
    assert page == again
    assert "currentColor" in page and "#010203" not in page
    ids = re.findall(r'\bid="([^"]+)"', page)
    used = re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', page)
    assert len(ids) == len(set(ids)) and {a or b for a, b in used} <= set(ids)
    other = framed(displayed, {"height": [1, 2], "colour": ["red", "blue"]})
    assert not set(ids) & set(re.findall(r'\bid="([^"]+)"', other))
    fig, _ = draw_frame(1, "red")
    figure(fig, alt="one frame")
    assert len(page) < 2 * len(displayed[-1]["text/html"])  # six frames


def test_frames_can_be_used_and_read_without_seeing_them(displayed):
    page = framed(displayed)
    assert 'aria-label="bars &amp; &quot;heights&quot;"' in page and 'role="img"' in page
    assert "<legend>height &lt;h&gt;</legend>" in page and 'aria-live="polite"' in page
    names = set(re.findall(r'<input type="radio" name="(\S+)"', page))
    assert len(names) == len(CONTROLS)  # one group of buttons each: the arrow keys stay inside it


@pytest.mark.parametrize(
    "controls, options, complaint",
    [
        (CONTROLS, {"alt": " "}, "alt text"),
        (CONTROLS, {"start": (4, "red")}, "start"),
        ({"height": [1, 2], "colour": ["red"]}, {}, "colour"),
        ({"height": [1, 1], "colour": ["red", "blue"]}, {}, "height"),
    ],
)
def test_frames_say_what_is_missing(displayed, controls, options, complaint):
    with pytest.raises(ValueError, match=complaint):
        frames(draw_frame, controls, **{"alt": "bars"} | options)
    with pytest.raises(ValueError, match="sentence"):
        frames(lambda *v: (draw_frame(*v)[0], ""), CONTROLS, alt="bars")
    plt.close("all")
    assert displayed == []
