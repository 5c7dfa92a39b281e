r"""What a person's labels are worth when used once, used again and chosen: `jaxrlhf align` with a simulated person.

    python experiments/people.py --policy DIR

DIR is a small model of stories. The person prefers by Bradley and Terry on a hidden score of the text, makes a mistake in
one of ten labels and takes 3 seconds for each. All ways spend the same labels, over the same steps, with the same
settings otherwise; the win rate against the reference on held-out openings is by the person's preferences without
mistakes, as probabilities.
"""

import concurrent.futures
import dataclasses
import hashlib
import itertools
import json
import math
import os
import pathlib
import subprocess
import sys
import time
from typing import NamedTuple

import numpy as np
import tyro
from align_settings import BEGINNINGS, NAMES
from one_run import publish
from rich.console import Console
from stories import story_score

from jaxrlhf.commands.align_config import Align
from jaxrlhf.evaluation.statistics import paired_gain, student_interval
from jaxrlhf.training.figures import draw_curves
from jaxrlhf.training.report import Table
from jaxrlhf.training.run_folder import RunFolder

MISTAKES, SECONDS = 0.1, 3.0
"""Fraction of the person's labels that are flipped, and what a label takes."""
PRICE = Align.kl_price
"""What a nat of KL is worth in win rate, in the last column."""
SEED = "JAXRLHF_PERSON"
"""Of the person, in the environment of a run."""
WAYS: dict[str, tuple[str, ...]] = {
    "used once, drawn at random": (),
    "used again": ("--reuse", "{reuse}"),
    "used again, chosen by disagreement": ("--reuse", "{reuse}", "--choose", "disagreement"),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """The person and the runs."""

    policy: pathlib.Path
    """Hugging Face directory of a small model of stories."""
    labels: int = 400
    """Of a run."""
    labels_per_step: int = 10
    reuse: int = 4
    """Updates of the reward from kept labels a step."""
    seeds: int = 5
    first_seed: int = 0
    batch_size: int = 8
    """Prompts a step, with four pairs each, of which `labels_per_step` are labelled."""
    policy_learning_rate: float = 2e-4
    reward_learning_rate: float = 1e-3
    evaluation_answers: int = 256
    """Completions of held-out openings per evaluation."""
    options: tuple[str, ...] = ()
    """Further options of every run, as NAME=VALUE, or NAME for a switch."""
    ways: tuple[str, ...] = tuple(WAYS)
    workers: int = 2
    """Runs at a time."""
    output: pathlib.Path = pathlib.Path("runs")


class Cell(NamedTuple):
    """A run: the way its labels are used, and the seed of person and run."""

    way: str
    seed: int


def person(prompts: list[str], firsts: list[str], seconds: list[str]) -> list[float]:
    """Labels as the simulated person; the many pairs of an evaluation get the probability behind it, without mistakes."""
    seed = os.environ[SEED]
    per_step, found = int(os.environ[f"{SEED}_PAIRS"]), []
    for prompt, first, second in zip(prompts, firsts, seconds, strict=True):
        chance = 1 / (1 + math.exp(story_score(second) - story_score(first)))
        # By the texts, so that a run that goes on is told the same.
        digest = hashlib.sha256("\0".join((seed, prompt, first, second)).encode()).digest()
        drawn, mistaken = (int.from_bytes(part, "big") / 2**64 for part in (digest[:8], digest[8:16]))
        label = float(drawn < chance) if mistaken >= MISTAKES else float(drawn >= chance)
        found.append(label if len(prompts) <= per_step else chance)
    return found


def command(config: Config, folder: pathlib.Path, cell: Cell) -> list[str]:
    """Returns the command of a run."""
    steps = config.labels // config.labels_per_step
    options = {
        "policy": config.policy.absolute(), "data": folder.absolute() / "openings.jsonl", "annotator": "people:person",
        "steps": steps, "batch-size": config.batch_size, "labels-per-step": config.labels_per_step,
        "max-new-tokens": 24, "warmup": 8, "mistakes": MISTAKES,
        "policy-learning-rate": config.policy_learning_rate, "reward-learning-rate": config.reward_learning_rate,
        "evaluations": 2, "evaluation-answers": config.evaluation_answers, "held-out": 0.25, "seed": cell.seed,
        "output": folder.absolute(), "data-dir": folder.absolute() / "prepared", "run": run_name(cell),
    }  # fmt: skip
    flat = [text for option, value in options.items() for text in (f"--{option}", str(value))]
    flat += [text.format(reuse=config.reuse) for text in WAYS[cell.way]]
    flat += [text for option in config.options for text in f"--{option}".split("=", 1)]
    return [sys.executable, "-m", "jaxrlhf.commands.main", "align", *flat]


def run_name(cell: Cell) -> str:
    """Returns the name of a run's folder."""
    return f"{cell.way}-{cell.seed}".replace(",", "").replace(" ", "-")


def measure(config: Config, folder: pathlib.Path, cell: Cell) -> list[dict[str, float]]:
    """Runs the command and returns its evaluations.

    Raises:
        ValueError: it failed; the message is its own.
    """
    here = str(pathlib.Path(__file__).parent)
    environment = {"JAX_COMPILATION_CACHE_DIR": str(folder.absolute() / "compiled")} | os.environ
    environment |= {"PYTHONPATH": os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])}
    environment |= {SEED: str(cell.seed), f"{SEED}_PAIRS": str(config.labels_per_step)}
    done = subprocess.run(
        command(config, folder, cell), env=environment, capture_output=True, text=True, errors="replace", check=False
    )
    if done.returncode:
        raise ValueError(f"{run_name(cell)} failed: {(done.stderr.strip() or done.stdout.strip())[-2000:]}")
    rows = [json.loads(line) for line in (folder / run_name(cell) / "metrics.jsonl").read_text().splitlines()]
    return [{name: row[name] for name in ("step", "win_rate", "kl")} for row in rows if "win_rate" in row]


def table_of(config: Config, found: dict[Cell, list[dict[str, float]]]) -> Table:
    """Returns a row for each way: win rate and KL at the end, and the paired difference from the first way.

    The last column is the utility at the price that all ways are given.
    """
    seeds, rows, first = range(config.first_seed, config.first_seed + config.seeds), [], None
    for way in config.ways:
        win_rate, kl = (np.array([found[Cell(way, seed)][-1][name] for seed in seeds]) for name in ("win_rate", "kl"))
        gain = "" if first is None else _interval(*paired_gain(win_rate, first))
        first = win_rate if first is None else first
        utility = _interval(*student_interval(win_rate - PRICE * kl))
        cells = _interval(*student_interval(win_rate)), gain, f"{win_rate.min():.3f}", f"{kl.mean():.2f}", utility
        rows.append((way, *cells))
    columns = ("labels", "win rate", f"more than {config.ways[0]}", "worst seed", "KL, nats", f"less {PRICE:g} a nat")
    minutes = config.labels * SECONDS / 60
    title = f"{config.labels} labels, {minutes:.0f} minutes of a person, {config.seeds} seeds, 95% intervals"
    return Table(title, columns, rows)


def _interval(mean: float, half: float) -> str:
    return f"{mean:.3f}" if math.isnan(half) else f"{mean:.3f} ± {half:.3f}"


def draw(config: Config, folder: RunFolder, found: dict[Cell, list[dict[str, float]]]) -> None:
    """Draws the win rate against the person's minutes, mean and interval, a line for each way."""
    lines, seeds = {}, range(config.first_seed, config.first_seed + config.seeds)
    for way in config.ways:
        runs = [found[Cell(way, seed)] for seed in seeds]
        minutes = [row["step"] * config.labels_per_step * SECONDS / 60 for row in runs[0]]
        values = np.array([[row["win_rate"] for row in run] for run in runs])
        mean, half = np.nan_to_num(np.array([student_interval(column) for column in values.T]).T)
        lines[way] = ([0.0, *minutes], [0.5, *mean], [0.5, *(mean - half)], [0.5, *(mean + half)])
    draw_curves(folder.path / "people.png", {"Labels of a person": ("minutes of labelling", "win rate", lines)})


def main(config: Config) -> pathlib.Path:
    """Runs the study; returns its folder."""
    console, began = Console(), time.monotonic()
    try:
        for name in ("seeds", "workers", "reuse", "labels_per_step"):
            if getattr(config, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(config, name)}.")
        if config.labels < config.labels_per_step or config.labels % config.labels_per_step:
            raise ValueError(f"--labels is a multiple of --labels-per-step, got {config.labels}.")
        if set(config.ways) - set(WAYS):
            raise ValueError(f"--ways knows {'; '.join(WAYS)}.")
        folder = RunFolder(config.output, "people")
        folder.write_json("config.json", config)
        prompts = [beginning.format(name) for beginning, name in itertools.product(BEGINNINGS, NAMES)]
        folder.write_text("openings.jsonl", "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
        seeds = range(config.first_seed, config.first_seed + config.seeds)
        cells = [Cell(way, seed) for seed, way in itertools.product(seeds, config.ways)]
        with concurrent.futures.ThreadPoolExecutor(config.workers) as pool:
            found = {}
            for cell, rows in zip(cells, pool.map(lambda cell: measure(config, folder.path, cell), cells), strict=True):
                found[cell] = rows
                folder.append_metrics(**cell._asdict(), **rows[-1])
    except ValueError as error:
        print(f"people: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    draw(config, folder, found)
    named = [cell._asdict() | {"evaluations": rows} for cell, rows in found.items()]
    folder.write_json("results.json", {"config": config, "seconds": time.monotonic() - began, "runs": named})
    publish(
        folder,
        config,
        console,
        title="What a person's labels are worth",
        summary=f"{len(cells)} runs in {time.monotonic() - began:.0f} s, {config.workers} at a time.",
        tables=[table_of(config, found)],
        figure="people.png",
    )
    return folder.path


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
