"""`jaxrlhf compare RUN RUN...`: a page with runs side by side, the differences of their settings first."""

import collections
import dataclasses
import pathlib
import tempfile
from collections.abc import Sequence
from typing import Annotated

import tyro

from jaxrlhf.training.figures import MOST_LINES, draw_curves
from jaxrlhf.training.paths import check_local
from jaxrlhf.training.report import write_page
from jaxrlhf.training.run_comparison import (
    Run,
    last_values_table,
    panels_of,
    read_run,
    results_table,
    settings_table,
)

PANELS = 12
"""Curves in a figure; each figure has its own legend."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compare:
    """Writes a page with several runs side by side: differences of their settings, curves, and results with intervals.

    Takes the folders of any runs, finished or not. The page is one file without scripts and needs no network.
    """

    runs: Annotated[tuple[pathlib.Path, ...], tyro.conf.Positional] = ()
    """Folders of the runs, two or more."""
    output: pathlib.Path
    """The page, a file whose name ends with .html; one that exists is replaced."""


def main(config: Compare) -> None:
    """Writes the page.

    Raises:
        ValueError: fewer than two runs, a run given twice or without files, or an output that cannot be written.
    """
    check_local(config.output, "--output")
    if config.output.suffix != ".html":
        raise ValueError(f"--output {config.output} must end with .html.")
    if config.output.is_dir():
        raise ValueError(f"--output {config.output} is a folder; give the name of a file.")
    if not config.output.parent.is_dir():
        raise ValueError(f"There is no folder {config.output.parent} for the page; create it.")
    runs = [read_run(path, name) for name, path in named(config.runs).items()]
    write_comparison(config.output, runs)
    print(f"{config.output} compares {len(runs)} runs.")


def named(paths: Sequence[pathlib.Path]) -> dict[str, pathlib.Path]:
    """Returns the folders by their names, or by their paths where names are the same.

    Raises:
        ValueError: there are fewer than two folders or too many, or one is given twice.
    """
    if len(paths) < 2:
        raise ValueError("A comparison needs two runs or more; give their folders.")
    if len(paths) > MOST_LINES:
        raise ValueError(
            f"{len(paths)} runs are given, and curves of more than {MOST_LINES} cannot be told apart; give fewer."
        )
    whole = [path.resolve() for path in paths]
    for path, count in collections.Counter(whole).items():
        if count > 1:
            raise ValueError(f"The run {paths[whole.index(path)]} is given {count} times; give each run once.")
    names = collections.Counter(path.name for path in whole)
    return {path.name if names[path.name] == 1 else str(path): path for path in whole}


def write_comparison(output: pathlib.Path, runs: Sequence[Run]) -> None:
    """Writes the page of runs.

    Args:
        output: the page's path.
        runs: two or more, with different names.
    """
    settings, last, results = settings_table(runs), last_values_table(runs), results_table(runs)
    known = [run for run in runs if run.config is not None]
    notes = [note for run in runs for note in run.notes]
    summary = ", ".join(run.name for run in runs)
    if len(known) > 1 and not settings.rows:
        summary += "\n\nThe settings do not differ."
    panels = list(panels_of(runs).items())
    with tempfile.TemporaryDirectory() as folder:
        figures = []
        for start in range(0, len(panels), PANELS):
            figures.append(pathlib.Path(folder) / f"curves_{start // PANELS + 1}.png")
            draw_curves(figures[-1], dict(panels[start : start + PANELS]))
        write_page(
            output,
            title="Comparison of runs",
            summary=summary,
            tables=[settings] if settings.rows else [],
            figures=figures,
            after_figures=[table for table in (last, results) if table.rows],
            config={run.name: run.config for run in runs},
            notes=notes,
        )
