"""A call with a timeout, and several concurrent calls whose results are yielded as they complete."""

import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any


class CancelledError(Exception):
    """The result is no longer needed."""


def call_with_timeout(seconds: float, call: Callable[[], Any]) -> Any:
    """Returns what `call` returns; abandons it after `seconds`.

    Covers what socket timeouts do not: DNS look-ups, and replies that trickle in a byte at a time.

    Raises:
        TimeoutError: the time is up; the call keeps running in a daemon thread and its result is lost.
        BaseException: whatever the call raises.
    """
    results: queue.SimpleQueue = queue.SimpleQueue()

    def run():
        try:
            results.put((call(), None))
        except BaseException as error:
            results.put((None, error))

    # A daemon thread: a call that hangs forever must not keep the process alive.
    threading.Thread(target=run, daemon=True).start()
    try:
        value, error = results.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError from None
    if error is not None:
        raise error
    return value


def run_concurrently(
    work: Callable[[int, threading.Event], Any], count: int, *, concurrency: int
) -> Iterator[tuple[int, Any]]:
    """Yields `(index, work(index, stopping))` for every index below `count`, in order of completion.

    A new index starts only after the caller has consumed the results so far. After a failure nothing new starts; calls
    in flight, which are already paid for, are awaited and yielded before the exception is raised. A KeyboardInterrupt
    counts as a failure; a second one does not wait.

    Args:
        work: must terminate by itself; raises `CancelledError` when it stops because the event was set.
        count: number of indices.
        concurrency: largest number of calls in flight.
    """
    stopping, indices = threading.Event(), iter(range(count))
    failure: BaseException | None = None
    running: dict[Future, int] = {}
    with ThreadPoolExecutor(concurrency) as pool:
        try:
            while True:
                while failure is None and len(running) < concurrency and (index := next(indices, None)) is not None:
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
                    elif not isinstance(error, CancelledError):
                        failure = failure or error
                        stopping.set()
        finally:
            stopping.set()
    if failure is not None:
        raise failure
