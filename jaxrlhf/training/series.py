"""The curves of a run, read from its metrics.jsonl while it is written: any kind of run, one line of JSON a row."""

import collections
import itertools
import json
import math
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from jaxrlhf.training.progress import number_text
from jaxrlhf.training.report import Table

BLOCKS = "▁▂▃▄▅▆▇█"
GAP = " "
WIDTH = 32


class Series(NamedTuple):
    """The values of one metric, in the order of their rows.

    Attributes:
        label: the texts of its rows, such as the method of a study; empty if they have none.
        name: of the metric.
        steps: the row's step, or its number from 1 where rows have none.
        values: as many, finite or not; None is NaN.
    """

    label: str
    name: str
    steps: list[int]
    values: list[float]


def read_rows(path: pathlib.Path) -> list[dict[str, Any]]:
    """Returns the rows of a metrics file; none if there is no file yet. A last line without its end is still written.

    Raises:
        ValueError: another line is no JSON object; the message names it.
    """
    content = path.read_bytes() if path.is_file() else b""
    rows = []
    for number, line in enumerate(content.split(b"\n")[:-1], 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number} is no row of metrics; mend it, or remove the line.")
        rows.append(row)
    return rows


def series_of(rows: Iterable[dict[str, Any]]) -> tuple[list[Series], list[str]]:
    """Returns a series for each metric and each combination of texts, and the names whose values are no numbers.

    Steps and evaluations may both have a metric, such as `kl`. Rows that begin with different metrics are told apart: then
    its name says which one it stands with, as in `kl (with win_rate)`.
    """
    found: dict[tuple[str, str, str], Series] = {}
    others: dict[str, None] = {}
    for number, row in enumerate(rows, 1):
        label = ", ".join(value for value in row.values() if isinstance(value, str))
        step = row["step"] if type(row.get("step")) is int else number
        metrics = {name: value for name, value in row.items() if name != "step" and not isinstance(value, str)}
        first = next(iter(metrics), "")
        for name, value in metrics.items():
            if isinstance(value, bool) or not (value is None or isinstance(value, int | float)):
                others[name] = None
                continue
            series = found.setdefault((label, name, first), Series(label, name, [], []))
            series.steps.append(step)
            series.values.append(math.nan if value is None else float(value))
    # A metric that never has a number, such as one that is null throughout, has no curve.
    shown = {key: series for key, series in found.items() if any(map(math.isfinite, series.values))}
    others |= {name: None for (_, name, _) in found.keys() - shown.keys()}
    names = {name for _, name, _ in shown}
    kinds = collections.Counter((label, name) for label, name, _ in shown)
    series = [
        each if kinds[label, name] == 1 or name == first else each._replace(name=f"{name} (with {first})")
        for (label, name, first), each in shown.items()
    ]
    return series, sorted(others.keys() - names)


def block_curve(values: Sequence[float], width: int = WIDTH) -> str:
    """Returns values as at most `width` blocks from lowest to highest, each a mean; a gap where none is finite."""
    count = min(width, len(values))
    edges = [len(values) * index // count for index in range(count + 1)] if count else [0]
    means = []
    for start, stop in itertools.pairwise(edges):
        finite = [value for value in values[start:stop] if math.isfinite(value)]
        means.append(sum(value / len(finite) for value in finite) if finite else math.nan)
    levels = [mean for mean in means if math.isfinite(mean)]
    if not levels:
        return GAP * count
    # Halves, whose difference is finite.
    low, span = min(levels) / 2, max(levels) / 2 - min(levels) / 2

    def block(mean: float) -> str:
        if not math.isfinite(mean):
            return GAP
        return BLOCKS[min(len(BLOCKS) - 1, int(len(BLOCKS) * ((mean / 2 - low) / span))) if span else len(BLOCKS) // 2]

    return "".join(map(block, means))


def table_of(series: Sequence[Series], title: str) -> Table:
    """Returns a table with the last, lowest and highest value of each series, and its curve."""
    labelled = any(each.label for each in series)
    rows = []
    for each in series:
        finite = [value for value in each.values if math.isfinite(value)]
        numbers = [number_text(value) for value in (each.values[-1], min(finite), max(finite))]
        label = [each.label] if labelled else []
        rows.append([*label, each.name, str(each.steps[-1]), *numbers, block_curve(each.values)])
    columns = [*(["of"] if labelled else []), "metric", "step", "last", "lowest", "highest", "curve"]
    return Table(title, columns, rows)
