"""RLHF on trajectories: true return against labels, on Four-Rooms with a hidden reward and on control tasks of gymnax.

    python experiments/control.py --tasks cartpole --methods oracle iterated "bilevel central"
    python experiments/control.py                                   # everything, about two hours; half in two processes
    python experiments/control.py --tasks pendulum --annotators mistaken myopic
    python experiments/control.py --tasks cartpole --methods iterated --annotators browser --seeds 1 --outer-steps 40

No learner sees the true reward; all buy equally many labels and draw equally many episodes. Runs that are already in the
output folder with the same settings are skipped, so a killed study resumes when the command is repeated. With the
annotator browser it is you who labels: the command prints the address of a page that plays the segments.
"""

import dataclasses
import itertools
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from control_methods import METHODS, Budget
from control_people import person
from control_tables import publish_tables
from control_tasks import TASKS, WIDTH, Task
from control_training import trainer

from jaxrlhf import preferences
from jaxrlhf.evaluation.statistics import student_interval
from jaxrlhf.mdp.trajectories import gold_score
from jaxrlhf.training.figures import draw_curves
from jaxrlhf.training.run_folder import plain

TaskName = Literal["four-rooms", "cartpole", "pendulum", "reacher"]
AnnotatorName = Literal["rational", "mistaken", "indifferent", "left-handed", "myopic", "browser"]
CHOICES = {
    "rational": preferences.BRADLEY_TERRY,
    "mistaken": preferences.Choice(mistake=0.1),
    "indifferent": preferences.Choice(tie=1.0),
    "left-handed": preferences.Choice(position=1.0),
    "myopic": preferences.BRADLEY_TERRY,
    "browser": preferences.BRADLEY_TERRY,
}
MYOPIC_DECAY = 0.9


@dataclasses.dataclass(frozen=True)
class Config:
    """What to run."""

    tasks: tuple[TaskName, ...] = ("four-rooms", "cartpole", "pendulum", "reacher")
    methods: tuple[str, ...] = tuple(METHODS)
    """Names in METHODS of control_methods.py."""
    annotators: tuple[AnnotatorName, ...] = ("rational",)
    """Rational is Bradley-Terry; mistaken flips a tenth of the labels; indifferent calls ties; left-handed favours the
    segment shown first; myopic discounts what happened early in a segment; browser is a person."""
    seeds: int = 5
    outer_steps: int | None = None
    """Outer steps of a run; by default the task's own number."""
    budget: Budget = dataclasses.field(default_factory=Budget)
    port: int = 8377
    """Of the page, with the annotator browser."""
    output: pathlib.Path = pathlib.Path("runs/control")
    """Folder for results, tables and figures."""


def annotator_of(name: AnnotatorName, task: Task):
    """Returns `labels per pair -> annotator`; the annotator judges segments by their true reward."""

    def gold(sample, frozen):
        return task.scale * gold_score(sample, frozen)

    def recent_gold(sample, frozen):
        score = preferences.myopic(lambda sample, frozen: task.scale * sample.responses.gold, decay=MYOPIC_DECAY)
        return score(sample._replace(cumulative_discount=sample.responses.window), frozen)

    score = recent_gold if name == "myopic" else gold
    return lambda labels: preferences.gold_annotator(score, labels=labels, choice=CHOICES[name])


def run(task: Task, method: str, annotator: AnnotatorName, config: Config, name: TaskName) -> dict:
    """Runs all seeds of one method in one program; returns its curves `[seeds, outer_steps]` and the seconds it took."""
    if annotator != "browser":
        return run_with(task, method, annotator_of(annotator, task), config)
    if config.seeds != 1:
        raise ValueError("a person labels one run at a time; give --seeds 1")
    journal = config.output / f"{name}-{method}.people.sqlite".replace(" ", "_").replace(",", "")
    with person(name, journal, port=config.port) as annotators:
        # Not vectorised: a person is asked from within.
        return run_with(task, method, annotators, config, all_seeds=lambda train: lambda keys: _alone(train, keys))


def _alone(train: Callable, keys: jax.Array):
    return jax.tree.map(lambda leaf: leaf[None], train(keys[0]))


def run_with(
    task: Task,
    method: str,
    annotators: Callable[[int], preferences.Annotator],
    config: Config,
    all_seeds: Callable[[Callable], Callable] = jax.vmap,
) -> dict:
    """Runs a method with `labels per pair -> annotator`, over all keys by `all_seeds`; see `run`."""
    train = trainer(task, METHODS[method], config.budget, annotators)
    keys = jax.random.split(jax.random.key(0), config.seeds)
    began = time.monotonic()
    compiled = jax.jit(all_seeds(train)).lower(keys).compile()
    ready = time.monotonic()
    curves = jax.block_until_ready(compiled(keys))
    seconds = {"compilation": ready - began, "run": time.monotonic() - ready}
    return {name: np.asarray(curve).tolist() for name, curve in curves._asdict().items()} | {"seconds": seconds}


def final(curves: dict) -> np.ndarray:
    """Returns each seed's return over the last tenth of the outer steps."""
    returns = np.asarray(curves["returns"], float)
    return returns[:, -max(1, returns.shape[1] // 10) :].mean(axis=1)


def task_of(name: TaskName, config: Config) -> Task:
    """Returns a task with the requested number of outer steps."""
    task = TASKS[name]()
    return task if config.outer_steps is None else task._replace(outer_steps=config.outer_steps)


def settings_of(task: Task, method: str, annotator: AnnotatorName, config: Config) -> dict:
    """Returns everything that a result depends on, as JSON values: a run is repeated when any of them changes."""
    rule = METHODS[method].rule
    assert callable(rule.relative_sigma)  # a constant schedule, here
    settings = {
        "task": {name: value for name, value in task._asdict().items() if isinstance(value, int | float | None)},
        "units": task.units,
        "width": WIDTH,
        "method": METHODS[method]._replace(rule=None),
        "rule": (rule.stencil, float(rule.relative_sigma(jnp.zeros((), jnp.int32))), rule.sampling),
        "annotator": (CHOICES[annotator], MYOPIC_DECAY),
        "budget": config.budget,
        "seeds": config.seeds,
    }
    return json.loads(json.dumps(plain(settings)))


def table(results: dict[str, dict]) -> list[str]:
    """Returns the table of one task and annotator as Markdown lines; the learners are sorted by final return."""
    lines = [
        "| method | final return | over the whole run | minus iterated, paired | labels | environment steps | seconds |",
        "|---|---|---|---|---|---|---|",
    ]

    def formatted(values):
        mean, half = student_interval(values)
        digits = max(0, 3 - len(str(int(abs(mean)))))
        return f"{mean:.{digits}f}" + ("" if np.isnan(half) else f" ± {half:.{digits}f}")

    for name in sorted(results, key=lambda name: (METHODS[name].reward != "gold", -np.mean(final(results[name])))):
        curves = results[name]
        baseline = None if name == "iterated" else results.get("iterated")
        paired = formatted(final(curves) - final(baseline)) if baseline else ""
        labels, steps = (int(np.mean(np.sum(curves[field], axis=1))) for field in ("labels", "steps"))
        lines.append(
            f"| {name} | {formatted(final(curves))} | {formatted(np.mean(curves['returns'], axis=1))} | {paired} "
            f"| {labels:,} | {steps:,} | {sum(curves['seconds'].values()):.0f} |"
        )
    return lines


def banded(curves: dict, labels: np.ndarray) -> tuple[list, ...]:
    """Returns labels, mean returns and both ends of the 95% band, averaged over blocks of outer steps."""
    returns = np.asarray(curves["returns"], float)
    blocks = np.array_split(np.arange(returns.shape[1]), min(24, returns.shape[1]))
    mean, half = np.transpose([student_interval(returns[:, block].mean(axis=1)) for block in blocks])
    half = np.nan_to_num(half)
    return tuple(line.tolist() for line in (labels[[block[-1] for block in blocks]], mean, mean - half, mean + half))


FAMILIES = {
    "bilevel": ("oracle", "offline", "iterated", "iterated, disagreement", "bilevel central", "bilevel, disagreement"),
    "iterated": ("iterated", *(name for name in METHODS if name.startswith("iterated,"))),
}
"""The methods drawn in each of the two figures."""


def stored_results(config: Config) -> dict[str, dict[str, dict]]:
    """Returns the folder's curves that have these settings, by task (and annotator) and by method."""
    found: dict[str, dict[str, dict]] = {}
    for path in sorted(config.output.glob("curves/*.json")):
        result = json.loads(path.read_text())
        name, method, annotator = result["task"], result["method"], result["annotator"]
        known = name in TASKS and method in METHODS and annotator in CHOICES
        if not known or result["settings"] != settings_of(task_of(name, config), method, annotator, config):
            continue
        title = name + ("" if annotator == "rational" else f", {annotator} annotator")
        found.setdefault(title, {})[method] = result["curves"]
    return found


def lines_of(results: dict[str, dict], names: tuple[str, ...]) -> dict[str, tuple[list, ...]]:
    """Returns the lines of one panel by method.

    A method that buys no labels, or all of them first, is drawn over the labels that iterated RLHF has bought after the
    same number of episodes.
    """
    online = {name: curves for name, curves in results.items() if METHODS[name].reward == "learned"}
    drawn = {}
    for name in names:
        if name in results and online:
            buyer = online.get(name) or online.get("iterated") or next(iter(online.values()))
            drawn[name] = banded(results[name], np.cumsum(buyer["labels"][0]))
    return drawn


def report(config: Config) -> str:
    """Draws the figures and returns the tables of the folder's results that have these settings."""
    found, text = stored_results(config), []
    for title, results in found.items():
        text += ["", f"## {title[0].upper()}{title[1:]}", "", *table(results)]
    for family, names in FAMILIES.items():
        panels = {}
        for title, results in found.items():
            if "annotator" not in title and (lines := lines_of(results, names)):
                panels[title] = ("labels bought online by then", "true return", lines)
        if panels:
            draw_curves(config.output / f"{family}.png", panels)
            text += ["", f"![{family}]({family}.png)"]
    return "\n".join(text)


def main(config: Config) -> None:
    """Runs what is missing, then reports every result in the folder that has these settings."""
    if unknown := set(config.methods) - set(METHODS):
        sys.exit(f"There is no method {', '.join(sorted(unknown))}; there are {', '.join(METHODS)}.")
    try:
        (config.output / "curves").mkdir(parents=True, exist_ok=True)
        (config.output / "tables.md").touch()
    except OSError as error:
        sys.exit(f"The output folder {config.output} cannot be written ({error.strerror}); give --output another.")
    runs = list(itertools.product(config.tasks, config.annotators, config.methods))
    began, finished = time.monotonic(), 0
    for number, (name, annotator, method) in enumerate(runs):
        path = config.output / "curves" / f"{name}-{annotator}-{method}.json".replace(" ", "_").replace(",", "")
        task = task_of(name, config)
        settings = settings_of(task, method, annotator, config)
        if path.exists() and json.loads(path.read_text())["settings"] == settings:
            continue
        try:
            curves = run(task, method, annotator, config, name)
        except ValueError as error:
            sys.exit(f"control: {name}, {method}: {error}")
        finished += 1
        result = {"task": name, "annotator": annotator, "method": method, "settings": settings, "curves": curves}
        partial = path.with_suffix(".part")
        partial.write_text(json.dumps(result))
        os.replace(partial, path)
        steps = np.sum(curves["steps"])
        left = (time.monotonic() - began) / finished * (len(runs) - number - 1)
        print(
            f"{name}, {annotator}, {method}: {np.mean(final(curves)):.1f}; {steps / curves['seconds']['run']:,.0f} "
            f"environment steps a second; at most {left / 60:.0f} min left",
            flush=True,
        )
    publish_tables(
        config.output,
        report(config),
        title="Preferences over trajectories",
        summary="True return, which no learner sees, at equal labels and episodes.",
        config=config,
    )


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
