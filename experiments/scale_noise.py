r"""How well one step's labels tell the direction of the log scale, beside that of the reward network.

    python experiments/scale_noise.py --policy DIR        # DIR: stories260K

A run of `one_run.py` on the stories (bilevel, learned scale) is stopped at a few steps. From each of its states many
steps' labels are drawn, without being learned from, and each gives a gradient. Reported are, for the log scale and for
the reward network, the standard error of one step's gradient over the size of its mean (below 1, a step's labels know
the direction), and the standard error of the marginal price, in win rate a nat, that one step's labels tell. The pairs
are the policy's own (`preferences.self_play`), or with the reference.
"""

import dataclasses
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import one_run_stories
import optax
import tyro
from frontier import Config as FrontierConfig
from frontier import setup_of
from frontier_harness import Budget as HarnessBudget
from frontier_harness import gold_of_runs, prompt_order
from frontier_methods import RATES, Setup, parts_of
from one_run import publish
from rich.console import Console
from stories import StoryModel, load_stories

from jaxrlhf import bilevel, preferences
from jaxrlhf.algorithms import methods
from jaxrlhf.bilevel import Labelled
from jaxrlhf.lm.pairing import Prompts
from jaxrlhf.lm.problem import LanguageFrozen
from jaxrlhf.preferences.scale import scale_optimizer
from jaxrlhf.training.figures import draw_curves
from jaxrlhf.training.report import Table
from jaxrlhf.training.run_folder import RunFolder


@dataclasses.dataclass(frozen=True)
class Config:
    """What to measure."""

    policy: pathlib.Path
    """Hugging Face directory of a small model of stories."""
    kl_price: float = 0.03
    """What a nat of KL is worth, in win rate against the reference."""
    beta: float = 0.25
    """Of the run."""
    steps: tuple[int, ...] = (8, 16, 32, 64)
    """Steps after which the run is stopped."""
    draws: int = 64
    """Gradients from each state, of the labels of one step each."""
    seed: int = 0
    output: pathlib.Path = pathlib.Path("runs")
    """Directory in which the study's folder is created."""


def gradients(setup: Setup, price: float, beta: float, *, against: methods.Against):
    """Returns `propose` and `gradient`, over leading axes of keys and samples.

    `gradient` returns that of the log scale and of the reward's parameters, and d KL / d log scale in nats.
    """
    parts = parts_of(setup, RATES["boltzmann"], methods.METHODS["bilevel"], kl_price=price)._replace(
        rule=bilevel.boltzmann(), scaled=True, utility_weight=1.0,
        reward_optimizer=scale_optimizer(optax.sgd(1.0), optax.sgd(1.0)),
        policy_optimizer=optax.set_to_zero(), reference_responses=one_run_stories.REFERENCE_RESPONSES, steps=1,
    )  # fmt: skip
    algorithm = methods.bilevel(parts, beta, against=against)

    def propose(key, upper, lower, prompts, frozen):
        return algorithm.propose(key, algorithm.init(key, upper, lower), prompts, frozen)

    def gradient(key, upper, lower, labelled, frozen):
        after, info = algorithm.update(key, algorithm.init(key, upper, lower), labelled, frozen)
        return jax.tree.map(jnp.subtract, upper, after.upper), info.kl_slope

    batched = (0, None, None, 0, None)
    return jax.jit(jax.vmap(propose, in_axes=batched)), jax.jit(jax.vmap(gradient, in_axes=batched))


def relative_error(draws: Any) -> float:
    """Returns sqrt(E |g - mean g|^2) / |mean g| of gradients, leaves `[N, ...]`, with the mean's own noise taken off."""
    flat = np.concatenate(
        [np.asarray(leaf, np.float64).reshape(len(leaf), -1) for leaf in jax.tree.leaves(draws)], axis=1
    )
    noise = flat.var(axis=0, ddof=1).sum()
    signal = np.square(flat.mean(axis=0)).sum() - noise / len(flat)
    return float(np.sqrt(noise / signal)) if signal > 0 else float("inf")


def states_of(config: Config, stories: StoryModel, setup: Setup, first_reward: Any):
    """Yields step, upper and lower parameters of one run of `one_run.py` at each of the steps."""
    budget = one_run_stories.Budget((config.seed,), max(config.steps), setup.batch, repeats=8)
    price = one_run_stories.Price(config.kl_price, 1.0, 0.1)
    runner = one_run_stories.compile_runs(one_run_stories.SCALED, stories, setup, price, first_reward, budget)
    shared = HarnessBudget(budget.seeds, (), budget.steps, budget.batch, evaluations=1)
    order = prompt_order(len(stories.openings.tokens), shared, config.seed)
    frozen, beta = LanguageFrozen(stories.start), jnp.array([config.beta])
    states = runner.init(jax.random.key(config.seed)[None], beta, frozen)
    for step in range(budget.steps):
        keys = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), step), 3)[:, None]
        prompts = Prompts(*(leaf[order[step]][None] for leaf in stories.openings))
        sample = runner.propose(keys[0], states, beta, prompts, frozen)
        scores = jnp.asarray(gold_of_runs(stories.score, sample.prompts, sample.responses))
        labels = jax.vmap(preferences.draw_labels)(keys[1], scores)
        states = runner.update(keys[2], states, beta, Labelled(sample, labels), frozen)
        if step + 1 in config.steps:
            yield (
                step + 1,
                *(jax.tree.map(lambda leaf: jnp.copy(leaf[0]), part) for part in (states.upper, states.policy)),
            )


def main(config: Config) -> pathlib.Path:
    """Runs the study; returns its folder."""
    console, began = Console(), time.monotonic()
    folder = RunFolder(config.output, "scale_noise")
    folder.write_json("config.json", config)
    stories = load_stories(config.policy, max_new_tokens=24)
    setup, first_reward = setup_of(FrontierConfig(policy=config.policy, steps=max(config.steps)), stories, "whole")
    frozen, rows = LanguageFrozen(stories.start), []
    pairs: dict[str, methods.Against] = {"the policy's own": "self", "with the reference": "reference"}
    measures = {
        name: gradients(setup, config.kl_price, config.beta, against=against) for name, against in pairs.items()
    }
    chosen = np.random.default_rng(config.seed).integers(len(stories.openings.tokens), size=(config.draws, setup.batch))
    prompts = Prompts(*(leaf[chosen] for leaf in stories.openings))
    for step, upper, lower in states_of(config, stories, setup, first_reward):
        keys = jax.random.split(jax.random.fold_in(jax.random.key(config.seed + 1), step), 3 * config.draws).reshape(
            3, -1
        )
        for name, (propose, gradient) in measures.items():
            sample = propose(keys[0], upper, lower, prompts, frozen)
            scores = jnp.asarray(gold_of_runs(stories.score, sample.prompts, sample.responses))
            labelled = Labelled(sample, jax.vmap(preferences.draw_labels)(keys[1], scores))
            found, kl_slope = gradient(keys[2], upper, lower, labelled, frozen)
            row = {
                "step": step, "pairs": name, "scale": float(jnp.exp(upper.log_scale)),
                "log_scale": relative_error(found.log_scale), "network": relative_error(found.reward),
                "mean": float(found.log_scale.mean()), "deviation": float(found.log_scale.std(ddof=1)),
                "price": float(found.log_scale.std(ddof=1) / kl_slope.mean()),
            }  # fmt: skip
            rows.append(row)
            folder.append_metrics(**row)
    columns = (
        "step",
        "pairs",
        "scale",
        "mean gradient",
        "its deviation",
        "log scale: error / mean",
        "network: error / mean",
        "error of the marginal price",
    )
    names = ("step", "pairs", "scale", "mean", "deviation", "log_scale", "network", "price")
    cells = [tuple(row[name] if name in ("step", "pairs") else f"{row[name]:.3g}" for name in names) for row in rows]
    table = Table(f"Gradients from one step's labels, {config.draws} draws", columns, cells)
    lines = {
        f"{part}, pairs {name}": ([row["step"] for row in rows if row["pairs"] == name],
                                  [row[part] for row in rows if row["pairs"] == name])
        for name in pairs for part in ("log_scale", "network")
    }  # fmt: skip
    draw_curves(
        folder.path / "scale_noise.png", {"one step's gradient": ("step", "standard error / size of the mean", lines)}
    )
    folder.write_json("results.json", {"config": config, "rows": rows})
    summary = f"Price {config.kl_price:g}, beta {config.beta:g}, {time.monotonic() - began:.0f} s."
    publish(
        folder,
        config,
        console,
        title="Noise of the scale's gradient",
        summary=summary,
        tables=[table],
        figure="scale_noise.png",
    )
    return folder.path


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
