"""The weights of six given scores: learned through the policy, fitted to labels, equal, or searched.

    python experiments/mixture.py --policy DIR            # DIR: a small model of stories
    python experiments/mixture.py --policy DIR --quick    # 3 seeds, fewer stories

The reward is a weighted sum of six scores of a text, none of which is what the annotator wants: that is a checklist which
no weighted sum can hold. A policy chooses among many responses of a pretrained model to each opening, tilted by the reward
over beta; all its figures are exact. Every run pays for the same labels; the utility is the win rate against the model
itself less a price for each nat of KL.
"""

import dataclasses
import functools
import pathlib
import re
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from frontier_tasks import SPEECH, reference_pool
from one_run import publish
from one_run_exact import BETAS, ITERATED, SCALED, Bounds, Budget, Rates, bounds_of, run_method, utility_of_reward
from rich.console import Console
from stories import GLAD, SORRY, StoryModel, load_stories

from jaxrlhf import bandit, exact
from jaxrlhf.evaluation.statistics import student_interval
from jaxrlhf.training.figures import draw_curves
from jaxrlhf.training.report import Table
from jaxrlhf.training.run_folder import RunFolder


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z']+", text.lower())


SCORES: dict[str, Callable[[str], float]] = {
    "glad words": lambda text: len(set(GLAD.findall(text.lower()))),
    "sorry words, less": lambda text: -len(set(SORRY.findall(text.lower()))),
    "speech": lambda text: float(bool(SPEECH.search(text))),
    "repetitions, less": lambda text: len(set(_words(text))) - len(_words(text)),
    "characters": len,
    "sentences": lambda text: len(re.findall(r"[.!?]", text)),
}
"""The given scores; more is better, as somebody would set them up by hand."""

GOLDS: dict[str, Callable[[dict[str, float]], float]] = {
    "checklist": lambda s: 4.0 * (s["glad words"] >= 1 and s["sorry words, less"] == 0 and s["sentences"] >= 2),
    "restraint": lambda s: (
        2.0 * min(s["glad words"], 2) - 0.3 * max(s["characters"] - 75, 0) + (s["repetitions, less"] >= -1)
    ),
}
"""The annotator's gold rewards: a glad story that ends its sentences; glad words, but briefly and without repetition."""

FITTED, EQUAL, SEARCH = "fitted once", "equal weights", "random search"
METHODS = (SCALED, ITERATED, FITTED, EQUAL, SEARCH)
CANDIDATES = 16
"""Weights that the random search tries, with an equal part of the labels each."""


@dataclasses.dataclass(frozen=True)
class Config:
    """What to compare."""

    policy: pathlib.Path
    """Hugging Face directory of a small model of stories."""
    kl_price: float = 0.03
    """What a nat of KL is worth, in win rate against the reference."""
    seeds: int = 20
    first_seed: int = 0
    steps: int = 200
    """Outer steps of a run, with 2 labelled pairs of each opening."""
    responses: int = 512
    """Responses of the model to each opening, among which policies choose."""
    reward_learning_rate: float | None = None
    """Adam's, of the weights; by default `RATES`."""
    scale_learning_rate: float = 0.05
    utility_weight: float = 10.0
    quick: bool = False
    """3 seeds and 64 responses."""
    output: pathlib.Path = pathlib.Path("runs")
    """Directory in which the run's folder is created."""


RATES = {SCALED: 0.01, ITERATED: 0.05}
"""Adam's learning rates of the weights, chosen on seeds from 100 on: of 0.01 and 0.03, and of 0.01, 0.02 and 0.05."""


class Result(NamedTuple):
    """A method under a gold reward.

    Attributes:
        gold, method: names.
        utility: `[seeds, betas]`.
        bounds: of the problem.
        labels: of a run.
    """

    gold: str
    method: str
    utility: np.ndarray
    bounds: Bounds
    labels: int

    @property
    def share(self) -> np.ndarray:
        """The utility as a share of what the best policy gains over the reference, `[seeds, betas]`."""
        return (self.utility - self.bounds.reference) / (self.bounds.optimum - self.bounds.reference)


def problem_of(stories: StoryModel, gold: str, *, responses: int) -> bandit.Bandit:
    """Returns the responses as arms: standardised scores as features, the gold reward, a uniform reference."""
    pool = reference_pool(stories, responses, seed=7)
    texts = stories.texts(stories.openings, pool)
    rows = [{name: float(score(text)) for name, score in SCORES.items()} for text in texts]
    scores = np.array([list(row.values()) for row in rows])
    scores = (scores - scores.mean(axis=0)) / scores.std(axis=0)
    shape = (len(stories.openings.tokens), responses)
    golds = np.array([GOLDS[gold](row) for row in rows]).reshape(shape)
    reference = jnp.full(shape, -jnp.log(1.0 * responses))
    return bandit.Bandit(
        jnp.asarray(scores.reshape(*shape, -1), jnp.float32), jnp.asarray(golds, jnp.float32), reference
    )


def fit_once(frozen: bandit.Bandit, labels: int, key: jax.Array) -> jax.Array:
    """Returns weights `[K]` of the greatest likelihood of labels, of pairs that are drawn from the reference."""
    arm_key, context_key, label_key = jax.random.split(key, 3)
    contexts, arms = frozen.gold.shape
    context = jax.random.randint(context_key, (labels,), 0, contexts)
    pair = jax.random.randint(arm_key, (2, labels), 0, arms)
    first, second = (frozen.features[context, each] for each in pair)
    odds = frozen.gold[context, pair[0]] - frozen.gold[context, pair[1]]
    wins = jax.random.bernoulli(label_key, jax.nn.sigmoid(odds)).astype(jnp.float32)
    difference = first - second

    def newton(weights, _):
        probability = jax.nn.sigmoid(difference @ weights)
        gradient = difference.T @ (probability - wins)
        curvature = (difference * (probability * (1 - probability))[:, None]).T @ difference
        return weights - jnp.linalg.solve(curvature + jnp.eye(len(weights)), gradient), None

    return jax.lax.scan(newton, jnp.zeros(frozen.features.shape[-1]), None, length=20)[0]


def search(frozen: bandit.Bandit, kl_price: float, labels: int, key: jax.Array) -> jax.Array:
    """Returns the log-tilt `[K]` of the best of `CANDIDATES` policies, each judged by its part of the labels.

    Log-tilts are half-normal, so that signs are known, times a scale that is log-uniform between 0.1 and 2.
    """
    tilt_key, scale_key, label_key = jax.random.split(key, 3)
    scale = jnp.exp(jax.random.uniform(scale_key, (CANDIDATES, 1), minval=jnp.log(0.1), maxval=jnp.log(2.0)))
    tilts = scale * jnp.abs(jax.random.normal(tilt_key, (CANDIDATES, frozen.features.shape[-1])))

    def measure(tilt, key):
        policy = exact.soft_policy(frozen.features @ tilt, frozen.reference, 1.0)
        result = exact.evaluate_policy(policy, frozen.reference, frozen.gold, 1.0)
        wins = jax.random.binomial(key, labels // CANDIDATES, result.win_rate)
        return wins / (labels // CANDIDATES) - kl_price * result.kl

    estimates = jax.vmap(measure)(tilts, jax.random.split(label_key, CANDIDATES))
    return tilts[jnp.argmax(estimates)]


def run(name: str, frozen: bandit.Bandit, config: Config) -> tuple[np.ndarray, int]:
    """Returns a method's utility `[seeds, betas]` and the labels of one run."""
    contexts, _, features = frozen.features.shape
    budget = Budget(config.seeds, config.steps, 2, contexts, features)
    if name in (SCALED, ITERATED):
        rate = RATES[name] if config.reward_learning_rate is None else config.reward_learning_rate
        rates = Rates(reward=rate, scale=config.scale_learning_rate, weight=config.utility_weight)
        outcome = run_method(name, frozen, config.kl_price, budget, rates, first_seed=config.first_seed)
        return outcome.utility, budget.labels
    keys = jax.vmap(jax.random.key)(jnp.arange(config.first_seed, config.first_seed + config.seeds))
    utility = functools.partial(utility_of_reward, frozen=frozen, kl_price=config.kl_price)
    if name == SEARCH:
        tilts = jax.jit(jax.vmap(lambda key: search(frozen, config.kl_price, budget.labels, key)))(keys)
        found = jax.jit(jax.vmap(utility))(tilts)
        return np.repeat(np.asarray(found, float)[:, None], len(BETAS), axis=1), budget.labels
    if name == EQUAL:
        weights = jnp.ones((config.seeds, features))
    else:
        weights = jax.jit(jax.vmap(lambda key: fit_once(frozen, budget.labels, key)))(keys)
    at_betas = jax.vmap(lambda weights: jax.vmap(lambda beta: utility(weights / beta))(jnp.asarray(BETAS)))
    return np.asarray(jax.jit(at_betas)(weights), float), 0 if name == EQUAL else budget.labels


def table_of(results: list[Result]) -> Table:
    """Returns the shares of one gold reward by method and beta."""
    rows = []
    for each in results:
        means = each.share.mean(axis=0)
        cells = [_with_interval(column) for column in each.share.T]
        if each.method == SEARCH:
            cells = [cells[0], *["the same"] * (len(BETAS) - 1)]
        rows.append((each.method, *cells, f"{means.min():.3f}", f"{means.max():.3f}", f"{each.labels:,}"))
    bounds = results[0].bounds
    reachable = (bounds.best_in_class - bounds.reference) / (bounds.optimum - bounds.reference)
    title = f"{results[0].gold}: share of the gain of the best policy; the best weights reach {reachable:.3f}"
    return Table(title, ("weights", *[f"beta {beta:g}" for beta in BETAS], "worst", "best", "labels"), rows)


def differences(results: list[Result]) -> Table:
    """Returns what learned weights gain, from their worst beta, over each other method at its best beta, seed by seed."""
    rows = []
    for gold in dict.fromkeys(each.gold for each in results):
        of_gold = {each.method: each.share for each in results if each.gold == gold}
        ours = of_gold.pop(SCALED)
        ours = ours[:, ours.mean(axis=0).argmin()]
        for name, share in of_gold.items():
            rows.append((gold, name, _with_interval(ours - share[:, share.mean(axis=0).argmax()])))
    title = (
        "Learned through the policy at its worst beta, less the other at its best: difference of shares, 95% interval"
    )
    return Table(title, ("gold", "less", "difference"), rows)


def _with_interval(values: np.ndarray) -> str:
    mean, half = np.mean(values), student_interval(values)[1] if np.std(values) > 0 else 0.0
    return f"{mean:.3f} ± {half:.3f}"


def main(config: Config) -> pathlib.Path:
    """Runs the study; returns its folder."""
    console, began = Console(), time.monotonic()
    if config.quick:
        config = dataclasses.replace(config, seeds=3, responses=64)
    try:
        if config.seeds < 2 or config.steps < 2 or config.responses < 2 or not config.kl_price > 0:
            raise ValueError("--seeds, --steps and --responses must be at least 2, and --kl-price positive.")
        stories = load_stories(config.policy, max_new_tokens=24)
        folder = RunFolder(config.output, "mixture")
    except ValueError as error:
        print(f"mixture: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    folder.write_json("config.json", config)
    results = []
    for gold in GOLDS:
        frozen = problem_of(stories, gold, responses=config.responses)
        bounds = bounds_of(frozen, config.kl_price)
        for name in METHODS:
            utility, labels = run(name, frozen, config)
            results.append(Result(gold, name, utility, bounds, labels))
            console.print(f"{gold}, {name}: {time.monotonic() - began:.0f} s")
    report(folder, config, results, time.monotonic() - began, console)
    return folder.path


def report(folder: RunFolder, config: Config, results: list[Result], seconds: float, console: Console) -> None:
    """Writes results.json, the figure and the report, and prints the tables."""
    named: list[dict[str, Any]] = [each._asdict() for each in results]
    folder.write_json("results.json", {"config": config, "betas": BETAS, "seconds": seconds, "results": named})
    logs, panels = [float(np.log10(beta)) for beta in BETAS], {}
    for gold in GOLDS:
        lines = {}
        for each in results:
            if each.gold == gold:
                half = np.array([student_interval(column)[1] if column.std() else 0.0 for column in each.share.T])
                mean = each.share.mean(axis=0)
                lines[each.method] = (logs, list(mean), list(mean - half), list(mean + half))
        panels[gold] = ("log10 beta", "share of the best utility", lines)
    draw_curves(folder.path / "mixture.png", panels)
    tables = [differences(results), *[table_of([each for each in results if each.gold == gold]) for gold in GOLDS]]
    summary = f"Price {config.kl_price:g} of win rate a nat, {config.seeds} seeds, {seconds:.0f} s."
    publish(
        folder,
        config,
        console,
        title="The weights of given scores",
        summary=summary,
        tables=tables,
        figure="mixture.png",
    )


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
