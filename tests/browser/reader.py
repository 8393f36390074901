"""One real browser on the built book: what a reader's Chromium meets on a page.

``Reader.visit`` loads a page and returns all that was measured in it; the tests ask what they want
to know. The pages come from a server on loopback, and every other address is refused and written
down. The browser is the system's own: Playwright's download is not used.
"""

import functools
import gzip
import http.server
import importlib.resources
import os
import re
import shutil
import threading
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HTML = Path(os.environ.get("BOOK_HTML") or ROOT / "_build" / "html")
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (  # no sandbox: Chromium refuses to start one as root, and it only meets our own pages
    "--no-sandbox --disable-gpu --disable-quic --disable-background-networking "
    "--disable-component-update --disable-sync --no-first-run"
).split()
LOOKS_AGAIN = 500  # ms: the theme asks 300 ms after a change what scrolls and needs the keyboard
TIMEOUT = 120_000  # ms, for a busy machine: nothing here is a statement about speed

# A phone and a laptop, in both themes; and 640 px, which is the laptop at a zoom of 200 %. A page
# is loaded once per line, as the first view, and the others follow in the same tab: as when a
# reader turns the phone, or the evening comes.
LOADS = [
    [(1280, "light"), (1280, "dark"), (640, "light")],
    [(390, "dark"), (390, "light")],
]
VIEWS = [view for views in LOADS for view in views]
CONTRAST = ["color-contrast"]
AXE = {(1280, "light"): None, (1280, "dark"): CONTRAST, (390, "dark"): None}  # None: every rule

# The beginning of the text, and of the section around all of it.
BEGIN = re.compile(r'<article class="bd-article">.*?<section [^>]*>', re.DOTALL)

HERE = Path(__file__).parent
MEASURE = (HERE / "measure.js").read_text(encoding="utf-8")
RUN_AXE = (HERE / "run_axe.js").read_text(encoding="utf-8")
# Solutions and folded cells are read, too. The site's own script opens those that it closed.
UNFOLD = """() => {
  dispatchEvent(new Event("beforeprint"));
  for (const details of document.querySelectorAll("details")) details.open = true;
}"""
SETTLED = "() => Promise.all([window.MathJax?.startup?.promise, document.fonts.ready])"


def find_browser():
    """The path of a Chromium: $BROWSER_PATH, or the first of NAMES there is; None without one."""
    if chosen := os.environ.get("BROWSER_PATH"):
        if not (found := shutil.which(chosen)):
            raise FileNotFoundError(f"BROWSER_PATH={chosen}: there is no such program")
        return found
    return next(filter(None, map(shutil.which, NAMES)), None)


def pages():
    """The addresses of all pages inside the book, such as ``book/index.html``."""
    paths = (path.relative_to(HTML) for path in sorted(HTML.rglob("*.html")))
    names = [path.as_posix() for path in paths if path.parts[0] not in ("_static", "_sources")]
    return [name for name in names if name != "index.html"]  # only leads to book/index.html


@functools.cache
def compressed(path):
    return gzip.compress(path.read_bytes(), compresslevel=6)


@contextmanager
def served(folder):
    """The folder on a free port of loopback: yields the address, with a slash at its end.

    Text is sent compressed, as GitHub Pages and every other host of static pages sends it.
    """

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_GET(self):
            path = Path(self.translate_path(self.path))
            if path.suffix not in (".html", ".css", ".js", ".svg") or not path.is_file():
                return super().do_GET()
            body = compressed(path)
            self.send_response(200)
            self.send_header("Content-Type", self.guess_type(path.name))
            self.send_header("Content-Encoding", "gzip")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def handle(self):
            try:
                super().handle()
            except ConnectionError:  # the browser has closed the page
                pass

    handler = functools.partial(Handler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def inject(fault):
    """The page with this at the beginning of its text."""
    return lambda text: BEGIN.sub(lambda begin: begin[0] + fault, text, count=1)


class Reader:
    """A browser, and the address of the book's folder (with a slash at its end)."""

    def __init__(self, browser, address):
        self.browser, self.address, self.visits = browser, address, {}
        axe = importlib.resources.files("axe_playwright_python") / "axe.min.js"
        self.axe = axe.read_text(encoding="utf-8")

    @contextmanager
    def open(self, page, width=1280, theme="light", media="screen", alter=None):
        """The page, loaded and its equations set, as Playwright's page; ``errors`` and ``outside``
        on it collect what went wrong. ``alter``, a function of the HTML, breaks it on the way.
        """
        tab = self.browser.new_page(
            viewport={"width": width, "height": 900}, color_scheme=theme, service_workers="block"
        )
        tab.set_default_timeout(TIMEOUT)
        tab.emulate_media(media=media)
        tab.errors, tab.outside = [], []

        def note(message):
            if message.type == "error":
                tab.errors.append(f"{message.text} ({message.location['url']})")

        def refuse(route):
            tab.outside.append(route.request.url)
            route.abort()

        def altered(route):
            text = (HTML / page).read_text(encoding="utf-8")
            route.fulfill(content_type="text/html; charset=utf-8", body=alter(text))

        tab.on("console", note)
        tab.on("pageerror", lambda error: tab.errors.append(str(error)))
        tab.route(re.compile(rf"^(?!{re.escape(self.address)}|data:|blob:|about:)"), refuse)
        if alter:
            tab.route(self.address + page, altered)
        try:
            tab.goto(self.address + page)
            tab.evaluate(SETTLED)
            yield tab
        finally:
            tab.close()

    def visit(self, page):
        """What a reader meets on the page, {view: what was found}; every page is loaded once."""
        if page not in self.visits:
            self.visits[page] = {}
            for views in LOADS:
                self.visits[page] |= self.look(page, views)
        return self.visits[page]

    def look(self, page, views, alter=None):
        """{view: findings} for the views of one load: measure.js in each, axe where AXE says so."""
        found = {}
        with self.open(page, *views[0], alter=alter) as tab:
            tab.evaluate(UNFOLD)
            for view in views:
                self.show(tab, view)
                found[view] = tab.evaluate(MEASURE) | {"axe": []}
            tab.evaluate(self.axe)
            for view in views:
                if view in AXE:
                    self.show(tab, view)
                    tab.wait_for_timeout(LOOKS_AGAIN)
                    found[view]["axe"] = tab.evaluate(RUN_AXE, AXE[view])
        for view in views:
            found[view] |= {"errors": tab.errors, "outside": tab.outside}
        return found

    def show(self, tab, view):
        width, theme = view
        tab.set_viewport_size({"width": width, "height": 900})
        tab.emulate_media(color_scheme=theme)
        tab.wait_for_function(f"document.documentElement.dataset.theme == '{theme}'")
