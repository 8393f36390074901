"""Count the programs that JAX compiles, by the events that it reports."""

import contextlib

import jax.monitoring

COMPILED = "/jax/core/compile/backend_compile_duration"  # reported once per program

_lists = []  # one for each block that is counting


def _note(event, seconds, fun_name="", **_):
    if event == COMPILED:
        for names in _lists:
            names.append(fun_name)


jax.monitoring.register_event_duration_secs_listener(_note)


@contextlib.contextmanager
def count_compilations():
    """A list that gets an entry, the function's name, for each program compiled in the block."""
    names = []
    _lists.append(names)
    try:
        yield names
    finally:
        _lists.remove(names)
