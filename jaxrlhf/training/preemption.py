"""Being asked to stop: SIGTERM, Ctrl-C, and the notice that a preemptible machine gets."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
from jax.experimental import multihost_utils


class Stop:
    """Whether a run was asked to stop; see `stopping`."""

    def __init__(self):
        """Not yet."""
        self._asked = threading.Event()

    def ask(self) -> None:
        """Asks for an end after the step that is under way."""
        self._asked.set()

    def at(self, step: int) -> bool:
        """Returns whether the run ends here. With several processes all say the same at the same step.

        To be called by every process once a step, with the step's number.
        """
        if jax.process_count() == 1:
            return self._asked.is_set()
        # JAX's coordinator hears of the SIGTERM of any process, and names one step for all.
        return multihost_utils.reached_preemption_sync_point(step)


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
        stop.ask()
        signal.signal(number, before[number])

    # With several processes SIGTERM is JAX's own: it tells the others.
    numbers = [signal.SIGINT] if jax.process_count() > 1 else [signal.SIGINT, signal.SIGTERM]
    before: dict[int, Any] = {number: signal.signal(number, asked) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
