"""Runs side by side: differences of their settings, their curves, and their last values and results with intervals."""

import json
import math
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from jaxrlhf.training.progress import number_text
from jaxrlhf.training.report import Table
from jaxrlhf.training.series import Series, read_rows, series_of

HALF = "_half_interval"
"""Ends the name of the half-width of a 95% interval."""
LARGEST = 1e300
"""Values beyond it leave a gap in a curve, as differences between them overflow when axes are laid out."""

Panel = tuple[str, str, dict[str, tuple[list, ...]]]
"""A panel of `figures.draw_curves`."""


class Run(NamedTuple):
    """What the folder of a run holds.

    Attributes:
        name: of the run on the page.
        config: its settings; None if they are unknown.
        series: its metrics by title; those of evaluations, whose rows have intervals, begin with "held out: ".
        results: its results by name; lists are left out.
        notes: a sentence for each thing that it lacks.
    """

    name: str
    config: dict[str, Any] | None
    series: dict[str, Series]
    results: dict[str, Any]
    notes: list[str]


def read_run(path: pathlib.Path, name: str) -> Run:
    """Returns a run, which may still be going on.

    Raises:
        ValueError: there is no such folder, it holds no run, or a file in it is damaged.
    """
    if not path.is_dir():
        raise ValueError(f"There is no folder {path}; give the folders of runs, such as runs/mine.")
    rows, config, results = read_rows(path / "metrics.jsonl"), _read_json(path, "config"), _read_json(path, "results")
    if not rows and config is None and results is None:
        raise ValueError(f"{path} holds no run: config.json, metrics.jsonl and results.json are missing.")
    notes = [] if rows else [f"{name} has no metrics yet."]
    if results is None:
        notes.append(f"{name} has no results.json: it goes on, or was stopped.")
    inner = (results or {}).get("config")
    if isinstance(inner, dict):
        config = inner if config is None else config
        results = {key: value for key, value in (results or {}).items() if key != "config"}
    if config is None:
        notes.append(f"{name} has no config.json; its settings are not compared.")
    flat, lists = dict(_flat(results or {})), []
    for key in [key for key, value in flat.items() if isinstance(value, list)]:
        lists.append(key)
        del flat[key]
    if lists:
        notes.append(f"Not shown of {name}'s results.json, as they are lists: {', '.join(lists)}.")
    series, others = _series_by_title(rows)
    if others:
        notes.append(f"Not shown of {name}'s metrics, as they are no numbers: {', '.join(others)}.")
    return Run(name, config, series, flat, notes)


def settings_table(runs: Sequence[Run]) -> Table:
    """Returns the settings that differ, a column per run; a cell is empty where a run lacks the setting."""
    flat = [None if run.config is None else dict(_flat(run.config)) for run in runs]
    rows = []
    for key in dict.fromkeys(key for settings in flat for key in settings or ()):
        known = [settings for settings in flat if settings is not None]
        exact = [None if settings is None or key not in settings else json.dumps(settings[key]) for settings in flat]
        if len({json.dumps(settings[key]) if key in settings else None for settings in known}) == 1:
            continue
        texts = [None if each is None else _setting_text(json.loads(each)) for each in exact]
        # Where a text and a number look alike, quotes tell them apart.
        rows.append([key, *(texts if len(set(texts)) == len(set(exact)) else exact)])
    return Table("Settings that differ", ["setting", *(run.name for run in runs)], rows)


def last_values_table(runs: Sequence[Run]) -> Table:
    """Returns the last value of each metric that is shown as a curve, with its interval and its step."""

    def cell(series: Series, half: Series | None) -> str:
        text = _with_half(series.values[-1], half.values[-1] if half else None)
        return f"{text} (step {series.steps[-1]:,})"

    return _table("Last values of the metrics", runs, lambda run: run.series, cell)


def results_table(runs: Sequence[Run]) -> Table:
    """Returns the numbers and texts of the runs' results.json, with their intervals."""
    return _table("Results", runs, lambda run: run.results, _with_half)


def panels_of(runs: Sequence[Run]) -> dict[str, Panel]:
    """Returns a panel per metric, with a line for each run and a band where it has an interval.

    A run without a metric has an empty line in its panel, so that each run has one colour in all of them.
    """
    panels = {}
    for title in _titles([run.series for run in runs]):
        lines = {run.name: _line(run.series.get(title), run.series.get(title + HALF)) for run in runs}
        panels[title] = ("step", "", lines)
    return panels


def _line(series: Series | None, half: Series | None) -> tuple[list, ...]:
    if series is None:
        return [], []
    ys = [_drawable(value) for value in series.values]
    if half is None or half.steps != series.steps:
        return series.steps, ys
    widths = [_drawable(value) for value in half.values]
    lower = [y - width for y, width in zip(ys, widths, strict=True)]
    return series.steps, ys, lower, [y + width for y, width in zip(ys, widths, strict=True)]


def _series_by_title(rows: list[dict[str, Any]]) -> tuple[dict[str, Series], list[str]]:
    """Returns the series of a run by titles that are the same for runs of any method, and names without numbers."""
    evaluations = [any(key.endswith(HALF) for key in row) for row in rows]
    found: dict[str, Series] = {}
    others: dict[str, None] = {}
    for held_out in (True, False):
        # Rows without a step are numbered before they are told apart.
        kept = [
            {"step": number} | row
            for number, (row, each) in enumerate(zip(rows, evaluations, strict=True), 1)
            if each == held_out
        ]
        series, names = series_of(kept)
        others |= dict.fromkeys(names)
        for each in series:
            name, half = (each.name.removesuffix(HALF), HALF) if each.name.endswith(HALF) else (each.name, "")
            label = f" ({each.label})" if each.label else ""
            found[f"{'held out: ' if held_out else ''}{name}{label}{half}"] = each
    return found, list(others)


def _table(
    title: str, runs: Sequence[Run], values_of: Callable[[Run], dict[str, Any]], cell: Callable[[Any, Any], str]
) -> Table:
    columns = [values_of(run) for run in runs]
    rows = [
        [name, *(cell(values[name], _half_of(values, name)) if name in values else None for values in columns)]
        for name in _titles(columns)
    ]
    return Table(title, ["", *(run.name for run in runs)], rows)


def _titles(columns: Sequence[dict[str, Any]]) -> list[str]:
    """Returns the names of all columns without the intervals of others among them."""
    names = dict.fromkeys(name for values in columns for name in values)
    ends = {base + end for base in names for end in (HALF, "_low", "_high")}
    pairs = {name for name in names if name.endswith(("_low", "_high"))}
    lone = {name for name in pairs if {name.rpartition("_")[0] + end for end in ("_low", "_high")} - names.keys()}
    return [name for name in names if name not in ends or name in lone]


def _half_of(values: dict[str, Any], name: str) -> Any:
    """Returns the half-width of a value's interval, or its two ends."""
    if name + HALF in values:
        return values[name + HALF]
    ends = values.get(f"{name}_low"), values.get(f"{name}_high")
    return None if None in ends else ends


def _with_half(value: Any, half: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    text = number_text(value)
    if isinstance(half, tuple):
        return f"{text} ({' to '.join(map(number_text, half))})"
    return f"{text} ± {number_text(half)}" if isinstance(half, int | float) and math.isfinite(half) else text


def _flat(values: dict[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", value


def _setting_text(value: Any) -> str:
    if value is None:
        return "none"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _drawable(value: float) -> float:
    return value if abs(value) < LARGEST else math.nan


def _read_json(folder: pathlib.Path, name: str) -> dict[str, Any] | None:
    path = folder / f"{name}.json"
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise ValueError(f"{path} is no JSON object; mend it, or move it away.")
    return value
