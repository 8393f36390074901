"""Take sphinx-thebe's scripts off every page: we do not use them, and they throw an error."""


def remove_scripts(app, pagename, templatename, context, doctree):
    scripts = context.get("script_files", [])
    context["script_files"] = [s for s in scripts if "thebe" not in f"{s} {s.attributes}"]


def setup(app):
    app.connect("html-page-context", remove_scripts, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
