"""The sheet with all equations: printed to PDF by Chromium, it is the two sides of one sheet of A4,
Mamba in front, Mamba-2 and Mamba-3 on the back, and legible.
"""

import re

import pytest

from tests.browser.reader import inject

pytestmark = pytest.mark.browser
SHEET = "book/one_page.html"
PAPER = 733  # px: A4 between margins of 8 mm
A4 = 210 / 25.4 * 72, 297 / 25.4 * 72  # points


def printed(book, **options):
    """The sizes of the sides, in points, when the page is printed as its own style asks."""
    with book.open(SHEET, media="print", **options) as tab:
        pdf = tab.pdf(prefer_css_page_size=True)
    sides = len(re.findall(rb"/Type\s*/Page\b", pdf))
    boxes = re.findall(rb"/MediaBox\s*\[0 0 ([\d.]+) ([\d.]+)\]", pdf)
    assert len(boxes) == sides
    return [(float(width), float(height)) for width, height in boxes]


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_it_is_one_sheet_of_a4(book, width, theme):
    front, back = printed(book, width=width, theme=theme)
    assert front == back == pytest.approx(A4, abs=1)


def test_there_is_room_for_other_fonts(book):
    """Two per cent larger, as with another system's font, it still fits both sides."""
    larger = "<style>@media print {html:root:root {font-size: 10.5px !important}}</style>"
    with book.open(SHEET, media="print", alter=inject(larger)) as tab:
        assert tab.evaluate("getComputedStyle(document.documentElement).fontSize") == "10.5px"
    assert len(printed(book, alter=inject(larger))) == 2


def test_what_does_not_fit_is_a_second_sheet(book):
    assert len(printed(book, alter=inject(25 * "<p>One line more.</p>"))) == 3


def test_what_else_stands_on_a_page_is_not_printed_and_the_title_is(book):
    with book.open(SHEET, PAPER, media="print") as tab:
        shown = tab.evaluate(
            """() => [...document.querySelectorAll("h1, #jb-print-toc, .bd-sidebar, footer")]
                .filter((element) => element.checkVisibility())
                .map((element) => element.textContent.trim())"""
        )
    assert [text.rstrip("#").strip() for text in shown] == ["Mamba on one page"]


def test_the_line_beside_the_title_does_not_reach_into_it(book):
    """On paper the two share a line. A longer line, or a larger title, is found."""
    title = "#mamba-on-one-page#mamba-on-one-page > h1"
    larger = inject(f"<style>{title} {{font-size: 5rem !important}}</style>")
    for alter, apart in [(None, True), (larger, False)]:
        with book.open(SHEET, PAPER, media="print", alter=alter) as tab:
            assert tab.evaluate(BESIDE_THE_TITLE) is apart


def test_on_a_laptop_every_table_is_whole(book):
    """No column of a table is behind a scroll bar, in either theme."""
    for theme in ("light", "dark"):
        with book.open(SHEET, 1280, theme) as tab:
            assert tab.evaluate(SCROLLS) == []
    wide = inject("<style>#block-of-mamba-2 td {min-width: 20em !important}</style>")
    with book.open(SHEET, 1280, alter=wide) as tab:
        assert tab.evaluate(SCROLLS) == ["block-of-mamba-2"]


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_it_is_legible_on_paper(book, theme):
    """Black, no smaller than 7 points, and nothing of a column reaches into the other."""
    with book.open(SHEET, PAPER, theme, media="print") as tab:
        assert tab.evaluate(LEGIBLE) == []


def test_what_is_not_legible_is_found(book):
    for fault in (
        "<p style='font-size: 9px'>small</p>",
        "<p style='color: #ccc'>pale</p>",
        "<section><div style='width: 500px'>wide</div></section>",
        "<style>#discretization mjx-math {font-size: 1.3em !important}</style>",
    ):
        with book.open(SHEET, PAPER, media="print", alter=inject(fault)) as tab:
            assert tab.evaluate(LEGIBLE) != [], fault


BESIDE_THE_TITLE = """() => {
  const [title, line] = ["h1", "h1 + p"].map((element) => {
    const range = document.createRange();
    range.selectNodeContents(document.querySelector("#mamba-on-one-page > " + element));
    return range.getBoundingClientRect();
  });
  return title.right < line.left || title.bottom <= line.top;
}"""

SCROLLS = """() => [...document.querySelectorAll("#mamba-on-one-page > section")]
  .filter((section) => [...section.querySelectorAll("table")].some((table) => {
    const box = table.closest(".pst-scrollable-table-container");
    return box.scrollWidth > box.clientWidth + 1;
  }))
  .map((section) => section.id)"""

LEGIBLE = """() => {
  const faults = [];
  for (const section of document.querySelectorAll("#mamba-on-one-page > section")) {
    const over = section.scrollWidth - section.clientWidth;
    if (over > 1) faults.push(`${section.id}: ${over} px too wide`);
    const { right } = section.getBoundingClientRect();
    for (const part of section.querySelectorAll("mjx-math, table, p, li")) {
      const beyond = part.getBoundingClientRect().right - right;
      if (beyond > 1) faults.push(`${section.id}: ${Math.round(beyond)} px cut off`);
    }
  }
  const words = "#mamba-on-one-page :is(p, td, th, li, code, mjx-container)";
  for (const element of document.querySelectorAll(words)) {
    const { fontSize, color } = getComputedStyle(element);
    const said = element.textContent.trim().slice(0, 40);
    if (parseFloat(fontSize) < 7 / 0.75) faults.push(`${fontSize}: ${said}`);
    const levels = color.match(/[\\d.]+/g).slice(0, 3).map(Number);
    if (Math.max(...levels) > 0x44) faults.push(`${color}: ${said}`);
  }
  return faults;
}"""
