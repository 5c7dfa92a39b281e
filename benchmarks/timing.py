"""Times two or more implementations of one computation side by side: in one process, in turn, equally often.

An implementation is a name and a call that blocks until its result is ready. The first call of each, which compiles, is
timed apart; then all are called in rotation, so that any other load on the machine affects them alike. Reported are the
ratio of the medians and the quartiles of the ratios within single rounds.
"""

import gc
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

EXTRA = "pip install '.[benchmarks]'"


class Implementation(NamedTuple):
    """One way to compute something.

    Attributes:
        name: of the library or method.
        call: computes it once and blocks until the result is ready; None where a package that it needs is missing.
    """

    name: str
    call: Callable[[], Any] | None


class WarmUp(NamedTuple):
    """Seconds of the first call, compilation included, and the results of the first calls."""

    seconds: float
    results: list[Any]


class Timing(NamedTuple):
    """Seconds of the first call, compilation included, and of every later call; no later ones if it is not installed."""

    name: str
    first: float
    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median seconds a call."""
        return statistics.median(self.seconds)


class Ratio(NamedTuple):
    """The ratio of the medians, and the lower and upper quartile of the ratios within single rounds."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


class Comparison(NamedTuple):
    """The timings of one task.

    Attributes:
        task: what was timed, shapes included.
        timings: ours first.
        agreed: what was checked to be equal beforehand.
        goal: how many times faster than each other implementation ours should be; None for no goal.
    """

    task: str
    timings: tuple[Timing, ...]
    agreed: str = ""
    goal: float | None = None


def if_installed(name: str, make: Callable[[], Callable[[], Any]]) -> Implementation:
    """Returns the implementation whose call `make` returns; one without a call if `make` raises ImportError."""
    try:
        return Implementation(name, make())
    except ImportError as error:
        print(f"{name}: {error.name or error} is not installed; {EXTRA}")
        return Implementation(name, None)


def stateful(step: Callable[[Any], tuple[Any, Any]], state: Any) -> Callable[[], Any]:
    """Returns a call that takes one step from the last call's state, so that `step` may donate its state.

    Args:
        step: `(state) -> (state, info)`.
        state: the initial one.

    Returns:
        `() -> info`.
    """
    current = [state]

    def call():
        current[0], info = step(current[0])
        return jax.block_until_ready((current[0], info))[1]

    return call


def warm_up(implementations: Sequence[Implementation], *, calls: int = 2) -> list[WarmUp]:
    """Returns the results of the first calls of each, to compare before anything is timed."""
    warm_ups = []
    for implementation in implementations:
        if implementation.call is None:
            warm_ups.append(WarmUp(float("nan"), []))
            continue
        start = time.perf_counter()
        results = [implementation.call()]
        seconds = time.perf_counter() - start
        warm_ups.append(WarmUp(seconds, results + [implementation.call() for _ in range(calls - 1)]))
    return warm_ups


def interleave(
    implementations: Sequence[Implementation],
    *,
    rounds: int,
    warm_ups: Sequence[WarmUp] | None = None,
    pause: float = 0.02,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[Timing, ...]:
    """Returns the timings of all implementations, called in rotation.

    Args:
        implementations: to be timed.
        rounds: calls of each.
        warm_ups: from `warm_up`, which is run here if it is None.
        pause: seconds between calls, in which the threads of one library stop spinning before the next one starts.
        clock: returns seconds, such as `cpu_seconds` where other processes use the machine.
    """
    warm_ups = warm_up(implementations) if warm_ups is None else warm_ups
    times: list[list[float]] = [[] for _ in implementations]
    gc.collect()
    for _ in range(rounds):
        for implementation, seconds in zip(implementations, times, strict=True):
            if implementation.call is not None:
                time.sleep(pause)
                start = clock()
                implementation.call()
                seconds.append(clock() - start)
    return tuple(
        Timing(implementation.name, first.seconds, tuple(seconds))
        for implementation, first, seconds in zip(implementations, warm_ups, times, strict=True)
    )


def cpu_seconds() -> float:
    """Returns the CPU seconds of this process so far, of all its threads: what a clock says only on an idle machine."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def ratio(slow: Timing, fast: Timing) -> Ratio | None:
    """Returns how many times longer `slow` takes than `fast`; None where one of them is not installed."""
    if not slow.seconds or not fast.seconds:
        return None
    low, high = np.quantile(np.array(slow.seconds) / np.array(fast.seconds), [0.25, 0.75])
    return Ratio(slow.median / fast.median, float(low), float(high))


def check_close(what: str, ours: Any, theirs: Any, *, tolerance: float) -> str:
    """Returns "`what` to `largest difference`".

    Raises:
        ValueError: they differ by more than the tolerance; the implementations then compute different things, and
            their times cannot be compared.
    """
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    if ours.shape != theirs.shape:
        raise ValueError(f"{what}: ours has the shape {ours.shape}, theirs {theirs.shape}.")
    largest = float(np.max(np.abs(ours - theirs)))
    if not largest <= tolerance:
        raise ValueError(f"{what}: ours and theirs differ by {largest:.2g}, more than {tolerance:g}.")
    return f"{what} to {largest:.1e}"
