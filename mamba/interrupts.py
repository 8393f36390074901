"""Ctrl-C and SIGTERM, answered where nothing is lost: between two training steps, or two tokens."""

import contextlib
import signal
import threading

__all__ = ["Terminated", "defer_interrupt"]


class Terminated(KeyboardInterrupt):
    """SIGTERM, which systems send to end a process: it ends what Ctrl-C ends."""


EXCEPTIONS = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: Terminated}


@contextlib.contextmanager
def defer_interrupt():
    """Collect the first Ctrl-C or SIGTERM in a list; a second one acts as usual.

        with defer_interrupt() as interrupts:
            for batch in batches:
                train_step(batch)
                if interrupts:
                    raise interrupts[0]

    Without it, Python raises KeyboardInterrupt at any place, and SIGTERM ends the process. Half a
    training step would be lost, and inside a callback of JAX the exception would be printed and
    dropped.

    Yields:
        A list, which is empty until a signal appends its exception to it: KeyboardInterrupt, or
        Terminated for SIGTERM.
    """
    interrupts = []
    before = {number: signal.getsignal(number) for number in EXCEPTIONS}
    # Only the main thread receives signals. Where one is ignored (SIG_IGN), or handled by
    # something that is not Python (None), it stays so.
    if threading.current_thread() is not threading.main_thread():
        before = {}
    before = {n: handler for n, handler in before.items() if handler not in (signal.SIG_IGN, None)}

    def restore():
        for number, handler in before.items():
            signal.signal(number, handler)

    def collect(number, frame):
        restore()
        interrupts.append(EXCEPTIONS[number]())

    for number in before:
        signal.signal(number, collect)
    try:
        yield interrupts
    finally:
        restore()
