"""What holds the pages together: search, keyboard, menus, copy buttons, themes."""

import html
import re

import pytest

from tests.browser.reader import HTML, pages

pytestmark = pytest.mark.browser
FIRST, SECOND = "book/01_continuous_ssm.html", "book/02_discretization.html"


def glossary():
    page = (HTML / "book" / "notation.html").read_text(encoding="utf-8")
    terms = re.findall(r'<dt id="term-[^>]*>(.*?)<a class="headerlink"', page, flags=re.DOTALL)
    return [html.unescape(re.sub(r"<[^>]+>", "", term)).strip("# \n") for term in terms]


def test_search_finds_every_word_of_the_glossary(book):
    words = [*glossary(), "softplus", "zero-order hold", "selective_scan"]
    assert len(words) > 13
    with book.open("search.html") as tab:
        missing = []
        for word in words:
            tab.goto(f"{book.address}search.html?q={word.replace(' ', '+')}")
            tab.wait_for_function(
                "() => /^(Search finished|Your search did not match)/"
                ".test(document.querySelector('.search-summary')?.textContent.trim() ?? '')"
            )
            if not tab.locator("#search-results li a").count():
                missing.append(word)
        assert missing == []
        tab.goto(f"{book.address}search.html?q=qqqxyzzy")
        tab.wait_for_function(
            "() => /did not match/.test(document.querySelector('.search-summary')?.textContent)"
        )
        assert tab.locator("#search-results li a").count() == 0
        assert tab.errors == []


def test_an_excerpt_is_from_the_text_and_a_term_has_its_meaning(book):
    with book.open("search.html?q=timescale") as tab:
        tab.wait_for_function("() => document.querySelectorAll('p.context').length > 3")
        excerpts = tab.locator("p.context").all_inner_texts()
        assert excerpts[0].startswith("timescale: The time after which"), excerpts[0]
        assert not [text for text in excerpts if "\\(" in text or "Contents" in text]
        field = tab.locator(".bd-article-container input[type=search]")
        room = field.evaluate("e => parseFloat(getComputedStyle(e).paddingLeft)")
        assert room > 24  # the loupe stands there


def test_search_opens_from_the_keyboard_and_from_the_button(book):
    with book.open("book/index.html") as tab:
        for opening in (
            lambda: tab.keyboard.press("Control+k"),
            lambda: tab.locator("button.search-button__button:visible").click(),
        ):
            opening()
            field = tab.locator("dialog[open] input[type=search]")
            field.wait_for()
            assert field.evaluate("field => field === document.activeElement")
            tab.keyboard.press("Escape")
            tab.locator("dialog[open]").wait_for(state="detached")


@pytest.mark.parametrize("page", ["book/index.html", SECOND])
@pytest.mark.parametrize("width", [390, 1280])
def test_keyboard_alone_is_enough(book, page, width):
    with book.open(page, width) as tab:
        tab.keyboard.press("Tab")
        assert tab.evaluate("document.activeElement.textContent").strip() == "Skip to main content"
        tab.wait_for_function("document.activeElement.getBoundingClientRect().top >= 0")
        tab.keyboard.press("Enter")
        assert tab.evaluate("location.hash") == "#main-content"
        for _ in range(25):
            tab.keyboard.press("Tab")
            assert tab.evaluate(FOCUS_IS_SEEN) is True


FOCUS_IS_SEEN = """() => {
  const focused = document.activeElement;
  if (focused === document.body) return true;
  const shows = (element) => {
    const { outlineStyle, outlineWidth, boxShadow } = getComputedStyle(element);
    return (outlineStyle !== "none" && parseFloat(outlineWidth) > 0) || boxShadow !== "none";
  };
  const label = focused.matches("input") ? [focused.nextElementSibling, focused.labels?.[0]] : [];
  return [focused, ...label].some((element) => element && shows(element)) || focused.outerHTML;
}"""


def test_a_focus_that_does_not_show_is_found(book):
    hide = "<style>* {outline: none !important; box-shadow: none !important}</style></head>"
    alter = lambda text: text.replace("</head>", hide)  # noqa: E731
    with book.open("book/notation.html", alter=alter) as tab:
        tab.keyboard.press("Tab")
        assert tab.evaluate(FOCUS_IS_SEEN) is not True


def test_menus_open_from_the_keyboard(book):
    with book.open(FIRST) as tab:
        for name in ("launch", "source", "download"):
            menu = tab.locator(f".dropdown-{name}-buttons")
            menu.locator("button").first.focus()
            tab.keyboard.press("Enter")
            menu.locator(".dropdown-menu.show").wait_for()
            tab.keyboard.press("Escape")


def test_a_listing_is_copied_as_it_stands(book):
    with book.open(FIRST) as tab:
        tab.context.grant_permissions(["clipboard-read", "clipboard-write"])
        cell = tab.locator(".cell_input div.highlight:visible").nth(1)
        cell.hover()
        cell.locator("button.copybtn").click()
        copied = tab.evaluate("navigator.clipboard.readText()")
        assert copied.strip() == cell.locator("pre").inner_text().strip()


FOLDED = [page for page in pages() if 'class="fold"' in (HTML / page).read_text("utf-8")]


@pytest.mark.parametrize("page", FOLDED)
def test_folds_are_quiet_lines_that_say_what_they_hold(book, page):
    with book.open(page) as tab:
        assert tab.evaluate(FOLDS) == []
        bar = tab.locator("details.fold > summary").first
        bar.focus()
        hidden = tab.locator("details.fold").first.locator("pre, table, img, svg").first
        assert not hidden.is_visible()
        tab.keyboard.press("Enter")
        assert hidden.is_visible()


# The last thing of their cell, never directly below another, and smaller than the text.
FOLDS = """() => {
  const size = (element) => parseFloat(getComputedStyle(element).fontSize);
  const faults = [], text = size(document.querySelector("article p"));
  for (const fold of document.querySelectorAll("details.fold")) {
    const bar = fold.querySelector("summary"), cell = fold.closest(".cell");
    const before = cell.previousElementSibling?.querySelector(":scope > .fold:last-child");
    const mute = bar.innerText.trim().length < 5 || bar.hasAttribute("aria-label");
    if (mute) faults.push(`mute: ${bar.outerHTML}`);
    if (size(bar) >= text) faults.push(`loud: ${bar.innerText}`);
    if (fold !== cell.lastElementChild) faults.push(`above something: ${bar.innerText}`);
    if (before && !fold.previousElementSibling) faults.push(`below a bar: ${bar.innerText}`);
  }
  return faults;
}"""


def test_the_reader_chooses_the_theme(book):
    with book.open("book/index.html") as tab:
        button = tab.locator(".theme-switch-button").first
        seen = set()
        for _ in range(3):
            button.click()
            seen.add(tab.evaluate("document.documentElement.dataset.mode"))
        assert seen == {"light", "dark", "auto"}


def test_previous_and_next_lead_through_the_whole_book(book):
    with book.open("book/index.html") as tab:
        trail = ["book/index.html"]
        while (link := tab.locator("a.right-next")).count():
            link.click()
            tab.wait_for_load_state("domcontentloaded")
            trail.append(tab.url.removeprefix(book.address))
        listed = [page for page in pages() if page.startswith("book/")]
        assert sorted(trail) == sorted(listed)
        back = tab.locator("a.left-prev")
        assert back.get_attribute("href") == trail[-2].removeprefix("book/")


def test_the_address_of_the_site_leads_to_the_landing_page(book):
    with book.open("search.html") as tab:
        tab.goto(book.address)
        tab.wait_for_url("**/book/index.html")
        assert tab.title() == "The Annotated Mamba in JAX"


def test_a_table_that_goes_on_fades_at_its_edge(book):
    fades = (
        "() => [...document.querySelectorAll('.pst-scrollable-table-container')].map(box => {"
        "  const fade = () => getComputedStyle(box).getPropertyValue('--book-fade');"
        "  const wide = box.scrollWidth > box.clientWidth, begin = fade();"
        "  box.scrollLeft = box.scrollWidth;"
        "  return new Promise(then => requestAnimationFrame(() => requestAnimationFrame("
        "    () => then([wide, begin, fade()]))));"
        "})"
    )
    for width in (390, 1280):
        with book.open("book/paper_vs_code.html", width=width) as tab:
            found = tab.evaluate(f"() => Promise.all(({fades})())")
        assert any(wide for wide, _, _ in found) is (width == 390)
        for wide, begin, end in found:
            assert (begin, end) == ("40px" if wide else "0px", "0px")
