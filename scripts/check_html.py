"""Check the built book as a reader's browser would meet it.

    python scripts/check_html.py [folder, by default _build/html]

Every page of _toc.yml exists; every link and anchor inside the book leads somewhere; no script,
style, image or font comes from another host; no markup is left over as text; every image says what
it shows. (Links to other sites are fine, and are not followed.) And every page of _toc.yml has what
stands around it: a title of its own, a description, a preview, its neighbours, and the buttons to
Colab, the source, the repository and its issues, at the addresses that _config.yml chooses.
"""

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import yaml

ROOT = Path(__file__).resolve().parents[1]

# What a page loads by itself, as (tag, attribute). A <link> loads, too, for these relations.
LOADS = {(tag, "src") for tag in ("script", "img", "iframe", "source", "video", "audio", "embed")}
LOADS |= {("object", "data"), ("image", "href"), ("image", "xlink:href"), ("use", "href")}
LOADING_RELATIONS = {"stylesheet", "icon", "preload", "modulepreload", "prefetch", "preconnect"}

# Whose text is not prose: there, backticks and dollars mean themselves.
VERBATIM = {"pre", "code", "script", "style", "svg", "textarea", "title"}
VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "wbr"}

LEFTOVERS = {
    "a role that was not resolved": re.compile(r"\{[a-z:]+\}`"),
    "a code fence or directive": re.compile(r"```|:::"),
    "an equation that is not one": re.compile(r"\$\$|(?<!\\)\$[^$\s][^$]*\$"),
    "a link that was not resolved": re.compile(r"\]\([^)\s]+\)"),
    "bold text that is not": re.compile(r"\*\*[^*\s][^*]*\*\*"),
    "the repr of an object": re.compile(r"<(IPython|Figure|matplotlib)[^>]*>"),
}
NAMELESS_FOLD = "Show code cell"  # MyST-NB's text of a bar; ours say what they hold

CSS_URL = re.compile(r"""url\(\s*['"]?([^'")]+)|@import\s+['"]([^'"]+)""")


class Page(HTMLParser):
    """What one page defines (ids), links to, loads, and says."""

    def __init__(self, path):
        super().__init__()
        self.ids, self.links, self.loads, self.prose, self.faults = set(), [], [], [], []
        self.meta, self.relations, self.title = {}, {}, ""
        self.open, self.verbatim = [], 0
        self.feed(path.read_text(encoding="utf-8"))
        self.close()

    def handle_starttag(self, tag, attributes):
        attributes = {name: value or "" for name, value in attributes}
        self.ids |= {attributes[k] for k in ("id", "name") if k in attributes}
        if tag == "a" and "href" in attributes:
            self.links.append(attributes["href"])
        if tag == "meta":
            name = attributes.get("property") or attributes.get("name")
            self.meta[name] = attributes.get("content")
        if tag == "link":
            self.relations[attributes.get("rel")] = attributes["href"]
        if tag == "link" and set(attributes.get("rel", "").split()) & LOADING_RELATIONS:
            self.loads.append(attributes["href"])
        self.loads += [attributes[a] for t, a in LOADS if t == tag and a in attributes]
        self.loads += [u for match in CSS_URL.findall(attributes.get("style", "")) for u in match]
        # An empty alt marks a decoration; without one given, Sphinx writes the file's path.
        if tag == "img" and attributes.get("alt", attributes["src"]) == attributes["src"]:
            self.faults.append(f"image without alt text: {attributes['src']}")
        if tag not in VOID:
            classes = attributes.get("class", "").split()
            verbatim = tag in VERBATIM or "math" in classes
            self.open.append((tag, verbatim))
            self.verbatim += verbatim

    def handle_endtag(self, tag):
        if any(tag == opened[0] for opened in self.open):  # close what was left open inside, too
            while True:
                opened, verbatim = self.open.pop()
                self.verbatim -= verbatim
                if opened == tag:
                    break

    def handle_data(self, data):
        around = [tag for tag, _ in self.open]
        if around and around[-1] == "title" and "svg" not in around:
            self.title += data
        if not self.verbatim:
            self.prose.append(data)
        elif around and around[-1] == "style":
            self.loads += [u for match in CSS_URL.findall(data) for u in match]
        elif around and around[-1] == "script" and re.search(r"""['"]https?://""", data):
            self.faults.append(f"script with an address of another host: {data.strip()[:80]}")


def is_external(url):
    parts = urlsplit(url)
    return bool(parts.netloc) or parts.scheme in ("http", "https")


def toc_files(node):
    """The names of all pages in _toc.yml."""
    for key, value in node.items():
        if key in ("root", "file"):
            yield value
        elif isinstance(value, list):
            for child in value:
                yield from toc_files(child)


def check_links(path, page, pages, folder):
    for url in page.links + page.loads:
        if not url or is_external(url) or url.startswith(("data:", "mailto:", "javascript:")):
            continue
        parts = urlsplit(url)
        target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
        if not target.is_relative_to(folder):
            yield f"link out of the book: {url}"
        elif not target.is_file():
            yield f"broken link: {url}"
        elif parts.fragment and target in pages:
            if unquote(parts.fragment) not in pages[target].ids:
                yield f"broken anchor: {url}"


def check_shell(names, name, page, config):
    """What stands around the text of a page of _toc.yml. ``names`` has all of them, in order."""
    repository, branch = config["repository"]["url"], config["repository"]["branch"]
    base = config["html"]["baseurl"]
    source = next(f"{name}{end}" for end in (".ipynb", ".md") if (ROOT / f"{name}{end}").exists())
    address = f"{base}{name}.html"
    expected = {
        repository,
        f"{repository}/edit/{branch}/{source}",
        f"{repository}/issues/new?title=Issue%20on%20page%20%2F{name}.html"
        "&body=Your%20issue%20content%20here.",
        f"../_sources/{source}",
    }
    if source.endswith(".ipynb"):
        colab = config["launch_buttons"]["colab_url"]
        path = repository.removeprefix("https://github.com/")
        expected.add(f"{colab}/github/{path}/blob/{branch}/{source}")
    yield from (f"no button to {url}" for url in sorted(expected - set(page.links)))

    for key in ("og:url", "canonical"):
        if (page.meta | page.relations).get(key) != address:
            yield f"{key} is not {address}"
    for key in ("og:title", "og:description", "og:image:alt", "description"):
        if len(page.meta.get(key) or "") < 5:
            yield f"no {key}"
    if page.meta.get("og:image") != f"{base}_static/social.png":
        yield "no preview, or another one (og:image)"
    if not page.relations.get("icon"):
        yield "no favicon"
    here = names.index(name)
    for relation, k in (("prev", here - 1), ("next", here + 1)):
        wanted = f"{names[k].split('/')[-1]}.html" if 0 <= k < len(names) else None
        if page.relations.get(relation) != wanted:
            yield f"{relation} is {page.relations.get(relation)}, not {wanted}"


def check(folder):
    """All faults, as lines of text; and the number of pages."""
    folder = folder.resolve()
    pages = {
        path: Page(path) for path in sorted(folder.rglob("*.html")) if "_static" not in path.parts
    }
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
    config = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))
    names = list(toc_files(toc))
    faults, titles = [], {}
    for name in names:
        if not (page := pages.get(folder / f"{name}.html")):
            faults.append(f"_toc.yml: no page {name}.html")
            continue
        faults += [f"{name}.html: {fault}" for fault in check_shell(names, name, page, config)]
        if (other := titles.setdefault(page.title.strip(), name)) != name:
            faults.append(f"{name}.html: its title, {page.title!r}, is also that of {other}.html")
    if not (folder / "_static" / "social.png").is_file():
        faults.append("_static/social.png, the preview, is not there")
    for path, page in pages.items():
        found = list(page.faults)
        found += check_links(path, page, pages, folder)
        found += [f"loaded from another host: {url}" for url in page.loads if is_external(url)]
        prose = "".join(page.prose)
        if NAMELESS_FOLD in prose:
            found.append(f"a fold that does not say what it holds: {NAMELESS_FOLD!r}")
        for what, pattern in LEFTOVERS.items():
            found += [f"{what}: {match[0]!r}" for match in pattern.finditer(prose)]
        faults += [f"{path.relative_to(folder)}: {line}" for line in dict.fromkeys(found)]
    for path in sorted(folder.rglob("*.css")):
        text = path.read_text(encoding="utf-8")
        for url in {u for match in CSS_URL.findall(text) for u in match}:
            if is_external(url):
                faults.append(f"{path.relative_to(folder)}: loaded from another host: {url}")
    return faults, len(pages)


def main():
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "_build" / "html"
    faults, count = check(folder)
    for line in faults:
        print(line, file=sys.stderr)
    print(f"{count} pages checked, {len(faults)} faults")
    return int(bool(faults) or not count)


if __name__ == "__main__":
    sys.exit(main())
