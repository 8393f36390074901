"""Every page of the book on paper, where nothing scrolls and nothing can be unfolded."""

import pytest

from tests.browser.reader import inject, pages

pytestmark = pytest.mark.browser
PAPER = 718  # px: A4 between margins of 1 cm


@pytest.mark.parametrize("page", pages())
def test_on_paper(book, page):
    """Nothing is cut off at the edge, scrolled out of sight, or folded away."""
    with book.open(page, PAPER, media="print") as tab:
        assert tab.evaluate(PRINTED) == []


def test_on_paper_what_is_cut_off_is_found(book):
    style = "<style>details::details-content {content-visibility: hidden !important}</style>"
    for fault in (
        "<pre style='overflow: auto; white-space: pre !important'>" + 200 * "wide " + "</pre>",
        "<details><summary>more</summary><p>folded away</p></details>",
        "<div style='width: 1500px'>wide</div>",
    ):
        with book.open(
            "book/notation.html", PAPER, media="print", alter=inject(style + fault)
        ) as tab:
            assert tab.evaluate(PRINTED) != [], fault


PRINTED = """() => {
  dispatchEvent(new Event("beforeprint"));
  const faults = [], width = document.documentElement.clientWidth;
  for (const element of document.querySelectorAll("article *:not(svg *):not(mjx-container *)")) {
    const style = getComputedStyle(element);
    const box = element.getBoundingClientRect();
    const text = element.textContent.trim();
    const said = `${element.tagName} ${element.className} ${text.slice(0, 60)}`;
    if (element.closest("details:not([open])") && !element.closest("summary")
        && text && !element.checkVisibility({contentVisibilityAuto: true})
        && style.display !== "none") {
      faults.push(`folded: ${said}`);
    }
    if (box.width < 2 || box.height < 2 || !element.checkVisibility()) continue;
    if (box.right > width + 1) faults.push(`to ${Math.round(box.right)} px: ${said}`);
    const clips = !["visible", "clip"].includes(style.overflowX) && style.display !== "inline";
    const inside = clips && element.scrollWidth - element.clientWidth;
    if (inside > 2) faults.push(`cut by ${inside} px: ${said}`);
  }
  return faults;
}"""
