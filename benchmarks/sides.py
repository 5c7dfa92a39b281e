"""Two or more ways to do one thing, timed side by side: in one process, in turn, as often each.

A side is a name and a call that blocks until its work is done. Of every side the first call, which compiles, is apart;
then all are called in turn, so that whatever else the machine does meets them alike. What is reported is the ratio of
the medians, with the quartiles of the ratios of single rounds.
"""

import gc
import importlib.metadata
import math
import os
import pathlib
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from rich.console import Console

from jaxrlhf.training.report import Table, as_markdown, rich_table, write_report
from jaxrlhf.training.run_folder import RunFolder
from jaxrlhf.training.step import data_mesh, place, replicate, split_by_batch, within

EXTRA = "pip install '.[benchmarks]'"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "torch", "transformers", "trl", "google-tunix")


class Side(NamedTuple):
    """One way to do it.

    Attributes:
        name: whose.
        call: does it once, and returns when the result is there; None where what it needs is not installed.
    """

    name: str
    call: Callable[[], Any] | None


class Warmed(NamedTuple):
    """Seconds of a side's first call, compilation included, and what its first calls returned."""

    first: float
    results: list[Any]


class Timed(NamedTuple):
    """Seconds of one side: of its first call, compilation included, and of every later one; none where it is missing."""

    name: str
    first: float
    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Seconds of the median call."""
        return statistics.median(self.seconds)


class Ratio(NamedTuple):
    """Of the medians, and the lower and upper quartile of the ratios of single rounds."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


class Compared(NamedTuple):
    """One line of a table: what was timed, by whom, what had to agree before, and what is hoped for.

    Attributes:
        what: was timed, shapes included.
        sides: ours first.
        agreed: what was seen to be equal before.
        goal: how many times faster ours should be than each other side; None for none.
    """

    what: str
    sides: tuple[Timed, ...]
    agreed: str = ""
    goal: float | None = None


def side(name: str, make: Callable[[], Callable[[], Any]]) -> Side:
    """Returns the side whose call `make` returns; one without a call where `make` needs what is not installed."""
    try:
        return Side(name, make())
    except ImportError as error:
        print(f"{name}: {error.name or error} is not installed; {EXTRA}")
        return Side(name, None)


def stepping(step: Callable[[Any], tuple[Any, Any]], state: Any) -> Callable[[], Any]:
    """Returns a call that goes one step on from where the last one ended, so that a step may donate its state.

    Args:
        step: `(state) -> (state, report)`.
        state: the first.
    """
    held = [state]

    def call():
        held[0], report = step(held[0])
        return jax.block_until_ready((held[0], report))[1]

    return call


def blocking(function: Callable, *arguments: Any) -> Callable[[], Any]:
    """Returns a call of a function of JAX's that waits for its result."""
    return lambda: jax.block_until_ready(function(*arguments))


def warm_up(sides: Sequence[Side], *, calls: int = 2) -> list[Warmed]:
    """Returns what the first calls of each side gave: to be compared, before anything is timed."""
    found = []
    for side in sides:
        if side.call is None:
            found.append(Warmed(float("nan"), []))
            continue
        began = time.perf_counter()
        results = [side.call()]
        found.append(Warmed(time.perf_counter() - began, results + [side.call() for _ in range(calls - 1)]))
    return found


def alternate(
    sides: Sequence[Side], *, rounds: int, warmed: Sequence[Warmed] | None = None, rest: float = 0.02
) -> tuple[Timed, ...]:
    """Returns the times of all sides, called in turn.

    Args:
        sides: to be timed.
        rounds: calls of each.
        warmed: of `warm_up`; it is done here if it was not before.
        rest: seconds between calls, in which the threads of one library stop waiting for more work before the next
            begins.
    """
    warmed = warm_up(sides) if warmed is None else warmed
    found: list[list[float]] = [[] for _ in sides]
    gc.collect()
    for _ in range(rounds):
        for side, seconds in zip(sides, found, strict=True):
            if side.call is not None:
                time.sleep(rest)
                began = time.perf_counter()
                side.call()
                seconds.append(time.perf_counter() - began)
    return tuple(
        Timed(side.name, before.first, tuple(seconds))
        for side, before, seconds in zip(sides, warmed, found, strict=True)
    )


def ratio(above: Timed, below: Timed) -> Ratio | None:
    """Returns how many times longer one side takes than another; None where one is missing."""
    if not above.seconds or not below.seconds:
        return None
    low, high = np.quantile(np.array(above.seconds) / np.array(below.seconds), [0.25, 0.75])
    return Ratio(above.median / below.median, float(low), float(high))


def agree(what: str, ours: Any, theirs: Any, *, tolerance: float) -> str:
    """Returns what was found equal, as a phrase.

    Raises:
        ValueError: it is not; then the sides do not do the same, and their times say nothing.
    """
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    if ours.shape != theirs.shape:
        raise ValueError(f"{what}: ours has the shape {ours.shape}, theirs {theirs.shape}.")
    largest = float(np.max(np.abs(ours - theirs)))
    if not largest <= tolerance:
        raise ValueError(f"{what}: ours and theirs differ by {largest:.2g}, more than {tolerance:g}.")
    return f"{what} to {largest:.1e}"


def table_of(title: str, compared: Sequence[Compared]) -> Table:
    """Returns a line for each other side: the medians of both, and how many times faster ours is."""
    rows = []
    for line in compared:
        ours, *others = line.sides
        for theirs in others:
            faster = ratio(theirs, ours)
            shown = f"not installed; {EXTRA}" if faster is None else str(faster)
            goal = "" if line.goal is None else f">= {line.goal:g}"
            milliseconds = [1e3 * each.median if each.seconds else None for each in (ours, theirs)]
            rows.append((line.what, theirs.name, *milliseconds, shown, goal))
    columns = ("what", "peer", "ours, ms", "peer, ms", "times faster (quartiles)", "goal")
    return Table(title, columns, rows)


def checks(compared: Sequence[Compared]) -> list[str]:
    """Returns what was seen to agree before each line was timed."""
    return [f"Checked before, {line.what}: {line.agreed}." for line in compared if line.agreed]


def use_all_cores(*, devices: bool = False) -> None:
    """Gives torch, where it is installed, a thread a core, and JAX, if asked to, a device a core, to split rows over.

    Those who use one device alone have the threads of all cores with it. `JAX_NUM_CPU_DEVICES=1` makes ours one of them.
    """
    cores = len(os.sched_getaffinity(0))
    if devices and "JAX_NUM_CPU_DEVICES" not in os.environ:
        jax.config.update("jax_num_cpu_devices", cores)
    try:
        import torch
    except ImportError:
        return
    torch.set_num_threads(cores)


def devices_of(rows: int) -> Mesh:
    """Returns the mesh of as many devices as so many rows divide over: what `jaxrlhf` splits a batch over by itself."""
    return data_mesh(jax.devices()[: math.gcd(rows, jax.device_count())])


def by_rows(function: Callable[..., Any], params: Any, *rows: Any) -> Callable[[], Any]:
    """Returns the call of a compiled `(params, *arrays [N, ...]) -> arrays [N, ...]`, its rows split over `devices_of`."""
    mesh = devices_of(len(rows[0]))
    split, params = split_by_batch(mesh), replicate(params, mesh)
    compiled, rows = jax.jit(within(mesh, function), out_shardings=split), place(rows, split)
    return lambda: jax.block_until_ready(compiled(params, *rows))


def machine() -> dict[str, Any]:
    """Returns what the figures depend on: processor, cores, load, versions."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "precision": "float32",
        "load": round(os.getloadavg()[0], 2),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "versions": versions,
    }


def _processor() -> str:
    path = pathlib.Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def described(machine: dict[str, Any]) -> str:
    """Returns the machine in a sentence."""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    return (
        f"{machine['processor']}, {machine['cores']} cores, load {machine['load']:g} at the start; {machine['device']}, "
        f"{machine['precision']}; Python {machine['python']}, {versions}."
    )


def report(
    config: Any,
    name: str,
    tables: Sequence[Table],
    found: Any,
    machine: dict[str, Any],
    *,
    notes: Sequence[str] = (),
) -> pathlib.Path:
    """Writes `table.md`, `results.json` and `report.html` into a new run folder, and prints the tables.

    Args:
        config: the benchmark's; its `output` is where folders are made.
        name: of the benchmark.
        tables: what to show.
        found: everything measured.
        machine: of `machine`, from before the measuring.
        notes: a sentence each.
    """
    folder = RunFolder(config.output, f"benchmark_{name}")
    command = f"python -m benchmarks.{name}"
    folder.write_json("results.json", {"command": command, "config": config, "machine": machine, "found": found})
    told = "\n".join(f"{note}\n" for note in (described(machine), *notes))
    folder.write_text("table.md", "\n".join([*map(as_markdown, tables), told]))
    title, summary = f"Benchmark: {name.replace('_', ' ')}", described(machine)
    write_report(folder.path, title=title, summary=summary, tables=tables, figures=[], config=config, notes=notes)
    console = Console(width=None if os.isatty(1) else 200)
    for table in tables:
        console.print(rich_table(table))
    for note in (summary, *notes):
        print(note)
    print(folder.path)
    return folder.path
