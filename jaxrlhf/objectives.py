"""Upper objectives: costs per pair, which add, each coupled to the policy or not.

With `d = R(y0) - R(y1)`, `p = sigmoid(d)` and labels z (1: response 0 preferred). A coupled cost holds the policy
responsible: its expectation is minimised through the lower level's answer. An uncoupled cost is fitted on the pairs as
they came, which is what iterated RLHF does.

What each rewards, and its loophole (`experiments/objectives.py` measures them with exact gradients):

| objective | labels | pairs | loophole when coupled |
|---|---|---|---|
| `likelihood` | 1 | any | the policy drifts to pairs whose labels are easy to predict |
| `brier` | 2 | policy-reference | none found; on policy-policy pairs a collapsed policy has no loss |
| `utility` | 1 | policy-reference | alone it never fits the reward to anything but the policy's own wins |
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrlhf.bilevel.problem import Labelled, PairCost
from jaxrlhf.types import Params


class Objective(NamedTuple):
    """An upper objective.

    Attributes:
        pair_cost: `(returns [B, M, 2], labels [B, M, L]) -> PairCost`.
        kl_price: kappa, adds kappa KL(policy || reference) to the coupled part.
        labels: labels a pair that it needs.
        against_reference: whether response 1 must come from the reference.
    """

    pair_cost: Callable[[jax.Array, jax.Array], PairCost]
    kl_price: float = 0.0
    labels: int = 1
    against_reference: bool = False

    def cost(self, upper: Params, reward: jax.Array, labelled: Labelled, frozen: Params) -> PairCost:
        """The `cost` of a `BilevelProblem`: the objective at the discounted returns of each pair.

        Raises:
            ValueError: at trace time, when a pair carries fewer labels than the objective needs.
        """
        del upper, frozen
        if labelled.labels.shape[-1] < self.labels:
            raise ValueError(
                f"The objective needs {self.labels} labels a pair, the annotator gave {labelled.labels.shape[-1]}."
            )
        returns = jnp.sum(labelled.sample.discount * reward, axis=-1)
        return self.pair_cost(returns, labelled.labels)


def likelihood(*, coupled: bool = True, weight: float = 1.0) -> Objective:
    """Returns the Bradley-Terry negative log-likelihood, `-z log p - (1 - z) log(1 - p)` in nats, mean over labels.

    Coupled and on policy-policy pairs it is the upper objective of arXiv 2410.15610.
    """

    def pair_cost(returns, labels):
        difference = returns[..., 0] - returns[..., 1]
        return _part(weight * (jax.nn.softplus(difference) - jnp.mean(labels, axis=-1) * difference), coupled)

    return Objective(pair_cost)


def brier(*, coupled: bool = True, weight: float = 1.0) -> Objective:
    """Returns `(p - z1) (p - z2)` with two independent labels: an unbiased estimate of (p - P(y0 preferred))^2."""

    def pair_cost(returns, labels):
        probability = jax.nn.sigmoid(returns[..., 0] - returns[..., 1])
        return _part(weight * (probability - labels[..., 0]) * (probability - labels[..., 1]), coupled)

    return Objective(pair_cost, labels=2, against_reference=coupled)


def utility(*, kl_price: float, weight: float = 1.0) -> Objective:
    """Returns `weight (-win rate against the reference + kl_price KL)`, always coupled: it holds no reward to fit.

    Near the reference the win rate rises by a quarter of the gold reward's gain (the slope of the sigmoid at 0), so
    `kl_price = beta / 4` asks for the trade-off between reward and KL that the lower level makes.
    """

    def pair_cost(returns, labels):
        del returns
        return _part(-weight * jnp.mean(labels, axis=-1), coupled=True)

    return Objective(pair_cost, kl_price=weight * kl_price, against_reference=True)


def add(*objectives: Objective) -> Objective:
    """Returns the sum: costs and KL prices add, the strictest need wins."""
    if not objectives:
        raise ValueError("add needs at least one objective.")

    def pair_cost(returns, labels):
        costs = [objective.pair_cost(returns, labels) for objective in objectives]
        return jax.tree.map(lambda *parts: sum(parts[1:], parts[0]), *costs)

    return Objective(
        pair_cost,
        kl_price=sum(objective.kl_price for objective in objectives),
        labels=max(objective.labels for objective in objectives),
        against_reference=any(objective.against_reference for objective in objectives),
    )


def _part(cost: jax.Array, coupled: bool) -> PairCost:
    return PairCost(cost, jnp.zeros_like(cost)) if coupled else PairCost(jnp.zeros_like(cost), cost)
