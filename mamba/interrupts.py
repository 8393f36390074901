"""Ctrl-C, answered where nothing is lost: between two training steps, or two tokens of a text."""

import contextlib
import signal
import threading

__all__ = ["defer_interrupt"]


@contextlib.contextmanager
def defer_interrupt():
    """Collect the first Ctrl-C in a list; a second one interrupts as usual.

        with defer_interrupt() as interrupts:
            for batch in batches:
                train_step(batch)
                if interrupts:
                    break

    Without it, Python raises KeyboardInterrupt at any place. Half a training step would be lost,
    and inside a callback of JAX the exception would be printed and dropped.

    Yields:
        A list, which is empty until Ctrl-C appends the signal's number to it.
    """
    interrupts = []
    before = signal.getsignal(signal.SIGINT)
    in_main_thread = threading.current_thread() is threading.main_thread()
    # Only the main thread receives signals. Where Ctrl-C is ignored (SIG_IGN), or handled by
    # something that is not Python (None), it stays so.
    if not in_main_thread or before in (signal.SIG_IGN, None):
        yield interrupts
        return

    def collect(number, frame):
        signal.signal(signal.SIGINT, before)
        interrupts.append(number)

    signal.signal(signal.SIGINT, collect)
    try:
        yield interrupts
    finally:
        signal.signal(signal.SIGINT, before)
