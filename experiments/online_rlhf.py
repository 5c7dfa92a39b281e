"""Online RLHF as one bilevel problem, against iterated RLHF, at equal labels and equal samples.

    python experiments/online_rlhf.py                    # an enumerable language: every figure exact
    python experiments/online_rlhf.py --policy DIR       # a pretrained model in a Hugging Face directory

Three methods differ in one line, the hypergradient rule: `bilevel` estimates the policy's response to the reward with a
central stencil, `boltzmann` with the closed form of a KL-regularised policy, and `decoupled` ignores it (iterated RLHF).
"""

import dataclasses
import itertools
import math
import pathlib
import sys
import time

import jax
import numpy as np
import optax
import tyro
from online_rlhf_tasks import Task, enumerable_task, pretrained_task
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from jaxrlhf import bilevel, objectives
from jaxrlhf.training.figures import draw_curves
from jaxrlhf.training.loop import outer_steps
from jaxrlhf.training.report import Samples, Table, rich_table, write_report
from jaxrlhf.training.run_folder import RunFolder
from jaxrlhf.training.step import check_batch, compile_algorithm, data_mesh, make_outer_step, replicate

METHODS = ("bilevel", "boltzmann", "decoupled")


@dataclasses.dataclass(frozen=True)
class Config:
    """What to run. Values that are omitted take the task's default, recorded in `config.json` of the run's folder."""

    policy: pathlib.Path | None = None
    """Hugging Face directory of a Llama-layout model; without it, the enumerable language."""
    methods: tuple[str, ...] = METHODS
    """Methods to compare."""
    seed: int = 0
    steps: int | None = None
    """Outer steps per method."""
    batch: int | None = None
    """Prompts per step (the enumerable language has 4, all used)."""
    pairs: int | None = None
    """Pairs per prompt and step; each costs one label."""
    max_new_tokens: int | None = None
    beta: float | None = None
    """Weight of the KL to the reference."""
    relative_sigma: float = 0.2
    """Perturbation of the stencil, sigma / beta."""
    utility_weight: float = 1.0
    """Weight of the coupled utility beside the uncoupled likelihood."""
    inner_steps: int = 1
    """Lower-level steps per outer step; 1 is the single-loop algorithm."""
    policy_learning_rate: float | None = None
    tangent_learning_rate: float | None = None
    reward_learning_rate: float | None = None
    evaluations: int = 12
    """Evaluations per method, evenly spaced."""
    output: pathlib.Path = pathlib.Path("runs")
    """Directory in which the run's folder is created."""


@dataclasses.dataclass(frozen=True)
class Settings(Config):
    """A configuration with every default filled in."""

    steps: int = 0
    batch: int = 0
    pairs: int = 0
    max_new_tokens: int = 0
    beta: float = 0.0
    policy_learning_rate: float = 0.0
    tangent_learning_rate: float = 0.0
    reward_learning_rate: float = 0.0


ENUMERABLE = {
    "steps": 800, "batch": 4, "pairs": 16, "max_new_tokens": 4, "beta": 0.3,
    "policy_learning_rate": 3e-3, "tangent_learning_rate": 1e-4, "reward_learning_rate": 1e-3,
}  # fmt: skip
PRETRAINED = {
    "steps": 115, "batch": 16, "pairs": 4, "max_new_tokens": 48, "beta": 0.3,
    "policy_learning_rate": 2e-4, "tangent_learning_rate": 1e-5, "reward_learning_rate": 1e-3,
}  # fmt: skip


def resolved(config: Config) -> Settings:
    """Returns the configuration with the task's defaults for values that were omitted."""
    defaults = ENUMERABLE if config.policy is None else PRETRAINED
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    settings = Settings(**(defaults | {name: value for name, value in values.items() if value is not None}))
    check(settings)
    return settings


def check(config: Settings) -> None:
    """Raises ValueError for values that no task can use."""
    for method in config.methods:
        if method not in METHODS:
            raise ValueError(f"There is no method {method!r}; choose from {', '.join(METHODS)}.")
    if not config.methods:
        raise ValueError(f"--methods needs at least one method of {', '.join(METHODS)}.")
    for name in ("steps", "batch", "max_new_tokens", "inner_steps", "evaluations"):
        if getattr(config, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(config, name)}.")
    if config.pairs < 2:
        raise ValueError(f"--pairs {config.pairs}: every prompt needs at least 2 pairs, to compare one with the other.")
    for name in ("policy_learning_rate", "tangent_learning_rate", "reward_learning_rate"):
        if not 0 <= getattr(config, name) < float("inf"):
            raise ValueError(f"--{name.replace('_', '-')} must be a number of at least 0, got {getattr(config, name)}.")
    if not 0 <= config.utility_weight < float("inf"):
        raise ValueError(f"--utility-weight must be a number of at least 0, got {config.utility_weight}.")
    if not config.beta > 0:
        raise ValueError(f"--beta must be positive, got {config.beta:g}: it keeps the policy near the reference.")
    if config.policy is None and (config.batch, config.max_new_tokens) != (4, 4):
        raise ValueError("The enumerable language has 4 prompts and 4 tokens; leave out --batch and --max-new-tokens.")


def objective_of(config: Settings) -> objectives.Objective:
    """Returns the default upper objective: the uncoupled likelihood of the labels, plus the coupled win rate."""
    return objectives.add(
        objectives.likelihood(coupled=False),
        objectives.utility(kl_price=config.beta / 4, weight=config.utility_weight),
    )


def algorithm_of(method: str, config: Settings, task: Task) -> bilevel.Algorithm:
    """Returns one method; only the hypergradient rule differs."""
    rule = {
        "bilevel": lambda: bilevel.central(config.relative_sigma),
        "boltzmann": bilevel.boltzmann,
        "decoupled": bilevel.decoupled,
    }[method]()

    def adam(rate):
        # Adam's first steps have unit size whatever the gradient: without a warm-up one of them can move the policy so far
        # from its sample that the importance weights degenerate.
        warm_up = max(1, config.steps // 10)
        schedule = optax.warmup_cosine_decay_schedule(0.0, rate, warm_up, max(warm_up + 1, config.steps))
        return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))

    solver = bilevel.tangent(
        adam(config.policy_learning_rate), adam(config.tangent_learning_rate), steps=config.inner_steps
    )
    return bilevel.bilevel_descent(
        task.problem(objective_of(config)),
        rule,
        solver,
        adam(config.reward_learning_rate),
        beta=config.beta,
        annotate=task.traced_annotator,
        sequential=config.policy is not None,
    )


def run(method: str, algorithm, config: Settings, task: Task, mesh, folder: RunFolder, progress: Progress):
    """Trains one method; returns its evaluations and the final policy."""
    key = jax.random.key(config.seed)
    step = make_outer_step(compile_algorithm(algorithm, mesh), task.host_annotator)
    state = algorithm.init(key, task.upper, task.frozen.reference)
    state, frozen = replicate((state, task.frozen), mesh)
    every = -(-config.steps // config.evaluations)
    history, labels, losses = [], 0, []
    bar = progress.add_task(method, total=config.steps, gold=float("nan"), kl=float("nan"))

    def measure(number, state, labels):
        row = {"step": number, "labels": labels} | task.evaluate(state)
        row.setdefault("upper_loss", float(np.mean(losses[-every:])) if losses else None)
        history.append(row)
        folder.append_metrics(method=method, kind="evaluation", **row)
        progress.update(bar, gold=row["true_return"], kl=row["kl"])

    measure(0, state, 0)
    batches = itertools.islice(task.batches(), config.steps)
    for outer in outer_steps(step, state, batches, frozen, key=key):
        if outer.info is not None:
            labels += int(outer.info.labels)
            losses.append(float(outer.info.upper_loss))
            folder.append_metrics(method=method, kind="step", step=len(losses), **outer.info._asdict())
        progress.update(bar, completed=outer.step)
        if outer.latest_info is not None and outer.step % every == 0 and outer.step < config.steps:
            measure(outer.step, outer.state, labels + int(outer.latest_info.labels))
    measure(config.steps, outer.state, labels)
    return history, outer.state.policy


NAMES = ("true_return", "win_rate", "kl", "upper_loss", "gap", "labels")
PANELS = {
    "return": ("labels", "labels", "true_return", "true return"),
    "KL": ("labels", "labels", "kl", "KL to the reference (nats)"),
    "gap": ("labels", "labels", "gap", "gap to the optimum"),
    "gold reward against KL": ("kl", "KL to the reference (nats)", "true_return", "true return"),
}


def draw(folder: RunFolder, histories: dict[str, list[dict]]) -> None:
    """Draws each panel into its own file, and all of them into curves.png."""
    panels = {}
    for title, (x, x_label, y, y_label) in PANELS.items():
        lines = {method: ([row[x] for row in rows], [row[y] for row in rows]) for method, rows in histories.items()}
        panels[title] = (x_label, y_label, lines)
        draw_curves(folder.path / f"{title.lower().replace(' ', '_')}.png", {title: panels[title]}, columns=1)
    draw_curves(folder.path / "curves.png", panels)


def tabulate(config: Settings, histories: dict[str, list[dict]]) -> Table:
    """Returns the table of the reference and of each method's last evaluation."""
    first = next(iter(histories.values()))[0] | {"labels": 0}
    rows = []
    for method, row in {"reference": first, **{method: rows[-1] for method, rows in histories.items()}}.items():
        cells = (row[name] for name in NAMES)
        rows.append((method, *(f"{cell:.3f}" if isinstance(cell, float) else cell for cell in cells)))
    title = "exact" if config.policy is None else "estimated from samples"
    return Table(title, ("method", *(name.replace("_", " ") for name in NAMES)), rows)


def report(folder: RunFolder, config: Settings, task: Task, histories, samples, seconds, console: Console):
    """Writes results, samples and figures, and prints the table."""
    # Where the optimum is only a lower bound, the best measured value may be a tighter one.
    optimum = max([task.optimum, *(row["value"] for rows in histories.values() for row in rows)])
    for rows in histories.values():
        for row in rows:
            row["gap"] = optimum - row["value"]
    first = next(iter(histories.values()))[0]
    folder.write_json(
        "results.json",
        {
            "methods": {method: rows[-1] for method, rows in histories.items()},
            "reference": {**first, "gold_standard_deviation": task.spread, "optimum": optimum},
            "seconds": seconds,
            "seed": config.seed,
            "config": config,
        },
    )
    lines = []
    for method, rows in samples.items():
        lines += [f"## {method}", *(f"[{prompt}] {text}" for prompt, text in rows), ""]
    folder.write_text("samples.txt", "\n".join(lines))
    draw(folder, histories)
    table = tabulate(config, histories)
    reference = f"{first['true_return']:.3f}, standard deviation {task.spread:.3f}"
    summary = f"Gold reward of the reference: {reference}. {seconds:.0f} s."
    texts = zip(*([text for _, text in rows] for rows in samples.values()), strict=True)
    prompts = (prompt for prompt, _ in next(iter(samples.values())))
    write_report(
        folder.path,
        title="Online RLHF as one bilevel problem",
        summary=summary,
        tables=[table],
        figures=["curves.png"],
        config=config,
        samples=[Samples("Completions", tuple(samples), list(zip(prompts, texts, strict=True)))],
    )
    console.print(rich_table(table))
    console.print(f"{summary} Report, config, metrics, results, samples and figures are in:")
    console.print(str(folder.path), soft_wrap=True)


def main(requested: Config) -> None:
    """Runs every method in turn and reports."""
    console, began = Console(), time.monotonic()
    try:
        config = resolved(requested)
        # The enumerable language has four prompts, so it uses as many devices as divide them.
        devices = jax.devices()[: math.gcd(config.batch, jax.device_count())] if config.policy is None else None
        mesh = data_mesh(devices)
        check_batch(config.batch, mesh)
        objective = objective_of(config)
        if config.policy is None:
            task = enumerable_task(config.seed, objective, beta=config.beta, pairs=config.pairs)
        else:
            task = pretrained_task(
                config.policy,
                config.seed,
                objective,
                beta=config.beta,
                batch=config.batch,
                pairs=config.pairs,
                max_new_tokens=config.max_new_tokens,
            )
        algorithms = {method: algorithm_of(method, config, task) for method in config.methods}
        folder = RunFolder(config.output, "online_rlhf")
    except ValueError as error:
        print(f"online_rlhf: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    folder.write_json("config.json", config)
    histories, samples = {}, {"before": task.complete(task.frozen.reference)}
    columns = (
        TextColumn("{task.description:10}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("gold {task.fields[gold]:6.3f}  KL {task.fields[kl]:5.2f}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        for method, algorithm in algorithms.items():
            histories[method], policy = run(method, algorithm, config, task, mesh, folder, progress)
            samples[method] = task.complete(policy)
    report(folder, config, task, histories, samples, time.monotonic() - began, console)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
