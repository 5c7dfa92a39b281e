"""The run with networks: an enumerable language of letters, or a pretrained model, by any of three methods.

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
class Settings:
    """What is run, every default filled in; the options are explained in `online_rlhf.py`."""

    policy: pathlib.Path | None
    methods: tuple[str, ...]
    seed: int
    steps: int
    batch: int
    pairs: int
    max_new_tokens: int
    beta: float
    relative_sigma: float
    utility_weight: float
    inner_steps: int
    policy_learning_rate: float
    tangent_learning_rate: float
    reward_learning_rate: float
    evaluations: int
    output: pathlib.Path


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
    state = jax.jit(algorithm.init)(key, task.upper, task.frozen.reference)
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


def main(config: Settings) -> None:
    """Runs every method in turn and reports."""
    console, began = Console(), time.monotonic()
    try:
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
