"""Show the module's own source on a page, so that the code in the book is the code that runs."""

import inspect

from IPython.display import display


def show_source(*objects):
    """Display the source of functions, classes or methods, as it stands in the file now.

    Each object becomes one output: the name of its file, then its highlighted source. Jitted and
    custom_vjp functions are unwrapped. The plain-text form of the output names the object, and
    ``tests/book/test_source.py`` reads there which names a chapter has shown.

    Raises TypeError for an object that no file defines (a built-in, a value).
    """
    for obj in objects:
        obj = inspect.unwrap(getattr(obj, "__func__", obj))  # a bound method has its function there
        source = inspect.getsource(obj).rstrip()
        path = obj.__module__.replace(".", "/") + ".py"
        bundle = {
            "text/markdown": f"`{path}`\n\n```python\n{source}\n```",
            "text/plain": f"source of {obj.__module__}.{obj.__qualname__}",
        }
        display(bundle, raw=True)
