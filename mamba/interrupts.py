"""Ctrl-C where it can be answered: between two steps of a training, two tokens of a text."""

import contextlib
import signal
import threading


@contextlib.contextmanager
def _ctrl_c():
    """A list that Ctrl-C puts something into; the second time, it interrupts as usual.

    Python raises KeyboardInterrupt wherever it happens to be. Half a step would be lost, and inside
    a callback of JAX it would be printed and forgotten.
    """
    noted = []
    before = signal.getsignal(signal.SIGINT)
    in_main_thread = threading.current_thread() is threading.main_thread()
    # Signals reach the main thread only. Where Ctrl-C is ignored (SIG_IGN), or handled by something
    # that is not Python (None), it is not ours to handle.
    if not in_main_thread or before in (signal.SIG_IGN, None):
        yield noted
        return

    def note(number, frame):
        signal.signal(signal.SIGINT, before)
        noted.append(number)

    signal.signal(signal.SIGINT, note)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, before)
