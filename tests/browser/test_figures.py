"""Every figure that a reader can drive reacts: to the mouse, to a finger, to the keys."""

import itertools
import re

import pytest

from tests.browser.reader import HTML, inject, pages

pytestmark = pytest.mark.browser
FIGURES = [
    (page, name)
    for page in pages()
    for name in re.findall(
        r'<div class="book-frames" id="(\w+)"', (HTML / page).read_text(encoding="utf-8")
    )
]

# What is seen of a figure: which frames of the drawing, which sentence, which button of each row.
STATE = """figure => ({
  drawn: [...figure.querySelectorAll("svg g.f")].flatMap((g, i) => {
    const { display, visibility } = getComputedStyle(g);
    return display !== "none" && visibility === "visible" ? [i] : [];
  }),
  said: [...figure.querySelectorAll("p .f")]
    .filter(s => s.checkVisibility({ visibilityProperty: true })).map(s => s.innerText),
  chosen: [...figure.querySelectorAll("input")].flatMap((b, i) => b.checked ? [i] : []),
})"""
# Put the focus just before a figure, as a reader has it who has come there by the keyboard.
START = """figure => {
  const here = document.createElement("span");
  here.tabIndex = -1;
  figure.before(here);
  here.focus();
}"""
DRIVEN = ".book-frames input, [name=scan-tree]"
OTHER = "main :is(input, select, textarea, canvas, video, iframe, .js-plotly-plot)"


@pytest.mark.parametrize("page, name", FIGURES)
@pytest.mark.parametrize("width", [390, 1280])
def test_every_button_shows_its_own_frame(book, page, name, width):
    with book.open(page, width) as tab:
        figure = tab.locator(f"#{name}")
        rows = [row.locator("label:not(.play *)") for row in figure.locator("fieldset").all()]
        said, drawn = set(), set()
        for choice in itertools.product(*(range(row.count()) for row in rows)):
            for row, k in zip(rows, choice, strict=True):
                row.nth(k).click()
            state = figure.evaluate(STATE)
            assert len(state["said"]) == 1 and state["drawn"], choice
            assert len(state["chosen"]) == len(rows), choice
            said.add(state["said"][0])
            drawn.add(tuple(state["drawn"]))
        assert len(said) > 1 and len(drawn) > 1, "something changes"
        assert tab.errors == [] and tab.outside == []


@pytest.mark.parametrize("page, name", FIGURES)
def test_figures_are_driven_from_the_keyboard(book, page, name):
    with book.open(page) as tab:
        figure = tab.locator(f"#{name}")
        figure.evaluate(START)
        for row in figure.locator("fieldset").all():
            tab.keyboard.press("Tab")
            inside = row.evaluate("row => row.contains(document.activeElement)")
            assert inside, "Tab leads to the row of buttons"
            outline = tab.evaluate(
                "getComputedStyle(document.activeElement.nextElementSibling).outlineStyle"
            )
            assert outline != "none", "the button that has the focus shows it"
            before = figure.evaluate(STATE)
            tab.keyboard.press("ArrowRight")
            after = figure.evaluate(STATE)
            assert before["chosen"] != after["chosen"] and before["said"] != after["said"]
            tab.keyboard.press("ArrowLeft")
            assert figure.evaluate(STATE) == before


@pytest.fixture(scope="module")
def tank():
    """The page's text with a figure in it that plays, as mamba_book makes it."""
    import mamba_book.interactive
    from mamba_book import subplots

    def draw(time):
        fig, ax = subplots(figsize=(4.0, 2.4))
        ax.bar([0], [8 - time])
        ax.set(ylim=(0, 9))
        return fig, f"After {time} s the level is {8 - time}."

    shown = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mamba_book.interactive, "display", lambda bundle, raw: shown.append(bundle))
        mamba_book.frames(draw, {"time (s)": list(range(8))}, alt="a tank that drains", play=0.4)
    return inject(shown[0]["text/html"])


def test_a_figure_plays_pauses_and_is_dragged(book, tank):
    with book.open("book/notation.html", 390, alter=tank) as tab:
        figure = tab.locator(".book-frames").first
        said = lambda: figure.evaluate(STATE)["said"]  # noqa: E731
        assert said() == ["After 0 s the level is 8."]
        play, pause = figure.locator(".play label").all()
        play.click()
        while said() != ["After 3 s the level is 5."]:
            tab.wait_for_timeout(50)
        pause.click()
        stopped = figure.evaluate(STATE)
        tab.wait_for_timeout(900)  # two frames
        assert figure.evaluate(STATE) == stopped and len(stopped["said"]) == 1
        first, last = (figure.locator(".track label").nth(k).bounding_box() for k in (1, 6))
        tab.mouse.move(first["x"] + 5, first["y"] + 5)
        tab.mouse.down()
        assert said() == stopped["said"]
        tab.mouse.move(last["x"] + 5, last["y"] + 60, steps=8)
        assert said() == ["After 6 s the level is 2."]
        tab.mouse.up()
        tab.mouse.move(first["x"] + 5, first["y"] + 5, steps=8)
        assert said() == ["After 6 s the level is 2."]
        assert tab.errors == []


def test_a_figure_does_not_play_where_motion_is_not_wanted(book, tank):
    with book.open("book/notation.html", alter=tank) as tab:
        tab.emulate_media(reduced_motion="reduce")
        figure = tab.locator(".book-frames").first
        assert not figure.locator(".play").is_visible()
        figure.locator(".play input").first.evaluate("play => { play.checked = true; }")
        tab.wait_for_timeout(900)
        assert figure.evaluate(STATE)["said"] == ["After 0 s the level is 8."]


def test_the_scan_tree_goes_through_its_rounds(book):
    with book.open("book/04_parallel_scan.html") as tab:
        first = tab.locator("#scan-tree-0")
        buttons = tab.locator("label[for^=scan-tree-]")
        told = []
        for k in range(buttons.count()):
            buttons.nth(k).click()
            told += first.evaluate(
                "b => [...b.parentElement.querySelectorAll('p[class^=t]')]"
                ".filter(p => p.checkVisibility()).map(p => p.innerText)"
            )
        assert len(set(told)) == len(told) == buttons.count() > 2, "one sentence for each round"


def test_there_are_figures_to_drive():
    assert FIGURES


@pytest.mark.parametrize("page", pages())
def test_no_figure_is_without_a_test(book, page):
    """A new kind of figure needs a test of its own here."""
    if page == "search.html":
        pytest.skip("its only control is the search field")
    with book.open(page) as tab:
        others = tab.locator(OTHER).evaluate_all(
            f"all => all.filter(e => !e.matches('{DRIVEN}') && e.checkVisibility())"
            ".map(e => e.outerHTML.slice(0, 120))"
        )
    assert [e for e in others if "sd-tab" not in e and "sidebar" not in e] == []
