"""The tables of a benchmark, and the run folder that they are written to."""

import importlib.metadata
import os
import pathlib
import platform
from collections.abc import Sequence
from typing import Any

import jax
from rich.console import Console

from benchmarks.timing import EXTRA, Comparison, ratio
from jaxrlhf.training.report import Table, as_markdown, rich_table, write_report
from jaxrlhf.training.run_folder import RunFolder

PACKAGES = ("jax", "jaxlib", "flax", "optax", "torch", "transformers", "trl", "google-tunix")


def comparison_table(title: str, comparisons: Sequence[Comparison]) -> Table:
    """Returns a row for each other implementation: both medians, and how many times faster ours is."""
    rows = []
    for comparison in comparisons:
        ours, *others = comparison.timings
        for theirs in others:
            speedup = ratio(theirs, ours)
            speedup = f"not installed; {EXTRA}" if speedup is None else str(speedup)
            goal = "" if comparison.goal is None else f">= {comparison.goal:g}"
            milliseconds = [1e3 * timing.median if timing.seconds else None for timing in (ours, theirs)]
            rows.append((comparison.task, theirs.name, *milliseconds, speedup, goal))
    columns = ("task", "compared with", "ours, ms", "theirs, ms", "times faster (quartiles)", "goal")
    return Table(title, columns, rows)


def check_notes(comparisons: Sequence[Comparison]) -> list[str]:
    """Returns a sentence on what was checked before each comparison was timed."""
    return [f"Checked before, {each.task}: {each.agreed}." for each in comparisons if each.agreed]


def machine_info() -> dict[str, Any]:
    """Returns what the timings depend on: processor, cores, load, versions."""
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


def _sentence(machine: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    return (
        f"{machine['processor']}, {machine['cores']} cores, load {machine['load']:g} at the start; {machine['device']}, "
        f"{machine['precision']}; Python {machine['python']}, {versions}."
    )


def write_results(
    config: Any,
    name: str,
    tables: Sequence[Table],
    results: Any,
    machine: dict[str, Any],
    *,
    notes: Sequence[str] = (),
) -> pathlib.Path:
    """Writes `table.md`, `results.json` and `report.html` into a new run folder, and prints the tables.

    Args:
        config: of the benchmark; folders are made in its `output`.
        name: of the benchmark's module.
        tables: to show.
        results: everything measured.
        machine: from `machine_info`, called before measuring.
        notes: one sentence each.
    """
    folder = RunFolder(config.output, f"benchmark_{name}")
    command = f"python -m benchmarks.{name}"
    folder.write_json("results.json", {"command": command, "config": config, "machine": machine, "results": results})
    title, summary = f"Benchmark: {name.replace('_', ' ')}", _sentence(machine)
    folder.write_text("table.md", "\n".join([*map(as_markdown, tables), *(f"{note}\n" for note in (summary, *notes))]))
    write_report(folder.path, title=title, summary=summary, tables=tables, figures=[], config=config, notes=notes)
    console = Console(width=None if os.isatty(1) else 200)
    for table in tables:
        console.print(rich_table(table))
    for note in (summary, *notes):
        print(note)
    print(folder.path)
    return folder.path
