"""What the site's pages load and say of themselves, and what its address itself shows.

sphinx-thebe puts scripts on every page that we do not use and that throw an error: they go. The
references are a list of items to a screen reader, too: docutils gives the list a role and its items
one that no list may hold. And the address without a page, which is the one that people pass on,
leads to the landing page: what stands there carries that page's title, description and picture, for
whoever previews the link.
"""

import re


def remove_scripts(app, pagename, templatename, context, doctree):
    scripts = context.get("script_files", [])
    context["script_files"] = [s for s in scripts if "thebe" not in f"{s} {s.attributes}"]


def name_list_items(app, pagename, templatename, context, doctree):
    if "body" in context:
        context["body"] = context["body"].replace('role="doc-biblioentry"', 'role="listitem"')


def write_entry(app, exception):
    if exception or app.builder.name != "html":
        return
    target = app.builder.get_target_uri(app.config.root_doc)
    head = (app.outdir / target).read_text(encoding="utf-8").partition("</head>")[0]
    kept = r'<title>.*?</title>|<meta (?:property="og:|name="(?:description|twitter:))[^>]*>'
    (app.outdir / "index.html").write_text(
        f'<!DOCTYPE html>\n<html lang="{app.config.language}">\n<head>\n<meta charset="utf-8" />\n'
        + "\n".join(re.findall(kept, head, flags=re.DOTALL))
        + f'\n<link rel="canonical" href="{app.config.html_baseurl}{target}" />\n'
        f'<meta http-equiv="Refresh" content="0; url={target}" />\n</head>\n'
        f'<body><a href="{target}">{app.config.project}</a></body>\n</html>\n',
        encoding="utf-8",
    )


def setup(app):
    app.connect("html-page-context", remove_scripts, priority=900)
    app.connect("html-page-context", name_list_items)
    # Before sphinx-external-toc, which writes a page that says nothing where there is none.
    app.connect("build-finished", write_entry, priority=400)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
