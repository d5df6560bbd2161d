"""Ctrl-C and transactions: it waits until one has ended.

Raised in the middle of one, KeyboardInterrupt can leave a connection behind that still holds the lock of the file, or
turn into another error inside the driver: whoever then wants to write what was found so far waits for itself.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import types
from collections.abc import Iterator


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Holds Ctrl-C back until the block ends, and hands it to the handler that was there."""
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield  # no other thread is interrupted, and nothing is where no handler of Python's was set
        return
    held: list[tuple[int, types.FrameType | None]] = []
    signal.signal(signal.SIGINT, lambda number, frame: held.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if held:
            handler(*held[-1])
