"""One run in place of a sweep: the utility at a stated price of KL, against the setting that each method was started at.

    python experiments/one_run.py --quick                 # two exact problems, half a minute
    python experiments/one_run.py                         # all exact problems
    python experiments/one_run.py --policy DIR            # and a pretrained model of stories, two hours

The price says what a nat of KL is worth in win rate. Bilevel descent with a learned scale is given the price; every other
method is given beta (or the controller a target in nats), and has to be swept. Every run spends the same labels. Tables
give the utility as a share of what the best policy gains over the reference: 1 is the optimum, 0 the reference.
"""

import dataclasses
import pathlib
import sys
import time
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import one_run_exact
import one_run_stories
import tyro
from frontier import Config as FrontierConfig
from frontier import setup_of
from frontier_tasks import Gold, fit_gold_model, model_gold, reference_pool
from rich.console import Console
from stories import load_stories

from jaxrlhf.evaluation.statistics import paired_gain, student_interval
from jaxrlhf.training.figures import draw_curves
from jaxrlhf.training.progress import progress
from jaxrlhf.training.report import Table, rich_table, write_report
from jaxrlhf.training.run_folder import RunFolder

SCALED = one_run_exact.SCALED
CONTROLLER = one_run_exact.CONTROLLER
SHARED = ", labels shared by the sweep"
"""Ends the names of problems in which a sweep spends the labels of one run."""
SHARED_RATES = (1.0, 3.0)
"""Factors of the policy's learning rate in these sweeps: shorter runs might want faster ones."""


@dataclasses.dataclass(frozen=True)
class Config:
    """What to compare."""

    policy: pathlib.Path | None = None
    """Hugging Face directory of a small model of stories; without it, exact problems alone."""
    kl_price: float = 0.03
    """What a nat of KL is worth, in win rate against the reference."""
    methods: tuple[str, ...] = ()
    """Methods by name; by default all of the studies in `docs/results.md`, without the further ones on the stories."""
    families: tuple[str, ...] = one_run_exact.FAMILIES
    """Gold rewards of the exact problems."""
    kinds: tuple[str, ...] = one_run_exact.KINDS
    """Bandits, enumerated languages."""
    golds: tuple[Literal["words", "model"], ...] = ("words", "model")
    """Gold rewards of the stories: a checklist of the text, a reward model larger than the learner's."""
    seeds: int = 5
    first_seed: int = 0
    """First seed of the stories."""
    starts: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Which of the five betas (or targets) each method is started at on the stories, counted from the smallest."""
    steps: int = 64
    """Outer steps of a run on the stories, of 8 prompts with 4 pairs; each pair costs one label."""
    story_weight: float = 1.0
    """Weight of the utility beside the likelihood, on the stories."""
    scale_learning_rate: float = 0.1
    """Adam's learning rate of the log scale, on the stories."""
    shared_labels: bool = False
    """On the stories, also sweeps that spend the labels of one run in all: a part for each of their starts."""
    exact_steps: int = 200
    """Outer steps of a run on the exact problems, of 8 contexts with 16 pairs."""
    instance: int = 0
    """Of the exact problems; the learning rates were tuned on instances from 100 on."""
    quick: bool = False
    """Two exact problems and three methods, 3 seeds."""
    output: pathlib.Path = pathlib.Path("runs")
    """Directory in which the run's folder is created."""


QUICK: dict[str, Any] = {
    "families": ("linear", "saturating"),
    "kinds": ("language",),
    "methods": (SCALED, one_run_exact.ITERATED, CONTROLLER),
    "seeds": 3,
    "policy": None,
}


class Result(NamedTuple):
    """A method on one problem.

    Attributes:
        problem, method: their names.
        starts: beta, or the target in nats, of each column.
        utility, win_rate, kl, scale: `[seeds, starts]`.
        reference, optimum: utilities; the optimum is exact, or the best mean of any method and start.
        best_in_class: utility of the best reward of the learner's class, where it is known.
        labels: of one run.
        labels_to_95: `[seeds, starts]`, labels to 95% of a run's own gain, where they were measured.
    """

    problem: str
    method: str
    starts: tuple[float, ...]
    utility: np.ndarray
    win_rate: np.ndarray
    kl: np.ndarray
    scale: np.ndarray
    reference: float
    optimum: float
    best_in_class: float | None
    labels: int
    labels_to_95: np.ndarray | None = None

    @property
    def share(self) -> np.ndarray:
        """The utility as a share of the optimum's gain over the reference, `[seeds, starts]`."""
        return (self.utility - self.reference) / (self.optimum - self.reference)


def check(config: Config) -> None:
    """Raises ValueError for settings that cannot be run."""
    known = {*one_run_exact.METHODS, *one_run_stories.METHODS, *one_run_stories.OTHERS}
    for field, names in (("methods", known), ("families", one_run_exact.FAMILIES), ("kinds", one_run_exact.KINDS)):
        for name in getattr(config, field):
            if name not in names:
                raise ValueError(f"--{field} knows {', '.join(sorted(names))}, got {name!r}.")
    if not config.kl_price > 0:
        raise ValueError(f"--kl-price must be positive, got {config.kl_price:g}.")
    if not config.starts or not set(config.starts) <= set(range(len(one_run_exact.BETAS))):
        raise ValueError(f"--starts are numbers from 0 to {len(one_run_exact.BETAS) - 1}, got {config.starts}.")
    for name in ("seeds", "steps", "exact_steps"):
        if getattr(config, name) < 2:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 2, got {getattr(config, name)}.")


def exact_results(config: Config) -> Iterator[Result]:
    """Yields every method on every exact problem."""
    budget, rates = one_run_exact.Budget(config.seeds, config.exact_steps), one_run_exact.Rates()
    for kind in config.kinds:
        for family in config.families:
            frozen = one_run_exact.problem_of(family, kind, config.instance)
            bounds = one_run_exact.bounds_of(frozen, config.kl_price)
            for name in one_run_exact.METHODS:
                if config.methods and name not in config.methods:
                    continue
                outcome = one_run_exact.run_method(name, frozen, config.kl_price, budget, rates)
                result = Result(f"{kind}, {family}", name, *outcome[:-1], *bounds, budget.labels)
                yield result._replace(labels_to_95=outcome.labels_to_95)


def story_methods(config: Config) -> list[str]:
    """Returns the methods that run on the stories."""
    known = (*one_run_stories.METHODS, *one_run_stories.OTHERS)
    return [name for name in known if name in (config.methods or one_run_stories.METHODS)]


def story_results(config: Config) -> Iterator[Result]:
    """Yields every method on the stories under every gold reward; the optimum is unknown and set to 1 for now."""
    assert config.policy is not None
    stories = load_stories(config.policy, max_new_tokens=24)
    settings = FrontierConfig(policy=config.policy, steps=config.steps)
    setup, first_reward = setup_of(settings, stories, "whole")
    seeds = tuple(range(config.first_seed, config.first_seed + config.seeds))
    budget = one_run_stories.Budget(seeds, config.steps, settings.batch, repeats=8, starts=config.starts)
    pool = reference_pool(stories, 64, seed=1_000)
    golds: dict[str, Gold] = {"words": stories.score}
    if "model" in config.golds:
        golds["model"] = model_gold(stories, fit_gold_model(stories))
    golds = {name: golds[name] for name in config.golds}
    baselines = {name: gold(stories.openings, pool)[..., 0] for name, gold in golds.items()}
    price = one_run_stories.Price(config.kl_price, config.story_weight, config.scale_learning_rate)
    for name in story_methods(config):
        runs = one_run_stories.run_method(name, stories, setup, price, first_reward, golds, baselines, budget)
        for label, outcome in runs:
            yield _of_stories(f"stories, {label}", name, outcome)
        if not (config.shared_labels and one_run_stories.is_swept(name)):
            continue
        for factor in SHARED_RATES:
            part = one_run_stories.share_of(setup, budget)
            runs = one_run_stories.run_method(
                name, stories, part.setup, price, first_reward, golds, baselines, part.budget, factor
            )
            for label, outcome in runs:
                yield _of_stories(
                    f"stories, {label}{SHARED}", name if factor == 1 else f"{name}, {factor:g} x rate", outcome
                )


def _of_stories(problem: str, name: str, outcome: one_run_stories.Outcome) -> Result:
    arrays = (outcome.utility, outcome.win_rate, outcome.kl, outcome.scale)
    return Result(problem, name, outcome.starts, *arrays, 0.5, 1.0, None, outcome.labels)


def with_best_as_optimum(results: list[Result]) -> list[Result]:
    """Returns results of stories with the best mean utility of any method and start as the optimum."""
    best = {
        problem: max(float(np.max(np.mean(each.utility, axis=0))) for each in results if each.problem == problem)
        for problem in {each.problem for each in results}
    }
    return [each._replace(optimum=best[each.problem]) for each in results]


def tables_of(results: list[Result]) -> list[Table]:
    """Returns, for each problem, the share of the optimum's gain by method and start, and the summary over starts."""
    tables = []
    for problem in dict.fromkeys(each.problem for each in results):
        rows = []
        of_problem = [each for each in results if each.problem == problem]
        for each in of_problem:
            means = np.mean(each.share, axis=0)
            cells = [_with_interval(column) for column in each.share.T]
            rows.append((each.method, *cells, f"{means.min():.3f}", f"{means.max():.3f}", f"{means.mean():.3f}"))
        first = of_problem[0]
        known = ""
        if first.best_in_class is not None:
            reachable = (first.best_in_class - first.reference) / (first.optimum - first.reference)
            known = f"; best in the reward's class {reachable:.3f}"
        betas = [f"beta {beta:g}" for beta in first.starts]
        title = f"{problem}: share of the best utility ({first.labels:,} labels a run{known})"
        tables.append(Table(title, ("method", *betas, "worst", "best", "mean"), rows))
    return tables


def _with_interval(values: np.ndarray) -> str:
    _, half = student_interval(values)
    return f"{np.mean(values):.3f} ± {half:.3f}"


def sweep_table(results: list[Result]) -> Table:
    """Returns the comparison that counts: one run of ours from any start against the best of each other method's sweep."""
    rows = []
    for problem in dict.fromkeys(each.problem for each in results):
        of_problem = {each.method: np.mean(each.share, axis=0) for each in results if each.problem == problem}
        ours = of_problem.pop(SCALED, None)
        if ours is None or not of_problem:
            continue
        restricted = {name: shares for name, shares in of_problem.items() if not name.endswith("DPO")}
        rival = max(restricted or of_problem, key=lambda name: float(of_problem[name].max()))
        shares = of_problem[rival]
        rows.append(
            (problem, f"{ours.min():.3f}", f"{ours.max():.3f}", f"{ours.min() / ours.max():.3f}", rival,
             f"{shares.max():.3f}", f"{shares.min():.3f}", f"{np.mean(shares):.3f}")
        )  # fmt: skip
    columns = (
        "problem", "ours, worst start", "ours, best start", "worst / best", "best rival with a reward", "its best setting",
        "its worst", "its mean",
    )  # fmt: skip
    return Table("One run from any start, against the sweep of the best rival", columns, rows)


def shared_table(results: list[Result]) -> Table:
    """Returns one run of ours, mean over its starts, beside the best start of sweeps on as many labels in all."""
    rows = []
    for each in results:
        if each.problem.endswith(SHARED):
            whole = each.problem.removesuffix(SHARED)
            ours = [result.utility for result in results if (result.problem, result.method) == (whole, SCALED)]
            best = each.utility[:, int(np.mean(each.utility, axis=0).argmax())]
            gain = _gain(ours, best)
            hindsight = _gain(ours, each.utility.max(axis=1))
            rows.append((whole, each.method, f"{each.labels:,}", _with_interval(best), gain, hindsight))
    columns = (
        "problem",
        "method",
        "labels a start",
        "utility at its best start",
        "ours, mean of starts, less that",
        "less each seed's best start",
    )
    return Table("One run, against sweeps that spend the same labels in all", columns, rows)


def _gain(ours: list[np.ndarray], theirs: np.ndarray) -> str:
    if not ours:
        return ""
    mean, half = paired_gain(np.mean(ours[0], axis=1), theirs)
    return f"{mean:.3f} ± {half:.3f}"


def speed_table(results: list[Result]) -> Table:
    """Returns the labels to 95% of a run's own final gain: at each method's best start, and over all starts."""
    rows = []
    for each in results:
        if each.labels_to_95 is not None:
            best = each.labels_to_95[:, int(np.mean(each.share, axis=0).argmax())]
            everywhere = np.nanmean(each.labels_to_95)
            rows.append((each.problem, each.method, f"{np.nanmean(best):,.0f}", f"{everywhere:,.0f}"))
    columns = ("problem", "method", "at its best start", "mean over starts")
    return Table("Labels to 95% of a run's own gain over the reference", columns, rows)


def draw(folder: RunFolder, results: list[Result]) -> None:
    """Draws one panel a problem: the share against beta, mean and range over the seeds."""
    panels = {}
    for problem in dict.fromkeys(each.problem for each in results):
        lines = {}
        for each in results:
            if each.problem == problem and each.method != CONTROLLER:
                share = each.share
                xs = [float(np.log10(start)) for start in each.starts]
                mean, low, high = (list(function(share, axis=0)) for function in (np.mean, np.min, np.max))
                lines[each.method] = (xs, mean, low, high)
        panels[problem] = ("log10 beta at the start", "share of the best utility", lines)
    draw_curves(folder.path / "one_run.png", panels)


def main(config: Config) -> pathlib.Path:
    """Runs the study; returns its folder."""
    console, began = Console(), time.monotonic()
    if config.quick:
        config = dataclasses.replace(config, **QUICK)
    try:
        check(config)
        folder = RunFolder(config.output, "one_run")
    except ValueError as error:
        print(f"one_run: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    folder.write_json("config.json", config)
    results, exact_methods = (
        [],
        [name for name in one_run_exact.METHODS if not config.methods or name in config.methods],
    )
    total = len(config.families) * len(config.kinds) * len(exact_methods)
    with progress("exact problems", total, "runs", console=console) as advance:
        for result in exact_results(config):
            results.append(result)
            folder.append_metrics(**result._asdict())
            advance()
    if config.policy is not None:
        names, on_stories = story_methods(config), []
        sweeps = [name for name in names if config.shared_labels and one_run_stories.is_swept(name)]
        count = len(names) + len(SHARED_RATES) * len(sweeps)
        with progress("stories", count * len(config.golds), "runs", console=console) as advance:
            for result in story_results(config):
                on_stories.append(result)
                folder.append_metrics(**result._asdict())
                advance()
        results += with_best_as_optimum(on_stories)
    report(folder, config, results, time.monotonic() - began, console)
    return folder.path


def report(folder: RunFolder, config: Config, results: list[Result], seconds: float, console: Console) -> None:
    """Writes results.json, the figure and the report, and prints the tables."""
    folder.write_json(
        "results.json", {"config": config, "seconds": seconds, "results": [each._asdict() for each in results]}
    )
    draw(folder, results)
    tables = [sweep_table(results), shared_table(results), *tables_of(results), speed_table(results)]
    tables = [table for table in tables if table.rows]
    device = jax.devices()[0].device_kind
    summary = f"Price {config.kl_price:g} of win rate a nat, {config.seeds} seeds, {seconds:.0f} s on {device}."
    publish(
        folder,
        config,
        console,
        title="One run in place of a sweep",
        summary=summary,
        tables=tables,
        figure="one_run.png",
    )


def publish(
    folder: RunFolder, config: Any, console: Console, *, title: str, summary: str, tables: list[Table], figure: str
) -> None:
    """Writes a study's report, and prints its tables, its summary and its folder."""
    write_report(folder.path, title=title, summary=summary, tables=tables, figures=[figure], config=config)
    for table in tables:
        console.print(rich_table(table))
    console.print(summary)
    console.print(str(folder.path), soft_wrap=True)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
