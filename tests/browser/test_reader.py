"""The reader finds what is wrong with a page: each fault is put into one, and must be found."""

import pytest

from tests.browser.reader import LOADS, inject

pytestmark = pytest.mark.browser

LONG = "<div class='math notranslate'><span class='eqno'>(1)</span>\\[" + "x + " * 60 + "x\\]</div>"

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
    LONG: ("equations", "into its number"),
    "<p style='color: #999; background: #aaa'>pale</p>": ("axe", "color-contrast"),
    "<button></button>": ("axe", "button-name"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_broken_is_found(book, fault):
    what, word = FAULTS[fault]
    for views in LOADS:
        found = book.look("book/notation.html", views[:1], inject(fault))
        assert any(word in line for line in found[views[0]][what]), found
