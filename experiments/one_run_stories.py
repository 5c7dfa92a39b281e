"""The stories of `one_run.py`: a pretrained model, two hidden gold rewards, every method from every start.

All runs of a method, seeds by starts, are one program (`vmap`). Each spends the same labels and generates as many
responses; a run's policy is measured by its utility, win rate against the reference less the stated price of its KL.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from frontier_harness import Budget as HarnessBudget
from frontier_harness import gold_of_runs, prompt_order, respond_to_openings
from frontier_methods import FURTHER_RATES, RATES, Method, Rates, Setup, build, parts_of, reusing
from frontier_tasks import Gold
from stories import StoryModel

from jaxrlhf import bilevel, preferences
from jaxrlhf.algorithms import methods
from jaxrlhf.algorithms.target_kl import ramp, target_kl
from jaxrlhf.bilevel import Labelled
from jaxrlhf.lm.pairing import Prompts
from jaxrlhf.lm.problem import LanguageFrozen
from jaxrlhf.preferences.scale import scale_optimizer, with_scale

SCALED, PLAIN, CONTROLLER = "bilevel, learned scale", "bilevel", "KL controller"
METHODS = (SCALED, PLAIN, "RLOO", "PPO", "GRPO", "online DPO", "offline DPO", CONTROLLER)
OTHERS = ("iterated", "implicit bilevel", "online IPO", "SAIL", "label gradient")
"""Run where they are named: the remaining methods of `jaxrlhf align`."""
BETAS = (0.1, 0.25, 0.6, 1.5, 4.0)
IPO_BETAS = (0.01, 0.03, 0.1, 0.3, 1.0)
"""IPO's beta is in win rate a nat."""
TARGETS = (0.5, 1.0, 2.0, 4.0, 8.0)
"""KLs in nats, the controller's setting in place of beta."""
REFERENCE_RESPONSES = 2
"""Responses of the reference to a prompt and step beside the pairs, in the bilevel methods."""


class Budget(NamedTuple):
    """What every run may use.

    Attributes:
        seeds: one run a seed and start.
        steps: outer steps.
        batch: prompts a step.
        repeats: responses to each opening, in a run's evaluation.
        starts: which of a method's betas, or targets, it is started at.
    """

    seeds: tuple[int, ...]
    steps: int
    batch: int
    repeats: int
    starts: tuple[int, ...] = (0, 1, 2, 3, 4)


class Outcome(NamedTuple):
    """What the runs of a method reached.

    Attributes:
        starts: beta, or the controller's target, of each column.
        utility, win_rate, kl: `[seeds, starts]`; the utility is at the stated price.
        scale: `[seeds, starts]`, the learned scale, 1 without one.
        labels, responses: of one run.
        seconds: of all runs together, with compilation.
    """

    starts: tuple[float, ...]
    utility: np.ndarray
    win_rate: np.ndarray
    kl: np.ndarray
    scale: np.ndarray
    labels: int
    responses: int
    seconds: float


class Price(NamedTuple):
    """The price that the bilevel methods are given, and how they follow it.

    Attributes:
        kl_price: kappa, in win rate a nat.
        weight: of the utility beside the likelihood.
        scale_learning_rate: Adam's, of the log scale.
    """

    kl_price: float
    weight: float
    scale_learning_rate: float


def bilevel_method(setup: Setup, rates: Rates, price: Price, *, learned: bool) -> Method:
    """Returns bilevel descent by the Boltzmann rule, in self-play, with or without a learned scale."""
    setup = setup._replace(reference_responses=REFERENCE_RESPONSES)
    method = methods.METHODS["bilevel"]
    parts = parts_of(setup, rates, method, kl_price=price.kl_price)._replace(
        rule=bilevel.boltzmann(), utility_weight=price.weight, tangent_optimizer=optax.set_to_zero(), scaled=learned
    )
    if learned:
        schedule = optax.linear_schedule(0.0, price.scale_learning_rate, setup.hold)
        parts = parts._replace(
            reward_optimizer=scale_optimizer(parts.reward_optimizer, optax.adam(schedule)),
            fit_optimizer=scale_optimizer(parts.fit_optimizer, optax.set_to_zero()),
        )

    def make(beta):
        return reusing(method, method.assemble(parts, beta), parts, beta, setup)

    return Method(make, rates, has_reward=True)


def method_of(name: str, setup: Setup, price: Price, rate_factor: float = 1.0) -> Method:
    """Returns a method by its name in `METHODS`, with its policy's learning rate multiplied."""
    key = {SCALED: "boltzmann", PLAIN: "boltzmann", CONTROLLER: "RLOO"}.get(name, name)
    rates = (RATES | FURTHER_RATES)[key]
    rates = dataclasses.replace(rates, policy=rate_factor * rates.policy)
    if name in (SCALED, PLAIN):
        return bilevel_method(setup, rates, price, learned=name == SCALED)
    return build(key, setup, rates)


class Runner(NamedTuple):
    """A compiled method over all runs: `init(keys, starts, frozen)`, `propose`, `update` and `generate`."""

    init: Callable
    propose: Callable
    update: Callable
    generate: Callable


def is_swept(name: str) -> bool:
    """Whether a method is another one, whose setting has to be found by a sweep."""
    return name not in (SCALED, PLAIN)


class Part(NamedTuple):
    """Setup and budget of the runs of a sweep that spends the labels of one run."""

    setup: Setup
    budget: Budget


def share_of(setup: Setup, budget: Budget) -> Part:
    """Returns setup and budget for one start of a sweep on the labels of one run, steps rounded up."""
    steps = max(2, -(-budget.steps // len(budget.starts)))
    hold = max(1, round(setup.hold * steps / budget.steps))
    shorter = setup._replace(steps=steps, hold=hold, buffer=steps * setup.batch)
    return Part(shorter, budget._replace(steps=steps))


def compile_runs(
    name: str,
    stories: StoryModel,
    setup: Setup,
    price: Price,
    first_reward: Callable,
    budget: Budget,
    rate_factor: float = 1.0,
) -> Runner:
    """Returns a method compiled for all runs at once, each with a beta (or a target KL) of its own.

    Args:
        name: of the method.
        stories: model and prompts.
        setup: of all methods.
        price: of the bilevel methods.
        first_reward: `key -> ` initial parameters of the learner's reward.
        budget: of a run.
        rate_factor: of the policy's learning rate.
    """
    method = method_of(name, setup, price, rate_factor)
    controlled = target_kl(
        method.make, target=ramp(1.0, steps=2 * budget.steps // 3, begin=setup.hold), beta=method.rates.beta,
        gain=0.03, proportional=1.5,
    )  # fmt: skip

    def algorithm(start):
        return controlled if name == CONTROLLER else method.make(start)

    def init(key, start, frozen):
        upper = first_reward(key) if method.has_reward else frozen.reference
        state = algorithm(start).init(key, with_scale(upper) if name == SCALED else upper, frozen.reference)
        if name != CONTROLLER:
            return state
        log_beta = state.log_beta - 0.5 * jnp.log(start)
        return state._replace(scale=start, integral=log_beta, log_beta=log_beta)

    def propose(key, state, start, prompts, frozen):
        return algorithm(start).propose(key, state, prompts, frozen)

    def update(key, state, start, labelled, frozen):
        return algorithm(start).update(key, state, labelled, frozen)[0]

    respond = functools.partial(respond_to_openings, stories, budget.repeats)
    return Runner(
        init=jax.jit(jax.vmap(init, in_axes=(0, 0, None))),
        propose=jax.jit(jax.vmap(propose, in_axes=(0, 0, 0, 0, None))),
        update=jax.jit(jax.vmap(update, in_axes=(0, 0, 0, 0, None)), donate_argnums=1),
        generate=jax.jit(jax.vmap(respond, in_axes=(0, None, None))),
    )


def run_method(
    name: str,
    stories: StoryModel,
    setup: Setup,
    price: Price,
    first_reward: Callable,
    golds: dict[str, Gold],
    baselines: dict[str, np.ndarray],
    budget: Budget,
    rate_factor: float = 1.0,
) -> Iterator[tuple[str, Outcome]]:
    """Yields the outcome of a method under each gold reward; compiled once.

    Args:
        name, stories, setup, price, first_reward, budget, rate_factor: of `compile_runs`.
        golds: gold rewards by name.
        baselines: gold rewards `[O, N]` of responses of the reference, by the gold's name.
    """
    known = {CONTROLLER: TARGETS, "online IPO": IPO_BETAS}.get(name, BETAS)
    starts = tuple(known[index] for index in budget.starts)
    runner = compile_runs(name, stories, setup, price, first_reward, budget, rate_factor)
    for label, gold in golds.items():
        began = time.monotonic()
        states, labels, responses = _train(runner, stories, gold, budget, starts)
        win_rate, kl = _evaluate(runner, stories, gold, baselines[label], states)
        shape = (len(budget.seeds), len(starts))
        scale = np.exp(np.asarray(states.upper.log_scale)) if name == SCALED else np.ones(len(kl))
        utility = win_rate - price.kl_price * kl
        grids = (each.reshape(shape) for each in (utility, win_rate, kl, scale))
        yield label, Outcome(starts, *grids, labels, responses, time.monotonic() - began)  # pyright: ignore[reportCallIssue]


def _train(runner: Runner, stories: StoryModel, gold: Gold, budget: Budget, starts: tuple[float, ...]):
    """Returns the final states of all runs, and the labels and responses that one of them used."""
    seeds = np.repeat(np.array(budget.seeds), len(starts))
    betas = jnp.tile(jnp.asarray(starts, jnp.float32), len(budget.seeds))
    keys, frozen = jax.vmap(jax.random.key)(seeds), LanguageFrozen(stories.start)
    shared = HarnessBudget(budget.seeds, (), budget.steps, budget.batch, evaluations=1)
    orders = np.stack([prompt_order(len(stories.openings.tokens), shared, int(seed)) for seed in seeds], axis=1)
    states, labels, responses = runner.init(keys, betas, frozen), 0, 0
    for step in range(budget.steps):
        folded = jax.vmap(lambda key, step=step: jax.random.fold_in(key, step))(keys)
        propose_key, label_key, update_key = jnp.moveaxis(jax.vmap(lambda key: jax.random.split(key, 3))(folded), 1, 0)
        prompts = Prompts(*(leaf[orders[step]] for leaf in stories.openings))
        sample = runner.propose(propose_key, states, betas, prompts, frozen)
        scores = gold_of_runs(gold, sample.prompts, sample.responses)
        drawn = jax.vmap(preferences.draw_labels)(label_key, jnp.asarray(scores))
        states = runner.update(update_key, states, betas, Labelled(sample, drawn), frozen)
        labels += int(np.prod(drawn.shape[1:]))
        responses += int(np.prod(sample.responses.tokens.shape[1:4]))
    return states, labels, responses


def _evaluate(
    runner: Runner, stories: StoryModel, gold: Gold, baseline: np.ndarray, states: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the win rate against the reference's responses and the KL of every run, `[R]`."""
    responses, ratio = runner.generate(states, jax.random.key(1_000_000), LanguageFrozen(stories.start))
    scores = gold_of_runs(gold, _of_all(stories.openings, len(ratio)), responses)[..., 0]
    # Every response against every one of the reference's to the same opening: the labels' own noise is averaged out.
    wins = np.mean(1.0 / (1.0 + np.exp(baseline[None, :, None, :] - scores[..., None])), axis=(1, 2, 3))
    return wins, np.asarray(ratio, float).mean(axis=(1, 2))


def _of_all(prompts: Prompts, runs: int) -> Prompts:
    return Prompts(*(jnp.broadcast_to(leaf, (runs, *leaf.shape)) for leaf in prompts))
