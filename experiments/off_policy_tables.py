"""What distinguishes the methods of `off_policy.py`, and the tables and curves of its results."""

from typing import Literal, NamedTuple

import numpy as np

from jaxrlhf.control.pairs import Criterion
from jaxrlhf.evaluation.statistics import student_interval


class Method(NamedTuple):
    """What distinguishes the methods; all begin with the same steps that seek rare states.

    Attributes:
        labels: when they are bought: "online", "first" (all before the policy follows them), or "never" (the oracle).
        share: of the task's labels that are bought.
        criterion: of the queries.
    """

    labels: Literal["online", "first", "never"] = "online"
    share: float = 1.0
    criterion: Criterion = "uniform"


def final(curves: dict) -> np.ndarray:
    """Returns each seed's return over the last fifth of the sessions."""
    returns = np.asarray(curves["returns"], float)
    return returns[:, -max(1, returns.shape[1] // 5) :].mean(axis=1)


def check_equal(results: dict[str, dict], methods: dict[str, Method]) -> None:
    """Checks that methods took equally many environment steps, and bought the labels that they may.

    Raises:
        AssertionError: naming the method.
    """
    steps = {name: np.asarray(curves["steps"])[:, -1].tolist() for name, curves in results.items()}
    labels = {name: np.asarray(curves["labels"])[:, -1].tolist() for name, curves in results.items()}
    whole = [labels[name] for name in results if methods[name].labels != "never" and methods[name].share == 1.0]
    for name in results:
        assert steps[name] == next(iter(steps.values())), f"{name} took {steps[name]} environment steps: {steps}"
        assert methods[name].labels == "never" or methods[name].share < 1.0 or labels[name] == whole[0], (
            f"{name} bought {labels[name]} labels: {labels}"
        )


def table(results: dict[str, dict], methods: dict[str, Method]) -> list[str]:
    """Returns the table of one task as Markdown lines."""
    lines = [
        "| method | final return | over the whole run | labels | environment steps | correlation at the end | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in (name for name in methods if name in results):
        curves = results[name]
        columns = [
            _plus_minus(student_interval(values)) for values in (final(curves), np.mean(curves["returns"], axis=1))
        ]
        correlation = np.mean(np.asarray(curves["correlation"])[:, -1])
        lines.append(
            f"| {name} | {columns[0]} | {columns[1]} | {int(np.max(curves['labels'])):,} "
            f"| {int(np.max(curves['steps'])):,} | {'' if methods[name].labels == 'never' else f'{correlation:.2f}'} "
            f"| {curves['seconds']:.0f} |"
        )
    return lines


def _plus_minus(interval: tuple[float, float]) -> str:
    mean, half = interval
    if np.isnan(mean):
        return "no episode ended"
    digits = max(0, 3 - len(str(int(abs(mean)))))
    return f"{mean:.{digits}f}" + ("" if np.isnan(half) else f" ± {half:.{digits}f}")


def banded(curves: dict) -> tuple[list, ...]:
    """Returns a line of `draw_curves`: the mean return over seeds and its 95% interval, by environment steps."""
    mean, half = np.transpose([student_interval(column) for column in np.transpose(curves["returns"])])
    half = np.nan_to_num(half)
    return curves["steps"][0], mean.tolist(), (mean - half).tolist(), (mean + half).tolist()
