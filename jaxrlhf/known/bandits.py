"""Random bandits: linear or network reward, tabular or network policy, realisable or misspecified, benign or hard."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxrlhf import exact, preferences
from jaxrlhf.base.types import Key, Params
from jaxrlhf.bilevel import Algorithm, HypergradientRule, LowerSolver, gradient, shared_adam
from jaxrlhf.exact import bandit
from jaxrlhf.known.problem import KnownProblem, annotator, descend
from jaxrlhf.preferences import objectives
from jaxrlhf.preferences.objectives import Objective


def linear_reward(upper: Params, features: jax.Array) -> jax.Array:
    """Returns `features . upper`, `[C, K]` from `[C, K, F]`."""
    return features @ upper


def network_reward(upper: Params, features: jax.Array) -> jax.Array:
    """Returns a network with one hidden tanh layer at each arm's features, `[C, K]`."""
    return jnp.tanh(features @ upper["in"] + upper["bias"][None, None]) @ upper["out"]


def network_policy(lower: Params, frozen: bandit.Bandit) -> jax.Array:
    """Returns logits `[C, K]`: a network on each context's features, added to the reference."""
    contexts = frozen.features.reshape(frozen.features.shape[0], -1)
    hidden = jnp.tanh(contexts @ lower["in"] + lower["bias"][None])
    return frozen.reference + hidden @ lower["out"]


class BanditSetting(NamedTuple):
    """A bandit together with its models and its objective.

    Attributes:
        frozen: the instance.
        reward: `(upper, features) -> [C, K]`.
        policy: `(lower, frozen) -> logits [C, K]`.
        objective: the upper objective.
        against_reference: whether the second response of a pair comes from the reference.
        beta: weight of the lower level's KL.
    """

    frozen: bandit.Bandit
    reward: Callable[[Params, jax.Array], jax.Array]
    policy: Callable[[Params, bandit.Bandit], jax.Array]
    objective: Objective
    against_reference: bool
    beta: float

    def algorithm(
        self,
        rule: HypergradientRule,
        solver: LowerSolver,
        upper_optimizer: optax.GradientTransformation,
        pairs: int | None = None,
        counts: bool = False,
        choice: preferences.Choice = preferences.BRADLEY_TERRY,
        **options,
    ) -> Algorithm:
        """Returns the algorithm on pairs that are listed, drawn (`pairs`) or counted (`counts`), labelled by `choice`."""
        problem = bandit.bandit_problem(
            self.reward,
            self.objective,
            policy=self.policy,
            against_reference=self.against_reference,
            pairs=pairs,
            counts=counts,
        )
        if counts:
            annotate = preferences.counted_annotator(bandit.gold_score, choice=choice)
        else:
            annotate = annotator(bandit.gold_score, labels=self.objective.labels, pairs=pairs, choice=choice)
        return descend(problem, rule, solver, upper_optimizer, beta=self.beta, annotate=annotate, **options)

    def best_response(self, *, from_labels: bool = False) -> LowerSolver:
        """Returns `bandit.best_response` for this setting."""
        return bandit.best_response(
            self.reward,
            self.objective,
            beta=self.beta,
            against_reference=self.against_reference,
            from_labels=from_labels,
        )

    def best_response_at(self, upper: Params) -> jax.Array:
        """Returns the log-probabilities `[C, K]` of the policy that is optimal for a reward."""
        return exact.soft_policy(self.reward(upper, self.frozen.features), self.frozen.reference, self.beta)

    def phi(self, upper: Params) -> jax.Array:
        """Returns Phi, exact."""
        return exact.upper_value(
            self.objective,
            self.reward(upper, self.frozen.features),
            self.frozen.gold,
            self.frozen.reference,
            beta=self.beta,
            against_reference=self.against_reference,
        )

    def best_gold_value(self) -> jax.Array:
        """Returns the largest gold value of any policy."""
        return exact.soft_value(self.frozen.gold, self.frozen.reference, self.beta)

    def gold_value(self, log_policy: jax.Array) -> jax.Array:
        """Returns E gold - beta KL of log-probabilities `[C, K]`."""
        evaluation = exact.evaluate_policy(log_policy, self.frozen.reference, self.frozen.gold, self.beta)
        return self.best_gold_value() - evaluation.gap

    def least_utility_loss(self) -> float:
        """Returns min Phi of `utility` against the reference over all rewards: a soft value of the win rates."""
        wins = exact.win_rates(self.frozen.reference, self.frozen.gold)
        return -float(exact.soft_value(wins, self.frozen.reference, self.objective.kl_price))


def random_bandit(
    *,
    seed: int = 0,
    contexts: int = 2,
    arms: int = 5,
    features: int | None = None,
    network: str = "none",
    hidden: int = 16,
    objective: Objective | None = None,
    against_reference: bool = True,
    beta: float = 0.5,
    kl_price: float | None = None,
    gold_scale: float = 1.0,
) -> KnownProblem:
    """A random bandit: normal gold rewards, and a reference whose logits are normal.

    Args:
        seed: of the instance.
        contexts: C.
        arms: K.
        features: F random features of each arm, fewer than C K for a misspecified reward; None gives each arm a one-hot
            feature of its own, so that any reward can be represented.
        network: "none" for a linear reward and a table of logits; "reward" makes the reward a network, "both" the policy
            too.
        hidden: width of the networks.
        objective: the upper objective; None is `utility`, whose optimum has a closed form if any reward can be
            represented.
        against_reference: whether the second response of a pair comes from the reference.
        beta: weight of the lower level's KL.
        kl_price: of that utility; None is beta / 4.
        gold_scale: standard deviation of the gold rewards.

    Raises:
        ValueError: the kind of network is unknown, the objective does not suit the pairs, or both it and a KL
            price are given.
    """
    if network not in ("none", "reward", "both"):
        raise ValueError(f"network is none, reward or both, got {network!r}.")
    if objective is not None and kl_price is not None:
        raise ValueError("kl_price belongs to the utility that stands in for an objective; give one of the two.")
    tabular = network != "both"
    utility = objectives.utility(kl_price=beta / 4 if kl_price is None else kl_price)
    setting = BanditSetting(
        frozen=_random_instance(seed, contexts=contexts, arms=arms, features=features, gold_scale=gold_scale),
        reward=linear_reward if network == "none" else network_reward,
        policy=bandit.table if tabular else network_policy,
        objective=utility if objective is None else objective,
        against_reference=against_reference,
        beta=beta,
    )
    has_closed_form = objective is None and features is None and setting.objective.kl_price > 0
    return KnownProblem(
        algorithm=setting.algorithm,
        frozen=setting.frozen,
        data=None,
        start=functools.partial(_start, frozen=setting.frozen, network=network, hidden=hidden),
        solver=setting.best_response() if tabular else gradient(shared_adam(0.05), steps=300),
        best_response_at=setting.best_response_at if tabular else None,
        solver_from_labels=setting.best_response(from_labels=True) if tabular and against_reference else None,
        phi=setting.phi,
        gold_value_of_best_response=lambda upper: setting.gold_value(setting.best_response_at(upper)),
        gold_value=lambda lower: setting.gold_value(jax.nn.log_softmax(setting.policy(lower, setting.frozen), axis=-1)),
        best_gold_value=setting.best_gold_value(),
        optimum=setting.least_utility_loss() if has_closed_form else None,
        beta=beta,
        exact_solver=tabular,
    )


def _random_instance(seed: int, *, contexts: int, arms: int, features: int | None, gold_scale: float) -> bandit.Bandit:
    gold_key, reference_key, feature_key = jax.random.split(jax.random.key(seed), 3)
    shape = (contexts, arms)
    one_hot = jnp.eye(contexts * arms).reshape(*shape, -1)
    return bandit.Bandit(
        features=one_hot if features is None else jax.random.normal(feature_key, (*shape, features)),
        gold=gold_scale * jax.random.normal(gold_key, shape),
        reference=jax.nn.log_softmax(0.5 * jax.random.normal(reference_key, shape), axis=-1),
    )


def _start(key: Key, scale: float, *, frozen: bandit.Bandit, network: str, hidden: int) -> tuple[Params, Params]:
    """Returns a random reward of that scale and the policy at the reference (a network: close to it)."""
    keys = jax.random.split(key, 5)
    _, arms, size = frozen.features.shape

    def normal(key, *shape):
        return scale * jax.random.normal(key, shape)

    upper, lower = normal(keys[0], size), frozen.reference
    if network != "none":
        upper = {
            "in": normal(keys[0], size, hidden),
            "bias": normal(keys[1], hidden),
            "out": normal(keys[2], hidden) / hidden**0.5,
        }
    if network == "both":
        lower = {
            "in": normal(keys[3], arms * size, hidden),
            "bias": jnp.zeros(hidden),
            "out": normal(keys[4], hidden, arms) / hidden**0.5,
        }
    return upper, lower


def hard_bandit(
    *, seed: int = 0, contexts: int = 1, arms: int = 4, beta: float = 0.05, objective: Objective | None = None
) -> KnownProblem:
    """A bandit on which weak gradient domination is nearly tight: at a small beta and price optimal policies are
    deterministic.

    A softmax that has committed to a wrong arm lies on a plateau: the gradient of J vanishes with the probability of the
    right arm while J* - J does not. Near the optimum the gap falls like the inverse of the time, not geometrically.
    Arguments as in `random_bandit`; the utility's KL price is beta / 100.
    """
    return random_bandit(
        seed=seed,
        contexts=contexts,
        arms=arms,
        beta=beta,
        objective=objective,
        kl_price=None if objective is not None else beta / 100,
        gold_scale=0.3,
    )
