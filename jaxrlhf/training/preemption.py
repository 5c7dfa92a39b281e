"""Being asked to stop: SIGTERM and Ctrl-C, for a run of one process."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Stop:
    """Whether a run was asked to stop; see `stopping`.

    Attributes:
        signal: that it was asked by, 0 where none was.
    """

    def __init__(self):
        """Not yet."""
        self._asked, self.signal = threading.Event(), 0

    def ask(self, number: int = 0) -> None:
        """Asks for an end after the step that is under way."""
        self.signal = number
        self._asked.set()

    def __bool__(self) -> bool:
        return self._asked.is_set()


@contextmanager
def stopping() -> Iterator[Stop]:
    """Yields what says whether to stop: SIGTERM asks for it, and so does a first Ctrl-C; a second one interrupts at once.

    Handlers can be set from the main thread only; elsewhere, in a notebook's worker, nothing asks.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def asked(number: int, frame: Any) -> None:
        del frame
        stop.ask(number)
        signal.signal(number, before[number])

    before: dict[int, Any] = {number: signal.signal(number, asked) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
