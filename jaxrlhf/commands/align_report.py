"""The plan, the measurements and the report of `jaxrlhf align`."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from rich.console import Console

from jaxrlhf.algorithms.methods import METHODS
from jaxrlhf.base.types import Params
from jaxrlhf.commands.align_config import Align, estimator_of
from jaxrlhf.commands.comparison import Comparison, comparison_table
from jaxrlhf.commands.compilation import cache_text
from jaxrlhf.commands.method_flags import beta_of, learns_scale
from jaxrlhf.commands.methods import labels_per_step
from jaxrlhf.commands.models import Model
from jaxrlhf.commands.running import finish
from jaxrlhf.lm.memory import MemoryPlan
from jaxrlhf.training.figures import draw_curves
from jaxrlhf.training.progress import bytes_text, count_text, print_table
from jaxrlhf.training.report import Samples, Table
from jaxrlhf.training.run_folder import RunFolder
from jaxrlhf.training.tracking import Tracker


def print_plan(console: Console, config: Align, policy: Model, memory: MemoryPlan, notes: list[str]) -> None:
    """Prints what the run will do, before its memory is allocated."""
    count = sum(leaf.size for leaf in jax.tree.leaves(policy.params))
    completions, labels = 2 * config.batch_size * config.pairs, labels_per_step(config)
    sizes = ", ".join(f"{name} {bytes_text(size)}" for name, size in memory.sizes.items() if size > 1000)
    rows = {
        "model": f"{policy.config.family}, {count_text(count)} parameters, {config.policy}",
        "trained": f"adapters of rank {config.lora_rank}" if config.lora_rank else "all weights",
        "memory": f"{bytes_text(memory.total)}, {memory.relative_to():.2f} times the base ({sizes})",
        "reward": _reward_text(config),
        "trade-off": trade_off(config),
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "per step": f"{completions} completions of at most {config.max_new_tokens} tokens, {labels:,} labels",
        "total": f"{config.steps} steps, {config.steps * labels:,} labels",
    }
    if config.reuse:
        rows["kept labels"] = f"at most {config.kept_labels:,}, {config.reuse} updates from them per step"
    rows["compiled programs"] = cache_text()
    print_table(console, title_of(config), rows | policy.plan_rows() | {"prompts": "\n".join(notes)})


def trade_off(config: Align) -> str:
    """Returns what holds the policy near the reference."""
    if config.target_kl is not None:
        return f"a KL of {config.target_kl:g} nats at the end"
    if learns_scale(config) or METHODS[config.method].weighs == "kl_price":
        learned = f"; the reward's scale is learned, from a beta of {beta_of(config):g}" if learns_scale(config) else ""
        return f"{config.kl_price:g} of win rate a nat of KL{learned}"
    given = "" if config.beta is not None else ", from --kl-price"
    return f"a beta of {beta_of(config):g}{given}"


def title_of(config: Align) -> str:
    """Returns the title of a run, from its method."""
    return "Bilevel alignment" if config.method == "bilevel" else f"Alignment by {config.method}"


class Recorder:
    """Compares policies with the reference, and writes a run's measurements to its metrics and its tracker.

    Attributes:
        rows: diagnostics of the steps so far.
    """

    def __init__(
        self,
        folder: RunFolder,
        tracker: Tracker,
        compare: Callable[[Params], Comparison],
        *,
        reference: Params,
        policy_of: Callable[[Any], Params],
        kl_price: float,
        rewards: Sequence[str] = (),
        further: Callable[[Any], dict[str, float]] = lambda state: {},
    ):
        """Starts from the metrics that the folder of a resumed run already has, and compares the reference with itself.

        Args:
            folder: of the run.
            tracker: of the run.
            compare: of `policy_comparer`.
            reference: parameters.
            policy_of: `(state) -> ` the deployed policy's parameters.
            kl_price: cost of KL in the score of an evaluation, per nat.
            rewards: names of the scores of a mixture.
            further: `(state) -> ` what else is written with each evaluation, such as the learned scale.
        """
        self.rows = [row for row in folder.metrics() if "labels" in row]
        self._folder, self._tracker, self._compare = folder, tracker, compare
        self._policy_of, self._kl_price, self._rewards = policy_of, kl_price, rewards
        self._further = further
        self._reference, self._latest = compare(reference), None

    def log_step(self, number: int, info: dict[str, Any]) -> dict[str, float]:
        """Writes a step's diagnostics; returns what the progress bar shows."""
        row = {name: math.nan if value is None else float(value) for name, value in self._scalars(info).items()}
        self._folder.append_metrics(step=number, **row)
        self._tracker.log(number, row)
        self.rows.append({"step": number} | row)
        shown = {"KL": "kl", "beta": "beta", "age": "age", "ESS": "ess_fraction"}
        # The effective sample size of fresh pairs alone is no news.
        shown = shown if "age" in row else {title: name for title, name in shown.items() if title != "ESS"}
        return {title: row[name] for title, name in shown.items() if name in row}

    def _scalars(self, info: dict[str, Any]) -> dict[str, Any]:
        """Returns diagnostics without nesting; an outer algorithm's, such as replay's, replace an inner one's."""
        inner, own = {}, {}
        for name, value in info.items():
            nested = value._asdict() if hasattr(value, "_asdict") else value
            if isinstance(nested, dict):
                inner |= self._scalars(nested)
            elif name in ("weights", "gains"):
                values = zip(self._rewards, np.asarray(value, float).tolist(), strict=True)
                own |= {f"{name.removesuffix('s')}/{reward}": each for reward, each in values}
            else:
                own[name] = value
        return inner | own

    def evaluate(self, number: int, state: Any) -> float:
        """Compares a state's policy with the reference; returns its win rate minus the cost of its KL."""
        self._latest = self._compare(self._policy_of(state))
        summary = self._latest.summary() | self._further(state)
        self._folder.append_metrics(step=number, **summary)
        self._tracker.log(number, {f"held_out/{name}": value for name, value in summary.items()})
        return summary["win_rate"] - self._kl_price * summary["kl"]

    def unchanged(self) -> dict[str, Comparison]:
        """Returns the comparisons of the reference, for itself and in place of the aligned policy."""
        return {"reference": self._reference, "aligned": self._reference}

    def comparisons(self, state: Any) -> dict[str, Comparison]:
        """Returns the comparisons of the reference and of the final policy.

        Args:
            state: the last one, whose policy is compared here where a run was resumed after its last step.
        """
        latest = self._compare(self._policy_of(state)) if self._latest is None else self._latest
        return {"reference": self._reference, "aligned": latest}


def write_align_report(
    folder: RunFolder,
    config: Align,
    comparisons: dict[str, Comparison],
    rows: list[dict[str, Any]],
    notes: list[str],
    seconds: float,
    tables: Sequence[Table] = (),
) -> None:
    """Writes curves, results.json and the report.

    Args:
        folder: of the run.
        config: of the run.
        comparisons: of the reference and of the aligned policy.
        rows: diagnostics by step.
        notes: for the report.
        seconds: that the run took.
        tables: shown after the comparison.
    """
    reference, aligned = comparisons["reference"], comparisons["aligned"]
    labels = sum(row["labels"] for row in rows)
    _draw(folder, config, rows, [{"step": 0, **reference.summary()}, *_evaluations(folder)])
    results = {name: comparison.summary() for name, comparison in comparisons.items()}
    folder.write_json("results.json", results | {"labels": labels, "seconds": seconds})
    finish(
        folder,
        config,
        comparison_table(comparisons, labels={"reference": 0, "aligned": int(labels)}),
        title=title_of(config),
        summary=f"{config.steps} steps and {labels:,.0f} labels in {seconds:.0f} s. {_where(config)}",
        further=tables,
        figures=["curves.png"],
        samples=[Samples("Completions of held-out prompts", ("reference", "aligned"), aligned.samples[:8])],
        notes=notes,
    )


def _evaluations(folder: RunFolder) -> list[dict[str, Any]]:
    return [row for row in folder.metrics() if "win_rate" in row]


def _reward_text(config: Align) -> str:
    if METHODS[config.method].learns != "reward":
        return "none is learned" if METHODS[config.method].learns == "policy" else "the policy's log-ratio"
    model = "a new reward model" if config.reward is None else f"the reward model {config.reward}"
    if not config.rewards:
        return model
    return f"a mixture of {', '.join(config.rewards)}{f' and {model}' if config.reward_network else ''}"


def _where(config: Align) -> str:
    if METHODS[config.method].learns != "reward":
        return "The model is in policy; this method learns no reward model."
    if config.rewards and not config.reward_network:
        return "The model is in policy, the mixture of rewards in mixture.json."
    return "The models are in policy and reward."


def method_notes(rows: list[dict[str, Any]]) -> list[str]:
    """Returns sentences on kept labels and on a beta that was moved, from the diagnostics by step."""
    notes = []
    if rows and "age" in rows[-1]:
        smallest = min(row["ess_fraction"] for row in rows)
        notes.append(
            f"Labels were kept and used again: their mean age was {rows[-1]['age']:.1f} steps at the end; the smallest "
            f"effective sample size of an update was {smallest:.0%} of its pairs."
        )
    if rows and "beta" in rows[-1]:
        notes.append(f"The weight of the KL was moved towards the target KL and was {rows[-1]['beta']:.3g} at the end.")
    return notes


PANELS = (
    ("Upper loss", "upper_loss", "nats"),
    ("Loss", "loss", "nats"),
    ("Coupling fraction", "coupling_fraction", "fraction"),
    ("Effective sample size", "ess_fraction", "fraction"),
    ("Age of kept labels", "age", "steps"),
    ("Weight of the KL", "beta", "reward per nat"),
)
"""Curves of a run's diagnostics: title, field and unit. A run shows those that its method has."""


def _draw(folder: RunFolder, config: Align, rows: list[dict[str, Any]], evaluations: list[dict[str, Any]]) -> None:
    name = estimator_of(config) if config.method == "bilevel" else config.method
    panels: dict[str, Any] = {}

    def add(title: str, field: str, unit: str, source: list[dict[str, Any]]) -> None:
        panels[title] = "step", unit, {name: ([row["step"] for row in source], [row[field] for row in source])}

    add("Win rate against the reference", "win_rate", "fraction", evaluations)
    add("KL to the reference", "kl", "nats", evaluations)
    for title, field, unit in PANELS:
        # The effective sample size of fresh pairs alone is no news.
        measured = [row for row in rows if field in row and (field != "ess_fraction" or "age" in row)]
        if measured:
            add(title, field, unit, measured)
    if config.rewards and rows:
        steps = [row["step"] for row in rows]
        lines = {name: (steps, [row[f"weight/{name}"] for row in rows]) for name in config.rewards}
        panels["Weights of the rewards"] = ("step", "reward per standard deviation", lines)
    draw_curves(folder.path / "curves.png", panels)
