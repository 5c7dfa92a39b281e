"""The methods of `frontier.py`, each a short assembly of the library's algorithms; nothing else differs between them.

A method is a function of beta, which the controller adjusts to hold all methods to the same KL. All share policy,
reference, pairs per step, optimiser and order of prompts. Where the pairs of a step come from is part of the method:

- offline methods compare two responses of the reference, as if they had been collected before;
- the label gradient compares a response of the policy with one of the reference;
- all others compare two responses of the policy; the bilevel methods use each such pair in both orders, as self-play.
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
from jaxrlhf.lm.generate import Generation
from jaxrlhf.lm.problem import language_problem
from jaxrlhf.lm.reward import RewardModel
from jaxrlhf.lm.transformer.model import LanguageModel


@dataclasses.dataclass(frozen=True)
class Rates:
    """Adam's learning rates for a method, and the initial beta of a run with a target of 1 nat."""

    policy: float
    tangent: float = 1e-5
    critic: float = 1e-3
    beta: float = 0.6


class Setup(NamedTuple):
    """Models, sizes and weights that all methods share.

    Attributes:
        policy: the language model of policy and reference.
        reward, reward_learning_rate: the reward model of methods that learn one, and its Adam's learning rate.
        critic: initial parameters of a critic, which is a reward model on the policy's trunk.
        pairs: per prompt and step.
        max_new_tokens: of a response.
        stop_ids: tokens that end a response.
        steps: outer steps of a run, for the learning-rate schedules.
        shapes: `problem -> ` shapes of a step's pairs.
        buffer, batch: prompts whose pairs the buffer holds, and prompts drawn from it for an update.
        fit_updates: updates of the reward on the buffer per outer step; methods without a reward take as many policy
            updates on old pairs.
        lower_steps: policy steps per outer step, of methods with a reward.
        hold: initial outer steps in which the policy is not updated, because its reward has not been fitted yet.
        kl_share: the utility's price of KL as a fraction of beta; at 1/4 both levels trade reward for KL at the same rate.
        utility_weight: weight of the win rate beside the likelihood.
        implicit_weight: that weight divided by beta, where the reward is a policy's log-ratio: its likelihood scales with
            beta as well.
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
        offline: whether its pairs are drawn from the reference.
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


def build(name: str, setup: Setup, rates: Rates) -> Method:
    """Returns a method by its name in `RATES`.

    Raises:
        ValueError: there is no such method.
    """
    if name == "label gradient":
        return _label_gradient(setup, rates)
    if name == "implicit bilevel":
        return _implicit_bilevel(setup, rates)
    if name in WITHOUT_REWARD:
        return _direct_preference(name, setup, rates)
    if name in ("bilevel", "boltzmann"):
        return _bilevel(name, setup, rates)
    if name in WITH_REWARD:
        return _iterated(name, setup, rates)
    raise ValueError(f"There is no method {name!r}; choose from {', '.join(RATES)}.")


def _label_gradient(setup: Setup, rates: Rates) -> Method:
    """Policy gradient on the labels themselves."""
    optimizer = adam(rates.policy, setup.steps)

    def make(beta):
        objective = objectives.utility(kl_price=setup.kl_share * beta)
        return label_policy_gradient(problem_of(setup, objective), optimizer)

    return Method(make, rates)


def _direct_preference(name: str, setup: Setup, rates: Rates) -> Method:
    """DPO and its relatives, offline or online; SAIL adds the gradient through the distribution of its responses."""
    optimizer = adam(rates.policy, setup.steps)

    def lengths(sample):
        return jnp.sum(sample.responses.mask, axis=-1)

    loss = {
        "offline IPO": lambda beta: ipo(beta=beta),
        "offline SimPO": lambda beta: simpo(beta=beta, margin=0.3, lengths=lengths),
    }.get(name, lambda beta: dpo(beta=beta))
    offline = name.startswith("offline")
    sampler = (lambda policy, frozen: frozen.reference) if offline else (lambda policy, frozen: policy)
    problem = problem_of(setup, objectives.likelihood(), against="policy")
    coupling = 1.0 if name == "SAIL" else 0.0

    def make(beta):
        algorithm = direct_preference(problem, loss(beta), optimizer, coupling=coupling, sampler=sampler)
        return algorithm if not setup.fit_updates or coupling else with_replay(setup, problem, algorithm)

    return Method(make, rates, offline=offline)


def _implicit_bilevel(setup: Setup, rates: Rates) -> Method:
    """Bilevel descent whose reward is a policy's log-ratio, so that this policy itself solves the lower level."""
    optimizer = adam(rates.policy, setup.steps)
    solver = bilevel.closed_form(lambda task, index: task.upper)

    def make(beta):
        utility = objectives.utility(weight=setup.implicit_weight * beta, kl_price=setup.kl_share * beta)
        objective = objectives.add(objectives.likelihood(coupled=False), utility)
        problem = problem_of(setup, objective, against="self")
        descent = bilevel.bilevel_descent(
            implicit_reward(problem, beta=beta), bilevel.boltzmann(), solver, optimizer, beta=beta
        )
        return with_replay(setup, problem, self_play(descent))

    return Method(make, rates)


def with_replay(setup: Setup, problem: bilevel.BilevelProblem, algorithm):
    """Returns the algorithm with further updates on old pairs."""
    return replayed(
        algorithm, setup.shapes(problem), capacity=setup.buffer, size=setup.batch, updates=setup.fit_updates
    )


def with_reward_fit(setup: Setup, problem: bilevel.BilevelProblem, algorithm):
    """Returns the algorithm with a fit of its reward to all pairs so far, before each update."""
    learning = reward_learning(problem, adam(setup.reward_learning_rate, setup.steps))
    return refitted(
        algorithm, learning, setup.shapes(problem), capacity=setup.buffer, size=setup.batch, updates=setup.fit_updates
    )


def _bilevel(name: str, setup: Setup, rates: Rates) -> Method:
    """Bilevel descent with a central stencil, or with the Boltzmann rule."""
    likelihood = objectives.likelihood(coupled=False)
    problem = problem_of(setup, likelihood, against="policy")
    rule = bilevel.central(setup.relative_sigma) if name == "bilevel" else bilevel.boltzmann()
    solver = bilevel.tangent(
        adam(rates.policy, setup.steps, setup.hold),
        adam(rates.tangent, setup.steps, setup.hold),
        steps=setup.lower_steps,
    )
    reward_adam = adam(setup.reward_learning_rate, setup.steps)

    def make(beta):
        utility = objectives.utility(weight=setup.utility_weight, kl_price=setup.kl_share * beta)
        self_play_problem = problem_of(setup, objectives.add(likelihood, utility), against="self")
        descent = bilevel.bilevel_descent(self_play_problem, rule, solver, reward_adam, beta=beta)
        return with_reward_fit(setup, problem, self_play(descent))

    return Method(make, rates, has_reward=True)


def _iterated(name: str, setup: Setup, rates: Rates) -> Method:
    """Iterated RLHF: the reward is fitted to the labels, and the policy trained on it by RLOO, PPO or GRPO."""
    problem = problem_of(
        setup, objectives.likelihood(coupled=False), against="policy", per_token=name in ("PPO", "GRPO")
    )
    policy_adam, reward_adam = (
        adam(rates.policy, setup.steps, setup.hold),
        adam(setup.reward_learning_rate, setup.steps),
    )

    def policy_gradient(beta):
        if name == "PPO":
            value, critic_adam = token_critic(setup.policy), adam(rates.critic, setup.steps)
            return actor_critic(problem, value, setup.critic, critic_adam, beta=beta, trace=0.95)
        return group_relative(problem, beta=beta) if name == "GRPO" else bilevel.loss_gradient()

    def make(beta):
        gradient = policy_gradient(beta)
        solver = bilevel.tangent(policy_adam, optax.set_to_zero(), steps=setup.lower_steps, policy_gradient=gradient)
        descent = bilevel.bilevel_descent(problem, bilevel.decoupled(), solver, reward_adam, beta=beta)
        return with_reward_fit(setup, problem, descent)

    return Method(make, rates, has_reward=True)


def self_play(algorithm):
    """Returns the algorithm with each pair used in both orders."""

    def update(key, state, labelled, frozen):
        return algorithm.update(key, state, preferences.from_both_sides(labelled), frozen)

    return algorithm._replace(update=update)


def problem_of(setup: Setup, objective: objectives.Objective, **keywords: Any) -> bilevel.BilevelProblem:
    """Returns the language problem of an objective, with the setup's models and sizes."""
    return language_problem(
        setup.policy,
        setup.reward,
        objective,
        pairs=setup.pairs,
        generation=Generation(setup.max_new_tokens, setup.stop_ids),
        **keywords,
    )


def adam(rate: float, steps: int, hold: int = 0) -> optax.GradientTransformation:
    """Returns Adam with a warm-up over a tenth of the steps, after `hold` steps at learning rate 0.

    Adam's first steps have unit size whatever the gradient, and a reward that is still 0 gives only rounding errors.
    """
    warm_up = max(1, steps // 10)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(optax.linear_schedule(0.0, rate, warm_up, hold)))
