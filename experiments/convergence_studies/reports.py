"""The output of every study: a JSON file, a table in Markdown and a figure; and a progress line."""

import json
import pathlib
import time
from typing import Any

from matplotlib.figure import Figure

from jaxrlhf.training.figures import COLOURS
from jaxrlhf.training.run_folder import plain


class Progress:
    """Prints `study done/total`, the time elapsed and an estimate of the time left, after each task."""

    def __init__(self, study: str, total: int):
        self.study, self.total, self.done, self.began = study, total, 0, time.monotonic()

    def __call__(self, name: str) -> None:
        """Marks one more task as done."""
        self.done += 1
        elapsed = time.monotonic() - self.began
        left = elapsed / self.done * (self.total - self.done)
        print(f"{self.study} {self.done}/{self.total}  {name}  {elapsed:.0f} s, about {left:.0f} s left", flush=True)


def write(output: pathlib.Path, name: str, values: Any, text: str) -> None:
    """Writes `name.json` and `name.md`."""
    output.mkdir(parents=True, exist_ok=True)
    (output / f"{name}.json").write_text(json.dumps(plain(values), indent=1, allow_nan=False) + "\n")
    (output / f"{name}.md").write_text(text.strip() + "\n")


def table(header: list[str], rows: list[list[Any]]) -> str:
    """Returns a Markdown table; floats are written with four significant digits."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for row in rows:
        cells = [f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(path: pathlib.Path, panels: list[dict[str, Any]], *, columns: int = 2) -> None:
    """Draws panels into one file.

    Each panel has `title`, `x`, `y` (labels), `lines` {name: (xs, ys) or (xs, ys, lower, upper)}, and may have `log` ("x",
    "y", "xy" or ""), `limits` (of y) and `legend` (False omits it). A name has the same colour in every panel.
    """
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.8 * min(columns, len(panels)), 3.5 * rows), layout="constrained")
    names = list(dict.fromkeys(name for panel in panels for name in panel["lines"]))
    colours = dict(zip(names, COLOURS * len(names), strict=False))
    styles = {name: ("-", "--", ":")[index // len(COLOURS) % 3] for index, name in enumerate(names)}
    for number, panel in enumerate(panels):
        axes = figure.add_subplot(rows, min(columns, len(panels)), number + 1)
        for name, (xs, ys, *band) in panel["lines"].items():
            axes.plot(xs, ys, styles[name], label=name, color=colours[name], marker="o", markersize=2.5, linewidth=1.4)
            if band:
                axes.fill_between(xs, *band, color=colours[name], alpha=0.15, linewidth=0)
        log = panel.get("log", "xy")
        axes.set(title=panel["title"], xlabel=panel["x"], ylabel=panel["y"])
        if "x" in log:
            axes.set_xscale("log")
        if "y" in log:
            axes.set_yscale("log")
        if "limits" in panel:
            axes.set_ylim(*panel["limits"])
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if panel.get("legend", True):
            axes.legend(frameon=False, fontsize=8)
    output = path.parent
    output.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
