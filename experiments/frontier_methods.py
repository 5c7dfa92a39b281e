"""The methods of `frontier.py`: each a short assembly of the library's parts, and nothing else differs between them.

A method is a function of beta, for the controller that holds all of them to one KL. What they share: policy, reference,
pairs a step, optimiser, the order of prompts. Where the pairs of a step come from is part of the method:

- offline ones compare two responses of the reference, as if they had been collected before;
- the label's own gradient compares one of the policy with one of the reference;
- all others compare two of the policy; the bilevel ones see each such pair from both sides, as self-play.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax

from jaxrlhf import bilevel, objectives, preferences
from jaxrlhf.algorithms.actor_critic import actor_critic
from jaxrlhf.algorithms.direct_preference import direct_preference, dpo, implicit_reward, ipo, simpo
from jaxrlhf.algorithms.group_relative import group_relative
from jaxrlhf.algorithms.policy_gradient import label_policy_gradient
from jaxrlhf.algorithms.replay import refitted, replayed
from jaxrlhf.algorithms.reward_learning import reward_learning
from jaxrlhf.lm.critic import token_critic
from jaxrlhf.lm.problem import language_problem
from jaxrlhf.lm.reward import RewardModel
from jaxrlhf.lm.transformer.model import LanguageModel


@dataclasses.dataclass(frozen=True)
class Rates:
    """Learning rates of a method's Adam, and the beta that a run led to 1 nat begins with."""

    policy: float
    tangent: float = 1e-5
    critic: float = 1e-3
    beta: float = 0.6


class Parts(NamedTuple):
    """What all methods are made of.

    Attributes:
        policy: the language model of policy and reference.
        reward, reward_learning_rate: the reward model that learners with one have, and the rate of its Adam.
        critic: first parameters of a critic, which is a reward model on the policy's trunk.
        pairs: a prompt and step.
        max_new_tokens: of a response.
        stop_ids: tokens that end one.
        steps: outer steps of a run, for the schedules of the rates.
        shapes: `problem -> ` shapes of a step's pairs.
        buffer, batch: prompts whose pairs are kept, and prompts drawn of them for an update.
        fit_updates: of the reward's fit to the buffer, each outer step; learners without one take as many from old pairs.
        lower_steps: of a policy that has a reward, each outer step.
        hold: outer steps in which a policy waits for its reward, which has seen no label yet.
        kl_share: of beta, the price of the KL in the win rate: 1/4 makes both levels trade alike.
        utility_weight: of the win rate beside the likelihood.
        implicit_weight: the same over beta, where the reward is a policy's log-ratio: its likelihood weighs beta as much.
        relative_sigma: of the stencil.
    """

    policy: LanguageModel
    reward: RewardModel
    reward_learning_rate: float
    critic: Any
    pairs: int
    max_new_tokens: int
    stop_ids: tuple[int, ...]
    steps: int
    shapes: Callable[[bilevel.BilevelProblem], bilevel.Sample]
    buffer: int
    batch: int
    fit_updates: int = 1
    lower_steps: int = 2
    hold: int = 6
    kl_share: float = 0.25
    utility_weight: float = 1.0
    implicit_weight: float = 0.3
    relative_sigma: float = 0.2


class Method(NamedTuple):
    """A method.

    Attributes:
        make: `beta -> ` its algorithm.
        rates: its learning rates.
        has_reward: whether it learns a reward model.
        offline: whether its pairs are the reference's.
    """

    make: Callable[[Any], Any]
    rates: Rates
    has_reward: bool = False
    offline: bool = False


RATES = {
    "offline DPO": Rates(policy=1.5e-4),
    "offline IPO": Rates(policy=2e-4, beta=0.2),
    "offline SimPO": Rates(policy=7e-5, beta=1.5),
    "online DPO": Rates(policy=8e-5),
    "SAIL": Rates(policy=1.2e-4),
    "label gradient": Rates(policy=2e-4, beta=0.15),
    "RLOO": Rates(policy=1e-4),
    "PPO": Rates(policy=7e-5),
    "GRPO": Rates(policy=7e-5, beta=0.4),
    "boltzmann": Rates(policy=1e-4, tangent=5e-6),
    "bilevel": Rates(policy=1e-4, tangent=5e-6),
    "implicit bilevel": Rates(policy=8e-5),
}
WITHOUT_REWARD = (
    "offline DPO", "offline IPO", "offline SimPO", "online DPO", "SAIL", "label gradient", "implicit bilevel"
)  # fmt: skip
WITH_REWARD = ("RLOO", "PPO", "GRPO", "boltzmann", "bilevel")


def build(name: str, parts: Parts, rates: Rates) -> Method:
    """Returns a method by its name in `RATES`.

    Raises:
        ValueError: there is none of that name.
    """
    if name in WITHOUT_REWARD:
        return _without_reward(name, parts, rates)
    if name in WITH_REWARD:
        return _with_reward(name, parts, rates)
    raise ValueError(f"There is no method {name!r}; choose from {', '.join(RATES)}.")


def _without_reward(name: str, parts: Parts, rates: Rates) -> Method:
    optimizer = adam(rates.policy, parts.steps)
    if name == "label gradient":

        def of_labels(beta):
            price = objectives.utility(kl_price=parts.kl_share * beta)
            return label_policy_gradient(problem_of(parts, price), optimizer)

        return Method(of_labels, rates)

    if name == "implicit bilevel":
        return Method(_implicit(parts, optimizer), rates)

    def lengths(sample):
        return jnp.sum(sample.responses.mask, axis=-1)

    loss = {
        "offline IPO": lambda beta: ipo(beta=beta),
        "offline SimPO": lambda beta: simpo(beta=beta, margin=0.3, lengths=lengths),
    }.get(name, lambda beta: dpo(beta=beta))
    offline = name.startswith("offline")
    sampler = (lambda policy, frozen: frozen.reference) if offline else (lambda policy, frozen: policy)
    problem = problem_of(parts, objectives.likelihood(), against_reference=False)
    coupling = 1.0 if name == "SAIL" else 0.0

    def of_pairs(beta):
        algorithm = direct_preference(problem, loss(beta), optimizer, coupling=coupling, sampler=sampler)
        if not parts.fit_updates or coupling:
            return algorithm
        return replayed(
            algorithm, parts.shapes(problem), capacity=parts.buffer, size=parts.batch, updates=parts.fit_updates
        )

    return Method(of_pairs, rates, offline=offline)


def _implicit(parts: Parts, optimizer: optax.GradientTransformation) -> Callable[[Any], Any]:
    """Bilevel descent whose reward is a policy's log-ratio: the lower level is solved by that policy itself."""
    solver = bilevel.closed_form(lambda task, index: task.upper_of(index))

    def make(beta):
        won = objectives.utility(weight=parts.implicit_weight * beta, kl_price=parts.kl_share * beta)
        problem = problem_of(
            parts, objectives.add(objectives.likelihood(coupled=False), won), against_reference=False, self_play=True
        )
        descent = bilevel.bilevel_descent(
            implicit_reward(problem, beta=beta), bilevel.boltzmann(), solver, optimizer, beta=beta
        )
        return replayed(
            self_play(descent),
            parts.shapes(problem),
            capacity=parts.buffer,
            size=parts.batch,
            updates=parts.fit_updates,
        )

    return make


def _with_reward(name: str, parts: Parts, rates: Rates) -> Method:
    policy_adam, reward_adam = (
        adam(rates.policy, parts.steps, parts.hold),
        adam(parts.reward_learning_rate, parts.steps),
    )
    fitted = objectives.likelihood(coupled=False)
    problem = problem_of(parts, fitted, against_reference=False, per_token=name in ("PPO", "GRPO"))
    learning = reward_learning(problem, adam(parts.reward_learning_rate, parts.steps))

    def with_buffer(algorithm):
        return refitted(
            algorithm,
            learning,
            parts.shapes(problem),
            capacity=parts.buffer,
            size=parts.batch,
            updates=parts.fit_updates,
        )

    if name in ("bilevel", "boltzmann"):
        rule = bilevel.central(parts.relative_sigma) if name == "bilevel" else bilevel.boltzmann()
        slow = adam(rates.tangent, parts.steps, parts.hold)
        solver = bilevel.tangent(policy_adam, slow, steps=parts.lower_steps)

        def coupled(beta):
            won = objectives.utility(weight=parts.utility_weight, kl_price=parts.kl_share * beta)
            against_itself = problem_of(parts, objectives.add(fitted, won), against_reference=False, self_play=True)
            return with_buffer(self_play(bilevel.bilevel_descent(against_itself, rule, solver, reward_adam, beta=beta)))

        return Method(coupled, rates, has_reward=True)

    # Iterated RLHF: the reward is fitted to labels as they come, and the lower level is whichever one likes.
    def slope(beta):
        if name == "PPO":
            value, critic_adam = token_critic(parts.policy), adam(rates.critic, parts.steps)
            return actor_critic(problem, value, parts.critic, critic_adam, beta=beta, trace=0.95)
        return group_relative(problem, beta=beta) if name == "GRPO" else bilevel.loss_gradient()

    def iterated(beta):
        solver = bilevel.tangent(policy_adam, optax.set_to_zero(), steps=parts.lower_steps, slope=slope(beta))
        return with_buffer(bilevel.bilevel_descent(problem, bilevel.decoupled(), solver, reward_adam, beta=beta))

    return Method(iterated, rates, has_reward=True)


def self_play(algorithm):
    """Sees each pair from both sides."""

    def update(key, state, labelled, frozen):
        return algorithm.update(key, state, preferences.from_both_sides(labelled), frozen)

    return algorithm._replace(update=update)


def problem_of(parts: Parts, objective: objectives.Objective, **keywords: Any) -> bilevel.BilevelProblem:
    """Returns the language problem of an objective, with the parts' sizes."""
    return language_problem(
        parts.policy,
        parts.reward,
        objective,
        pairs=parts.pairs,
        max_new_tokens=parts.max_new_tokens,
        stop_ids=parts.stop_ids,
        **keywords,
    )


def adam(rate: float, steps: int, hold: int = 0) -> optax.GradientTransformation:
    """Returns Adam with a warm-up over a tenth of the steps, after `hold` steps at rate 0.

    Its first steps have unit size whatever the gradient, and the first gradients of a reward that is still 0 are rounding.
    """
    warm_up = max(1, steps // 10)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(optax.linear_schedule(0.0, rate, warm_up, hold)))
