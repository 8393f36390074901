"""Numbers on pages without a chapter number: figures and exercises are counted from 1 on each.

Sphinx counts them through all such pages, so that the first figure of one is "Fig. 3" when two
stand on pages before it.
"""


def restart(app, env):
    """Count again, in the order of the page, what Sphinx has numbered without a chapter."""
    for kinds in env.toc_fignumbers.values():
        for numbers in kinds.values():
            if all(len(number) == 1 for number in numbers.values()):  # (3,), not (chapter, 3)
                for i, name in enumerate(sorted(numbers, key=numbers.get), 1):
                    numbers[name] = (i,)
    return []  # no page has to be read again


def setup(app):
    app.connect("env-get-updated", restart, priority=900)  # after Sphinx's own count
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
