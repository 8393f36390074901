"""One server and one browser for all tests of this folder. ``make browser`` runs them."""

import pytest

from tests.browser import reader


@pytest.fixture(scope="session")
def book():
    """The Reader of the built book."""
    from playwright.sync_api import sync_playwright  # not installed where other tests run

    if not (reader.HTML / "book" / "index.html").exists():
        pytest.fail(f"{reader.HTML}: there is no book there; run `make book`")
    path = reader.find_browser()
    if path is None:
        pytest.fail(
            f"no Chromium: none of {', '.join(reader.NAMES)} is on the PATH. Install it with the "
            "system's package manager (apt-get install chromium), or set BROWSER_PATH"
        )
    with reader.served(reader.HTML) as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=reader.FLAGS)
        yield reader.Reader(browser, address)
        browser.close()


def pytest_terminal_summary(terminalreporter):
    """What no test asserts: how soon each page was there, and what it weighs."""
    lines = []
    for report in terminalreporter.getreports("passed"):
        for seen in (value for name, value in report.user_properties if name == "first view"):
            page = report.nodeid.partition("[")[2].rstrip("]")
            lines.append(
                f"{page:34} first paint {seen['painted']:5} ms, complete {seen['loaded']:5} ms, "
                f"{seen['bytes'] / 1e6:4.1f} MB, {seen['math']} equations"
            )
    if lines:
        terminalreporter.section("pages at 1280 px, from loopback, compressed")
        terminalreporter.write("\n".join(sorted(lines)) + "\n")
