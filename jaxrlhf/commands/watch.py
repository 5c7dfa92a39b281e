"""`jaxrlhf watch RUN`: a run's metrics and curves in the terminal, while it goes on or afterwards."""

import contextlib
import dataclasses
import pathlib
import time
from typing import Annotated

import tyro
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from jaxrlhf.training.progress import duration_text
from jaxrlhf.training.report import rich_table
from jaxrlhf.training.series import read_rows, series_of, table_of

PAUSE = 1.0
"""Seconds between two looks at the file."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Watch:
    """Shows a run's metrics and their curves in the terminal, as they are written; Ctrl-C ends it.

    Reads `metrics.jsonl` in the folder of any run: sft, reward, align, or an experiment. It writes nothing.
    """

    run: Annotated[pathlib.Path, tyro.conf.Positional]
    """Folder of the run."""
    once: bool = False
    """Prints the metrics as they are, and ends."""


def main(config: Watch) -> None:
    """Prints a snapshot, or updates it until Ctrl-C.

    Raises:
        ValueError: there is no such folder, or its metrics are damaged.
    """
    if not config.run.is_dir():
        raise ValueError(f"There is no folder {config.run}; give the folder of a run, such as runs/mine.")
    console = Console()
    if config.once or not console.is_interactive:
        console.print(snapshot(config.run))
        return
    with (
        contextlib.suppress(KeyboardInterrupt),
        Live(snapshot(config.run), console=console, auto_refresh=False) as live,
    ):
        while True:
            time.sleep(PAUSE)
            live.update(snapshot(config.run), refresh=True)


def snapshot(run: pathlib.Path) -> Group:
    """Returns what is known of a run: a table with a curve for each metric, and what has no curve."""
    path = run / "metrics.jsonl"
    rows = read_rows(path)
    if not rows:
        return Group(Text(f"{run} has no metrics yet."))
    series, others = series_of(rows)
    parts = [rich_table(table_of(series, str(run)))] if series else []
    age = duration_text(time.time() - path.stat().st_mtime)
    count = "1 row" if len(rows) == 1 else f"{len(rows):,} rows"
    notes = [Text(f"{count}, the last was written {age} ago.")]
    if others:
        notes.append(Text(f"No numbers, and not shown: {', '.join(others)}."))
    return Group(*parts, *notes)
