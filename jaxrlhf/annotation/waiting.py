"""Waiting that ends: one call within a time, and several at once whose results are taken as they come."""

import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any


class StoppedError(Exception):
    """Nobody waits for this answer any more."""


def within(seconds: float, call: Callable[[], Any]) -> Any:
    """Returns what a call returns, or gives it up: a name's look-up and a byte a minute have no timeout of their own.

    Raises:
        TimeoutError: the seconds are over; the call is left to itself.
        BaseException: whatever the call raises.
    """
    box: queue.SimpleQueue = queue.SimpleQueue()

    def run():
        try:
            box.put((call(), None))
        except BaseException as error:
            box.put((None, error))

    # A daemon: one that hangs for good must not keep the process from its end.
    threading.Thread(target=run, daemon=True).start()
    try:
        value, error = box.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError from None
    if error is not None:
        raise error
    return value


def as_they_come(
    work: Callable[[int, threading.Event], Any], count: int, *, concurrency: int
) -> Iterator[tuple[int, Any]]:
    """Yields `(index, work(index, stopping))` for each index below `count`, as they are done.

    Another index is begun only when what was done before has been taken. After a failure none is begun, but those under
    way are waited for and yielded before it is raised: they are paid for. An interruption by the user is such a failure; a
    second one does not wait.

    Args:
        work: must end by itself; it raises `StoppedError` where the event that it is given ends it.
        count: of indices.
        concurrency: most of them at once.
    """
    stopping, waiting = threading.Event(), iter(range(count))
    failure: BaseException | None = None
    running: dict[Future, int] = {}
    with ThreadPoolExecutor(concurrency) as pool:
        try:
            while True:
                while failure is None and len(running) < concurrency and (index := next(waiting, None)) is not None:
                    running[pool.submit(work, index, stopping)] = index
                if not running:
                    break
                try:
                    done, _ = wait(running, return_when=FIRST_COMPLETED)
                except KeyboardInterrupt as error:
                    if isinstance(failure, KeyboardInterrupt):
                        raise
                    failure = error
                    stopping.set()
                    continue
                for future in done:
                    index, error = running.pop(future), future.exception()
                    if error is None:
                        yield index, future.result()
                    elif not isinstance(error, StoppedError):
                        failure = failure or error
                        stopping.set()
        finally:
            stopping.set()
    if failure is not None:
        raise failure
