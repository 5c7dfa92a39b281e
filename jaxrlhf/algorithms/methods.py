"""Methods by name: online RLHF in ten ways, each a short assembly of the same parts.

    algorithm = METHODS["grpo"].assemble(parts, beta)
    algorithm, review = METHODS["grpo"].reusing(algorithm, parts, beta, sample=shapes, capacity=1000, size=16, updates=2)

| name | learns | a pair is | source |
|---|---|---|---|
| `bilevel` | reward and policy; the reward's gradient includes the policy's response | policy, policy as an opponent | arXiv 2410.15610 |
| `iterated` | reward and policy, each with the other held fixed | policy, reference | arXiv 1909.08593 |
| `rloo` | as `iterated`, policy by leave-one-out baselines | policy, policy | arXiv 2402.14740 |
| `ppo` | as `iterated`, policy by a critic's advantages and clipped ratios, token by token | policy, policy | arXiv 1707.06347 |
| `grpo` | as `iterated`, policy by group-relative advantages and clipped ratios, token by token | policy, policy | arXiv 2402.03300 |
| `implicit-bilevel` | a policy whose log-ratio is the reward: likelihood and coupled utility | policy, policy as an opponent | `direct_preference.implicit_reward` |
| `online-dpo` | the policy, by the logistic loss of its log-ratio | policy, policy | arXiv 2402.04792 |
| `online-ipo` | the policy, by the squared loss of its log-ratio | policy, policy | arXiv 2310.12036 |
| `sail` | as `online-dpo`, and the gradient through the distribution of the pairs | policy, policy | arXiv 2406.15567 |
| `label-gradient` | the policy, by the score function of the labels themselves | policy, reference | `policy_gradient` |

All take one label and two responses a pair. `rloo`, `ppo` and `grpo` follow a reward that is learned from the labels as
the run goes, as `iterated` does: the annotator compares, and what it says is not itself the reward.
"""  # noqa: E501

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxrlhf.algorithms.actor_critic import actor_critic
from jaxrlhf.algorithms.direct_preference import direct_preference, dpo, implicit_reward, ipo
from jaxrlhf.algorithms.group_relative import group_relative
from jaxrlhf.algorithms.policy_gradient import label_policy_gradient
from jaxrlhf.algorithms.replay import refit, refitted, replay, replayed
from jaxrlhf.algorithms.reward_learning import reward_learning
from jaxrlhf.base.algorithm import Algorithm
from jaxrlhf.base.problem import BilevelProblem, Sample
from jaxrlhf.base.types import Params
from jaxrlhf.bilevel import (
    HypergradientRule,
    PolicyGradientEstimator,
    bilevel_descent,
    boltzmann,
    central,
    closed_form,
    decoupled,
    loss_gradient,
    tangent,
)
from jaxrlhf.preferences import objectives
from jaxrlhf.preferences.annotators import from_both_sides
from jaxrlhf.preferences.choice import BRADLEY_TERRY, Choice
from jaxrlhf.preferences.scale import learn_scale
from jaxrlhf.preferences.self_play import wins_against_reference

Against = Literal["reference", "policy", "self"]
"""Where the second response of a pair comes from, as in `lm.pairing`."""


class Critic(NamedTuple):
    """A critic of `ppo`.

    Attributes:
        value: `(critic, sample, frozen) -> [B, M, 2, T]`, as in `actor_critic`.
        start: its initial parameters, or `(policy) -> ` them.
        optimizer: of its parameters.
    """

    value: Callable[[Params, Sample, Params], Any]
    start: Any
    optimizer: optax.GradientTransformation


class Parts(NamedTuple):
    """What methods are assembled from; each method reads some of it.

    Attributes:
        problem: `(objective, *, against, per_token=False, reference_responses=0) -> BilevelProblem`.
        policy_optimizer: of the policy.
        tangent_optimizer: of the policy's response to the reward, `bilevel` with a stencil.
        reward_optimizer: of the reward in an update on fresh pairs.
        fit_optimizer: of the reward in its fit to kept pairs.
        rule: estimator of the hypergradient, of `bilevel`; `central(relative_sigma=0.2)` by default.
        kl_price: what a nat of KL costs in win rate, where the utility is an objective.
        utility_weight: of the utility beside the likelihood.
        scaled: whether `bilevel` learns the reward's scale; its optimisers are then `scale_optimizer`s.
        critic: of `ppo`.
        steps: policy updates on a step's sample, of methods with a reward.
        sequential: as in `bilevel_descent`.
        label_weight: factor of what a labelled pair costs: pairs over labels where only some pairs of a step, drawn at
            random, are labelled. Costs are then unbiased, and the KL keeps its price.
        reference_responses: of `bilevel` on pairs of the policy's own: responses of the reference to each prompt, without
            labels, that say what a win is worth against the reference (`preferences.self_play`); 0 leaves wins against
            the policy itself.
        choice: how the annotator is assumed to choose, in the likelihood of a learned reward.
    """

    problem: Callable[..., BilevelProblem]
    policy_optimizer: optax.GradientTransformation
    tangent_optimizer: optax.GradientTransformation = optax.set_to_zero()
    reward_optimizer: optax.GradientTransformation = optax.set_to_zero()
    fit_optimizer: optax.GradientTransformation = optax.set_to_zero()
    rule: HypergradientRule | None = None
    kl_price: Any = 0.0
    utility_weight: Any = 1.0
    scaled: bool = False
    critic: Critic | None = None
    steps: int = 1
    sequential: bool = False
    label_weight: float = 1.0
    reference_responses: int = 2
    choice: Choice = BRADLEY_TERRY

    def likelihood(self) -> objectives.Objective:
        """Returns the likelihood that a learned reward is fitted by."""
        return objectives.likelihood(coupled=False, choice=self.choice)

    def of(self, *parts: objectives.Objective, **keywords: Any) -> BilevelProblem:
        """Returns the problem of a sum of objectives."""
        objective = objectives.add(*parts)
        if self.label_weight != 1.0:
            objective = objectives.weighted(objective, self.label_weight)
        return self.problem(objective, **keywords)


class Method(NamedTuple):
    """A method; `init` of its algorithm takes the upper parameters that `learns` says.

    Attributes:
        assemble: `(parts, beta) -> Algorithm`, without an annotator. `beta` may be traced.
        learns: "reward": a reward model, the upper parameters; "log-ratio": the upper parameters are a policy's, and its
            log-ratio is the reward; "policy": nothing else, and there are no upper parameters.
        against: where the second response of its pairs comes from.
        per_token: whether every token is a step.
        held_out: whether a reward is fitted to kept labels after a step's update and not before it: where the reward's
            gradient includes the policy's response, that must be measured on labels that the reward has not seen.
        weighs: what holds the policy near the reference: "beta", or "kl_price".
    """

    assemble: Callable[[Parts, Any], Algorithm]
    learns: Literal["reward", "log-ratio", "policy"]
    against: Against
    per_token: bool = False
    held_out: bool = False
    weighs: Literal["beta", "kl_price"] = "beta"

    def reusing(
        self, algorithm: Algorithm, parts: Parts, beta: Any, *, sample: Sample, capacity: int, size: int, updates: int
    ) -> "Reusing":
        """Returns the method's algorithm with its labels kept and used again.

        A learned reward is fitted to kept pairs too (`replay.refitted`). Without a reward model the policy takes updates
        on kept pairs, by importance weights (`replay.replayed`).

        Args:
            algorithm: of `assemble`.
            parts, beta: that it was assembled from.
            sample: what it proposes, or its shapes.
            capacity, size, updates: as in `replay`.
        """
        sizes: dict[str, Any] = {"capacity": capacity, "size": size, "updates": updates}
        if self.learns != "reward":

            def again(key, state, frozen):
                return state._replace(inner=replay(key, algorithm, state.inner, state.buffer, frozen, size=size)[0])

            return Reusing(replayed(algorithm, sample, **sizes), again)
        # Kept pairs are not shown from both sides: a fit reads both rewards of a pair.
        against = "policy" if self.against == "self" else self.against
        fitted = _scaled(parts, parts.of(parts.likelihood(), against=against, per_token=self.per_token), beta)
        learning = reward_learning(fitted, parts.fit_optimizer)

        def refit_once(key, state, frozen):
            return refit(key, learning, state, frozen, size=size, updates=1)

        return Reusing(refitted(algorithm, learning, sample, **sizes, held_out=self.held_out), refit_once)


class Reusing(NamedTuple):
    """A method with its labels kept.

    Attributes:
        algorithm: its state is a `ReplayedState`.
        review: `(key, state, frozen) -> state`: one update from kept labels alone, as for labels that existed before.
    """

    algorithm: Algorithm
    review: Callable[[Any, Any, Params], Any]


def bilevel(parts: Parts, beta: Any, *, against: Against = "self", rule: HypergradientRule | None = None) -> Algorithm:
    """Returns bilevel descent of the uncoupled likelihood and the coupled utility.

    Args:
        parts, beta: of the method.
        against: "reference"; or "self", where both responses of a pair are the policy's, each once held fixed, and their
            label counts by what it says about wins against the reference (`preferences.self_play`).
        rule: in place of the parts'.
    """
    utility = objectives.utility(weight=parts.utility_weight, kl_price=parts.kl_price)
    valued = against == "self" and parts.reference_responses > 0
    keywords = {"reference_responses": parts.reference_responses} if valued else {}
    problem = _scaled(parts, parts.of(parts.likelihood(), utility, against=against, **keywords), beta)
    if valued:
        problem = wins_against_reference(problem, scale=_scale_of if parts.scaled else lambda upper: 1.0)
    solver = tangent(parts.policy_optimizer, parts.tangent_optimizer, steps=parts.steps)
    algorithm = bilevel_descent(
        problem,
        rule or parts.rule or central(relative_sigma=0.2),
        solver,
        parts.reward_optimizer,
        beta=beta,
        sequential=parts.sequential,
    )
    return self_play(algorithm) if against == "self" else algorithm


def implicit_bilevel(parts: Parts, beta: Any) -> Algorithm:
    """Returns bilevel descent whose reward is a policy's log-ratio, so that this policy itself solves the lower level.

    Its utility has the weight `utility_weight beta`: the gradient of a log-ratio's likelihood has the factor beta too.
    """
    utility = objectives.utility(weight=parts.utility_weight * beta, kl_price=parts.kl_price)
    problem = parts.of(objectives.likelihood(coupled=False), utility, against="self")
    solver = closed_form(lambda task, index: task.upper)
    return self_play(
        bilevel_descent(implicit_reward(problem, beta=beta), boltzmann(), solver, parts.policy_optimizer, beta=beta)
    )


def iterated(
    parts: Parts, beta: Any, *, gradient: Literal["rloo", "ppo", "grpo"], per_token: bool = False
) -> Algorithm:
    """Returns iterated RLHF on pairs of the policy's: the reward follows the labels, and the policy the reward.

    Raises:
        ValueError: PPO without a critic.
    """
    problem = parts.of(parts.likelihood(), against="policy", per_token=per_token)
    estimator = _policy_gradient(parts, problem, beta, gradient)
    solver = tangent(parts.policy_optimizer, optax.set_to_zero(), steps=parts.steps, policy_gradient=estimator)
    return bilevel_descent(problem, decoupled(), solver, parts.reward_optimizer, beta=beta, sequential=parts.sequential)


def direct(parts: Parts, beta: Any, *, loss: Callable[..., Any] = dpo, **keywords: Any) -> Algorithm:
    """Returns direct preference learning with a loss of `direct_preference`, `loss(beta=beta)`, and its keywords."""
    problem, cost = parts.of(objectives.likelihood(), against="policy"), loss(beta=beta)

    def weighted(log_prob, labelled):
        return parts.label_weight * cost(log_prob, labelled)

    return direct_preference(problem, weighted, parts.policy_optimizer, **keywords)


def label_gradient(parts: Parts, kl_price: Any) -> Algorithm:
    """Returns policy gradient on the labels, at a price of KL in place of a beta."""
    problem = parts.of(objectives.utility(kl_price=kl_price), against="reference")
    return label_policy_gradient(problem, parts.policy_optimizer)


METHODS: dict[str, Method] = {
    "bilevel": Method(bilevel, "reward", "self", held_out=True),
    "implicit-bilevel": Method(implicit_bilevel, "log-ratio", "self"),
    "iterated": Method(
        lambda parts, beta: bilevel(parts, beta, against="reference", rule=decoupled()), "reward", "reference"
    ),
    "rloo": Method(functools.partial(iterated, gradient="rloo"), "reward", "policy"),
    "grpo": Method(functools.partial(iterated, gradient="grpo", per_token=True), "reward", "policy", per_token=True),
    "ppo": Method(functools.partial(iterated, gradient="ppo", per_token=True), "reward", "policy", per_token=True),
    "online-dpo": Method(direct, "policy", "policy"),
    "online-ipo": Method(functools.partial(direct, loss=ipo), "policy", "policy"),
    "sail": Method(functools.partial(direct, coupling=1.0), "policy", "policy"),
    "label-gradient": Method(label_gradient, "policy", "reference", weighs="kl_price"),
}


def self_play(algorithm: Algorithm) -> Algorithm:
    """Returns the algorithm with each pair used in both orders, and each label counted once."""

    def update(key, state, labelled, frozen):
        state, info = algorithm.update(key, state, from_both_sides(labelled), frozen)
        return state, info._replace(labels=info.labels // 2)

    return algorithm._replace(update=update)


def _policy_gradient(parts: Parts, problem: BilevelProblem, beta: Any, gradient: str) -> PolicyGradientEstimator:
    if gradient == "rloo":
        return loss_gradient()
    if gradient == "grpo":
        return group_relative(problem, beta=beta)
    if parts.critic is None:
        raise ValueError("ppo needs a critic; give one in Parts.")
    return actor_critic(problem, *parts.critic, beta=beta)


def _scale_of(upper: Any) -> jax.Array:
    return jnp.exp(upper.log_scale)


def _scaled(parts: Parts, problem: BilevelProblem, beta: Any) -> BilevelProblem:
    return learn_scale(problem, beta=beta) if parts.scaled else problem
