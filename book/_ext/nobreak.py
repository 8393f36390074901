"""What touches a formula stays on its line: the colon of ``$h$:``, both brackets of ``($A$)``.

A browser may break a line before and after every formula, and a colon then begins the next one.
"""

import re

from docutils import nodes
from sphinx.transforms.post_transforms import SphinxPostTransform

LONGEST = 12  # characters; a longer word may break


class KeepTogether(SphinxPostTransform):
    default_priority = 900  # when references are resolved and captions have their places
    formats = ("html",)

    def run(self, **kwargs):
        for math in list(self.document.findall(nodes.math)):
            keep_together(math)


def keep_together(math):
    """Put the formula into a span with what touches it."""
    before, after = "", ""
    siblings, place = math.parent.children, math.parent.index(math)
    if place and isinstance(siblings[place - 1], nodes.Text):
        before = re.search(r"\S*$", siblings[place - 1])[0]
    if place + 1 < len(siblings) and isinstance(siblings[place + 1], nodes.Text):
        after = re.match(r"\S*", siblings[place + 1])[0]
    before, after = (part if len(part) <= LONGEST else "" for part in (before, after))
    if not before + after:
        return
    span = nodes.inline(classes=["nobreak"])
    parent = math.parent
    # By place: a Text is equal to any other with the same words, so that replace() might find that.
    if after:
        parent[place + 1] = nodes.Text(siblings[place + 1][len(after) :])
    if before:
        parent[place - 1] = nodes.Text(siblings[place - 1][: -len(before)])
    parent[place] = span
    span += [part for part in (nodes.Text(before), math, nodes.Text(after)) if part is math or part]


def setup(app):
    app.add_post_transform(KeepTogether)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
