"""Every page of the book, on a phone and on a laptop, in both themes, and at 200 %."""

from collections import Counter

import pytest

from tests.browser.reader import HTML, VIEWS, pages

pytestmark = pytest.mark.browser
each_page = pytest.mark.parametrize("page", pages())
each_view = pytest.mark.parametrize("view", VIEWS, ids=lambda view: f"{view[0]}-{view[1]}")

PAGE_BYTES, SITE_BYTES = 3_000_000, 40_000_000


@each_page
@each_view
@pytest.mark.parametrize("what", ["errors", "outside", "overflow", "images", "equations", "axe"])
def test_page(book, page, view, what):
    assert book.visit(page)[view][what] == []


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
