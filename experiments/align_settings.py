r"""What a setting of `jaxrlhf align` is worth: the command itself with each value, seeds by gold rewards.

    python experiments/align_settings.py --policy DIR                       # --reuse 0 1 2 4, at three numbers of labels
    python experiments/align_settings.py --policy DIR --vary method \
        --values bilevel iterated rloo grpo ppo online-dpo --labels 2048    # methods, each at its defaults
    python experiments/align_settings.py --policy DIR --quick

DIR is a small model of stories. Everything that is not varied is the command's default, or given with --options. Labels
are drawn from a hidden score of the text (Bradley-Terry); a run is compared by its utility on held-out openings: the win
rate against the reference less the price of its KL. A run of the most labels is also read at the smaller numbers.
"""

import concurrent.futures
import dataclasses
import functools
import itertools
import json
import math
import os
import pathlib
import subprocess
import sys
import time
from typing import Any, NamedTuple

import numpy as np
import tyro
from mixture import GOLDS, SCORES
from one_run import publish
from rich.console import Console
from stories import story_score

from jaxrlhf.commands.align_config import Align
from jaxrlhf.evaluation.statistics import paired_gain, student_interval
from jaxrlhf.training.figures import draw_curves
from jaxrlhf.training.progress import progress
from jaxrlhf.training.report import Table
from jaxrlhf.training.run_folder import RunFolder

NAMES = ("Tim", "Lily", "Tom", "Mia", "Sam", "Anna", "Ben", "Sue", "Max", "Lucy", "Jack", "Amy")
BEGINNINGS = (
    "Once upon a time, {} had a", "One day, {} went to the", "{} saw a big", "{} and the dog were", "It was cold. {}",
    "{} wanted to play with", "The cat looked at {}. It", "{} found a box. In it",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Config:
    """What to compare."""

    policy: pathlib.Path
    """Hugging Face directory of a small model of stories."""
    vary: str = "reuse"
    """Option of `jaxrlhf align`, without its dashes."""
    values: tuple[str, ...] = ("0", "1", "2", "4")
    """Its values; differences are from the first."""
    labels: tuple[int, ...] = (1_024, 5_120, 20_480)
    """Labels after which runs are compared, in whole steps of 32 labels."""
    options: tuple[str, ...] = ()
    """Further options of every run, as NAME=VALUE, or NAME for a switch."""
    golds: tuple[str, ...] = ("glad words", "checklist")
    """Hidden scores of the text, of `SCORED`."""
    seeds: int = 5
    first_seed: int = 0
    batch_size: int = 8
    """Prompts per step; smaller than the command's default, for the sake of time, as are the completions."""
    max_new_tokens: int = 24
    """Maximum length of a completion in tokens."""
    evaluation_answers: int = 512
    """Completions of held-out openings per evaluation."""
    workers: int = 2
    """Runs at a time."""
    quick: bool = False
    """Two values, two seeds, one gold reward, 512 labels."""
    output: pathlib.Path = pathlib.Path("runs")
    """Directory in which the study's folder is created, with the folders of its runs."""

    @property
    def labels_per_step(self) -> int:
        """Labels of a step: one a pair."""
        return self.batch_size * Align.pairs


QUICK: dict[str, Any] = {"seeds": 2, "golds": ("glad words",), "labels": (256, 512), "evaluation_answers": 128}


def glad_words(prompts: list[str], completions: list[str]) -> list[float]:
    """The score of `frontier.py` and `one_run.py`: glad words of the completion less sorry ones, two points each."""
    return [story_score(text) for text in completions]


def checklist(prompts: list[str], completions: list[str]) -> list[float]:
    """The score of `mixture.py`: four points for a glad word, none that is sorry, and two ended sentences."""
    return [GOLDS["checklist"]({name: score(text) for name, score in SCORES.items()}) for text in completions]


SCORED = {"glad words": "glad_words", "checklist": "checklist"}
"""The functions of this module by the name of the gold reward."""


class Cell(NamedTuple):
    """A run: the value of the varied option, the gold reward, the seed."""

    value: str
    gold: str
    seed: int


class Measured(NamedTuple):
    """What a run reached at each number of labels, `[labels]`, and its seconds."""

    utility: np.ndarray
    win_rate: np.ndarray
    kl: np.ndarray
    seconds: float


def check(config: Config) -> None:
    """Raises ValueError for settings that cannot be run."""
    for name in ("seeds", "workers", "batch_size", "max_new_tokens", "evaluation_answers"):
        if getattr(config, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(config, name)}.")
    for gold in config.golds:
        if gold not in SCORED:
            raise ValueError(f"--golds knows {', '.join(SCORED)}, got {gold!r}.")
    if not config.labels or any(count < 1 or count % config.labels_per_step for count in config.labels):
        raise ValueError(
            f"--labels are multiples of {config.labels_per_step}, the labels of a step; got {config.labels}."
        )
    if list(config.labels) != sorted(set(config.labels)):
        raise ValueError(f"--labels rise, got {config.labels}.")


def command(config: Config, folder: pathlib.Path, cell: Cell) -> list[str]:
    """Returns the command of a run."""
    steps = [count // config.labels_per_step for count in config.labels]
    options = {
        "policy": config.policy.absolute(),
        "data": folder.absolute() / "openings.jsonl",
        "score": f"align_settings:{SCORED[cell.gold]}",
        "batch-size": config.batch_size,
        "max-new-tokens": config.max_new_tokens,
        "steps": steps[-1],
        "evaluations": steps[-1] // functools.reduce(math.gcd, steps),
        "evaluation-answers": config.evaluation_answers,
        "held-out": 0.25,
        "seed": cell.seed,
        "output": folder.absolute(),
        "data-dir": folder.absolute() / "prepared",
        "run": run_name(cell),
        config.vary: cell.value,
    }
    flat = [text for option, value in options.items() for text in (f"--{option}", str(value))]
    flat += [text for option in config.options for text in f"--{option}".split("=", 1)]
    return [sys.executable, "-m", "jaxrlhf.commands.main", "align", *flat]


def run_name(cell: Cell) -> str:
    """Returns the name of a run's folder."""
    return f"{cell.gold}-{cell.value}-{cell.seed}".replace(" ", "-").replace("/", "-")


def measure(config: Config, folder: pathlib.Path, cell: Cell) -> Measured:
    """Runs the command and returns what it reached.

    Raises:
        ValueError: it failed; the message is its own.
    """
    began = time.monotonic()
    here = str(pathlib.Path(__file__).parent)
    paths = os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])
    compiled = {"JAX_COMPILATION_CACHE_DIR": str(folder.absolute() / "compiled")}
    environment = compiled | os.environ | {"PYTHONPATH": paths}
    done = subprocess.run(
        command(config, folder, cell), env=environment, capture_output=True, text=True, errors="replace", check=False
    )
    if done.returncode:
        raise ValueError(f"{run_name(cell)} failed: {(done.stderr.strip() or done.stdout.strip())[-2000:]}")
    rows = [json.loads(line) for line in (folder / run_name(cell) / "metrics.jsonl").read_text().splitlines()]
    price = json.loads((folder / run_name(cell) / "config.json").read_text())["kl_price"]
    of_step = {row["step"]: row for row in rows if "win_rate" in row}
    at = [of_step[count // config.labels_per_step] for count in config.labels]
    win_rate, kl = (np.array([row[name] for row in at]) for name in ("win_rate", "kl"))
    return Measured(win_rate - price * kl, win_rate, kl, time.monotonic() - began)


def table_of(config: Config, gold: str, found: dict[Cell, Measured]) -> Table:
    """Returns utility, win rate and KL by value and number of labels, and the paired difference from the first value."""
    rows = []
    seeds = range(config.first_seed, config.first_seed + config.seeds)
    for index, labels in enumerate(config.labels):
        of_value = {value: [found[Cell(value, gold, seed)] for seed in seeds] for value in config.values}
        first = np.array([each.utility[index] for each in of_value[config.values[0]]])
        for value, runs in of_value.items():
            utility = np.array([each.utility[index] for each in runs])
            gain = "" if value == config.values[0] else _interval(*paired_gain(utility, first))
            win_rate, kl = (np.mean([getattr(each, name)[index] for each in runs]) for name in ("win_rate", "kl"))
            seconds = np.mean([each.seconds for each in runs])
            rows.append(
                (f"{labels:,}", value, _interval(*student_interval(utility)), gain, f"{win_rate:.3f}", f"{kl:.2f}",
                 f"{seconds:.0f}")
            )  # fmt: skip
    columns = ("labels", config.vary, "utility", f"more than {config.values[0]}", "win rate", "KL", "seconds of a run")
    return Table(f"{gold}: {config.seeds} seeds, 95% intervals", columns, rows)


def _interval(mean: float, half: float) -> str:
    return f"{mean:.3f}" if math.isnan(half) else f"{mean:.3f} ± {half:.3f}"


def draw(config: Config, folder: RunFolder, found: dict[Cell, Measured]) -> None:
    """Draws the utility against the number of labels, mean and interval, a line a value and a panel a gold reward."""
    logs, panels = [math.log10(count) for count in config.labels], {}
    for gold in config.golds:
        lines = {}
        for value in config.values:
            runs = np.array([each.utility for cell, each in found.items() if cell[:2] == (value, gold)])
            mean, half = np.array([student_interval(column) for column in runs.T]).T
            half = np.nan_to_num(half)
            lines[f"{config.vary} {value}"] = (logs, list(mean), list(mean - half), list(mean + half))
        panels[gold] = ("log10 of the labels", "utility", lines)
    draw_curves(folder.path / "align_settings.png", panels)


def main(config: Config) -> pathlib.Path:
    """Runs the study; returns its folder."""
    console, began = Console(), time.monotonic()
    if config.quick:
        config = dataclasses.replace(config, **QUICK, values=config.values[:2])
    try:
        check(config)
        folder = RunFolder(config.output, "align_settings")
        folder.write_json("config.json", config)
        prompts = [beginning.format(name) for beginning, name in itertools.product(BEGINNINGS, NAMES)]
        lines = [json.dumps({"prompt": prompt}) for prompt in prompts]
        (folder.path / "openings.jsonl").write_text("\n".join(lines) + "\n")
        seeds = range(config.first_seed, config.first_seed + config.seeds)
        cells = [Cell(value, gold, seed) for seed, gold, value in itertools.product(seeds, config.golds, config.values)]
        found = _all(config, folder, cells, console)
    except ValueError as error:
        print(f"align_settings: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    draw(config, folder, found)
    named = [cell._asdict() | each._asdict() for cell, each in found.items()]
    folder.write_json("results.json", {"config": config, "seconds": time.monotonic() - began, "runs": named})
    publish(
        folder,
        config,
        console,
        title=f"jaxrlhf align --{config.vary}",
        summary=f"{len(cells)} runs in {time.monotonic() - began:.0f} s, {config.workers} at a time.",
        tables=[table_of(config, gold, found) for gold in config.golds],
        figure="align_settings.png",
    )
    return folder.path


def _all(config: Config, folder: RunFolder, cells: list[Cell], console: Console) -> dict[Cell, Measured]:
    """Returns what every run reached; each is written to metrics.jsonl as it ends."""
    found: dict[Cell, Measured] = {}
    with (
        progress("align", len(cells), "runs", console=console) as advance,
        concurrent.futures.ThreadPoolExecutor(config.workers) as pool,
    ):
        try:
            waiting = {pool.submit(measure, config, folder.path, cell): cell for cell in cells}
            for done in concurrent.futures.as_completed(waiting):
                found[waiting[done]] = done.result()
                folder.append_metrics(**waiting[done]._asdict(), **done.result()._asdict())
                advance()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return {cell: found[cell] for cell in cells}


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
