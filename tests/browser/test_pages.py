"""Every page of the book, on a phone and on a laptop, in both themes, at 200 % and on paper."""

import re
from collections import Counter

import pytest

from tests.browser.reader import HTML, LOADS, VIEWS, pages

pytestmark = pytest.mark.browser
# The tests of one page run in one process: they share its visit.
each_page = pytest.mark.parametrize(
    "page", [pytest.param(page, marks=pytest.mark.xdist_group(page)) for page in pages()]
)
each_view = pytest.mark.parametrize("view", VIEWS, ids=lambda view: f"{view[0]}-{view[1]}")

PAGE_BYTES, SITE_BYTES = 3_000_000, 40_000_000
# The beginning of the text, and of the section around all of it.
BEGIN = re.compile(r'<article class="bd-article">.*?<section [^>]*>', re.DOTALL)
PAPER = 718  # px: A4 between margins of 1 cm

# What is broken on purpose -> where the finding must stand, and a word of it.
FAULTS = {
    "<script>throw new Error('no such thing')</script>": ("errors", "no such thing"),
    "<script>console.error('went wrong')</script>": ("errors", "went wrong"),
    "<script src='missing.js'></script>": ("errors", "404"),
    "<img src='https://example.org/a.png' alt='a'>": ("outside", "example.org"),
    "<script>fetch('http://192.0.2.1/count')</script>": ("outside", "192.0.2.1"),
    "<div style='width: 1500px'>wide</div>": ("overflow", "wide"),
    "<div style='overflow: hidden'><p style='width: 1500px'>cut off</p></div>": ("overflow", "cut"),
    "<img src='../_static/logo.svg'>": ("images", "img"),
    "<img src='../_static/logo.svg' alt='../_static/logo.svg'>": ("images", "img"),
    "<svg class='book-figure' role='img'></svg>": ("images", "svg"),
    "<img src='missing.png' alt='a picture'>": ("images", "missing.png"),
    "<p>so $$x$$ is</p>": ("equations", "left over: so"),
    "<p>so \\(x\\) is</p>": ("equations", "left over: so"),
    "<span class='math notranslate'>\\(\\frac{1}\\)</span>": ("equations", "error"),
    "<p style='color: #999; background: #aaa'>pale</p>": ("axe", "color-contrast"),
    "<button></button>": ("axe", "button-name"),
}


def inject(fault):
    """The page with this at the beginning of its text."""
    return lambda text: BEGIN.sub(lambda begin: begin[0] + fault, text, count=1)


@each_page
@each_view
@pytest.mark.parametrize("what", ["errors", "outside", "overflow", "images", "equations", "axe"])
def test_page(book, page, view, what):
    assert book.visit(page)[view][what] == []


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_broken_is_found(book, fault):
    what, word = FAULTS[fault]
    for views in LOADS:
        found = book.look("book/notation.html", views[:1], inject(fault))
        assert any(word in line for line in found[views[0]][what]), found


@each_page
def test_weight_of_a_page(book, page, record_property):
    visit = book.visit(page)
    record_property("first view", visit[1280, "light"])  # for the summary
    assert max(seen["bytes"] for seen in visit.values()) < PAGE_BYTES


def test_weight_of_the_site():
    sizes = Counter({path: path.stat().st_size for path in HTML.rglob("*") if path.is_file()})
    assert sizes.total() < SITE_BYTES, sizes.most_common(5)


@each_page
def test_every_equation_of_the_file_is_on_the_page(book, page):
    written = (HTML / page).read_text(encoding="utf-8").count('class="math ')
    assert book.visit(page)[1280, "light"]["math"] >= written  # the contents repeat those of titles


@each_page
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
