"""The methods of `frontier.py`: those of `jaxrlhf.algorithms.methods`, and three offline, with nothing else between them.

A method is a function of beta, which the controller adjusts to hold all methods to the same KL. All share policy,
reference, pairs per step, optimiser and order of prompts. Where the pairs of a step come from is part of the method:

- offline methods compare two responses of the reference, as if they had been collected before;
- the label gradient compares a response of the policy with one of the reference;
- all others compare two responses of the policy; the bilevel methods use each such pair in both orders, as self-play.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax

from jaxrlhf import bilevel, objectives
from jaxrlhf.algorithms import methods
from jaxrlhf.algorithms.direct_preference import dpo, ipo, simpo
from jaxrlhf.algorithms.methods import METHODS
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
        reference_responses: to a prompt, in self-play; 0: the win rate is that against the policy itself.
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
    reference_responses: int = 0


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
FURTHER_RATES = {"iterated": Rates(policy=1e-4), "online IPO": Rates(policy=8e-5, beta=0.1)}
"""Of methods of `one_run.py` that are not among those of `frontier.py`."""
WITHOUT_REWARD = (
    "offline DPO", "offline IPO", "offline SimPO", "online DPO", "SAIL", "label gradient", "implicit bilevel"
)  # fmt: skip
WITH_REWARD = ("RLOO", "PPO", "GRPO", "boltzmann", "bilevel")


def build(name: str, setup: Setup, rates: Rates) -> Method:
    """Returns a method by its name in `RATES` or `FURTHER_RATES`.

    Raises:
        ValueError: there is no such method.
    """
    if name not in RATES | FURTHER_RATES:
        raise ValueError(f"There is no method {name!r}; choose from {', '.join(RATES | FURTHER_RATES)}.")
    method = library_method(name)
    rule = bilevel.boltzmann() if name == "boltzmann" else bilevel.central(setup.relative_sigma)
    # The gradient through a distribution of old pairs has too much variance.
    reuses = name not in ("SAIL", "label gradient") and (method.learns != "policy" or setup.fit_updates > 0)

    def make(beta):
        parts = parts_of(setup, rates, method, kl_price=setup.kl_share * beta)._replace(rule=rule)
        weight = beta if method.weighs == "beta" else setup.kl_share * beta
        algorithm = method.assemble(parts, weight)
        return reusing(method, algorithm, parts, weight, setup) if reuses else algorithm

    return Method(make, rates, has_reward=method.learns == "reward", offline=name.startswith("offline"))


def library_method(name: str) -> methods.Method:
    """Returns the library's method, with the pairs of this study and in the order that it was measured in."""
    if name in ("bilevel", "boltzmann"):
        bilevel_method = functools.partial(methods.bilevel, against="self")
        return METHODS["bilevel"]._replace(assemble=bilevel_method, against="self", held_out=False)
    if name.startswith("offline"):
        loss = {"offline IPO": ipo, "offline SimPO": _simpo}.get(name, dpo)
        offline = functools.partial(methods.direct, loss=loss, sampler=lambda policy, frozen: frozen.reference)
        return METHODS["online-dpo"]._replace(assemble=offline)
    return METHODS[name.lower().replace(" ", "-")]


def parts_of(setup: Setup, rates: Rates, method: methods.Method, *, kl_price: Any) -> methods.Parts:
    """Returns what a method is assembled from; the policy of a method with a reward waits until that has seen labels."""
    hold = setup.hold if method.learns == "reward" else 0
    return methods.Parts(
        functools.partial(problem_of, setup),
        policy_optimizer=adam(rates.policy, setup.steps, hold),
        tangent_optimizer=adam(rates.tangent, setup.steps, hold),
        reward_optimizer=adam(setup.reward_learning_rate, setup.steps),
        fit_optimizer=adam(setup.reward_learning_rate, setup.steps),
        kl_price=kl_price,
        utility_weight=setup.implicit_weight if method.learns == "log-ratio" else setup.utility_weight,
        critic=methods.Critic(token_critic(setup.policy), setup.critic, adam(rates.critic, setup.steps)),
        steps=setup.lower_steps,
        reference_responses=setup.reference_responses,
    )


def reusing(method: methods.Method, algorithm: bilevel.Algorithm, parts: methods.Parts, weight: Any, setup: Setup):
    """Returns the algorithm with its labels used again."""
    against = "policy" if method.against == "self" else method.against
    problem = problem_of(setup, objectives.likelihood(coupled=False), against=against, per_token=method.per_token)
    sizes = {"capacity": setup.buffer, "size": setup.batch, "updates": setup.fit_updates}
    return method.reusing(algorithm, parts, weight, sample=setup.shapes(problem), **sizes).algorithm


def _simpo(*, beta: Any) -> Any:
    return simpo(beta=beta, margin=0.3, lengths=lambda sample: jnp.sum(sample.responses.mask, axis=-1))


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
