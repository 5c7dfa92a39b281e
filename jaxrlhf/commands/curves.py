"""Curves of supervised training and reward learning."""

import numpy as np

from jaxrlhf.commands.stage import History
from jaxrlhf.training.figures import draw_curves
from jaxrlhf.training.run_folder import RunFolder


def draw_history(folder: RunFolder, history: History, panels: dict[str, str]) -> list[str]:
    """Draws the training loss and held-out metrics; returns the files' names.

    Args:
        folder: of the run.
        history: the curves.
        panels: axis labels by the metrics' names.
    """
    smoothed = _moving_average(history.losses)
    curves = {"Loss on batches": ("step", "nats", {"batches, smoothed": (history.steps, smoothed)})}
    for name, axis in panels.items():
        values = [row[name] for row in history.metrics]
        curves[f"Held out: {name.replace('_', ' ')}"] = ("step", axis, {"held out": (history.evaluated, values)})
    draw_curves(folder.path / "curves.png", curves)
    return ["curves.png"]


def _moving_average(values: list[float]) -> list[float]:
    width = max(1, len(values) // 50)
    sums = np.cumsum([0.0, *values])
    return [float((sums[i + 1] - sums[max(0, i + 1 - width)]) / min(i + 1, width)) for i in range(len(values))]
