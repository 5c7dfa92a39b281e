"""Stop requests by SIGTERM and Ctrl-C, for a run of one process."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Stop:
    """Whether a run was asked to stop; see `stopping`.

    Attributes:
        signal: the signal that asked, 0 if none did.
    """

    def __init__(self):
        """Not asked yet."""
        self._asked, self.signal = threading.Event(), 0

    def ask(self, number: int = 0) -> None:
        """Asks the run to stop after the current step."""
        self.signal = number
        self._asked.set()

    def __bool__(self) -> bool:
        return self._asked.is_set()


class AskedToStopError(Exception):
    """Raised within a step by what waits for something else than the machine, once the run was asked to stop."""


@contextmanager
def stopping() -> Iterator[Stop]:
    """Yields a `Stop` that SIGTERM or a first Ctrl-C sets; a second Ctrl-C interrupts at once.

    Handlers can be set from the main thread only; in other threads (a notebook's worker) nothing sets it.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(number: int, frame: Any) -> None:
        del frame
        stop.ask(number)
        signal.signal(number, previous[number])

    previous: dict[int, Any] = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
