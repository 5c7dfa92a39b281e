"""Upper objectives: costs per pair that can be added, each coupled to the policy or not.

With `d = R(y0) - R(y1)`, `p = sigmoid(d)`, labels z (1: response 0 preferred) and P the annotator's probability of z = 1.
The expectation of a coupled cost is differentiated through the best response. An uncoupled cost is fitted on the pairs at
hand with the policy held fixed, as in iterated RLHF. Pairs may be policy-policy or policy-reference; the problem chooses.

| objective | cost of a pair | needs | rewards | loophole when coupled |
|---|---|---|---|---|
| `likelihood` | -z log p - (1 - z) log(1 - p) | 1 label | pairs that the reward predicts | the policy drifts to pairs whose labels are easy to predict |
| `excess_likelihood` | KL(P, p) | P itself: exact problems only | a reward that is right where the policy goes | on policy-policy pairs a collapsed policy has no loss |
| `brier` | (p - z1)(p - z2) | 2 labels | as above, (p - P)^2 in expectation | the same; on policy-reference pairs none was found |
| `utility` | -z | 1 label, policy-reference | winning against the reference | alone it fits the reward to nothing but the policy's own wins |

Measured by exact descent on bandits whose reward class holds the truth (`python experiments/convergence.py --only
objectives`; return as a fraction of the oracle's gain over the reference):

- the paper's likelihood, started at the truth, lowers its own value by 0.06 while the return falls from 1.00 to 0.56;
- Brier on policy-policy pairs is 0.0000 at returns of 1.00, 0.77 and -1.33, by the start: it cannot tell them apart;
- utility alone at beta 0.1 never escapes a collapsed start (-1.19); with the uncoupled likelihood it does (0.99);
- coupled costs on policy-reference pairs lose to iterated RLHF where annotators favour a position (missing 0.11 and 0.09
  of the gain, against 0.04).

`policy_gradient.label_policy_gradient` is the honest baseline beside `utility`: the same objective with no reward model.
"""  # noqa: E501

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrlhf.base.problem import Labelled, PairCost
from jaxrlhf.base.types import Params
from jaxrlhf.preferences.choice import BRADLEY_TERRY, Choice, log_outcomes


class Objective(NamedTuple):
    """An upper objective.

    Attributes:
        pair_cost: `(returns [B, M, 2], labels [B, M, L]) -> PairCost`, for pairs that were labelled.
        kl_price: kappa, adds kappa KL(policy || reference) to the coupled part.
        labels: how many labels a pair it needs.
        against_reference: whether response 1 must come from the reference.
        exact_only: whether it needs the probability of a label in place of drawn labels.
    """

    pair_cost: Callable[[jax.Array, jax.Array], PairCost]
    kl_price: float | jax.Array = 0.0
    labels: int = 1
    against_reference: bool = False
    exact_only: bool = False

    def at(self, returns: jax.Array, labels: jax.Array) -> PairCost:
        """Returns the costs `[B, M]` at returns `[B, M, 2]` and labels `[B, M, L]`; a pair with a skipped label costs
        nothing.

        Raises:
            ValueError: at trace time, when a pair carries fewer labels than the objective needs.
        """
        if labels.shape[-1] < self.labels:
            raise ValueError(f"The objective needs {self.labels} labels a pair, the annotator gave {labels.shape[-1]}.")
        labelled = jnp.all(labels >= 0, axis=-1)
        cost = self.pair_cost(returns, jnp.maximum(labels, 0.0))
        return jax.tree.map(lambda part: jnp.where(labelled, part, 0.0), cost)

    def cost(self, upper: Params, reward: jax.Array, labelled: Labelled, frozen: Params) -> PairCost:
        """The `cost` of a `BilevelProblem`: the objective at the discounted returns of each pair."""
        del upper, frozen
        return self.at(jnp.sum(labelled.sample.cumulative_discount * reward, axis=-1), labelled.labels)

    def check(self, *, against_reference: bool, exact: bool) -> None:
        """Refuses a problem whose pairs do not suit the objective.

        Raises:
            ValueError: the objective needs pairs against the reference, or exact labels, and would not get them.
        """
        if self.against_reference and not against_reference:
            raise ValueError("This objective needs policy-reference pairs; set against_reference=True.")
        if self.exact_only and not exact:
            raise ValueError(
                "This objective needs the probability of each label, which no number of labels gives; enumerate the "
                "problem, or use brier."
            )


def likelihood(*, coupled: bool = True, weight: float = 1.0, choice: Choice = BRADLEY_TERRY) -> Objective:
    """Returns the negative log-likelihood of the labels, in nats, mean over labels.

    With the default choice it is `-z log p - (1 - z) log(1 - p)`; coupled and on policy-policy pairs that is the upper
    objective of arXiv 2410.15610. With the annotator's own `choice` (mistakes, ties, position) they need not be
    explained by differences of return.

    Args:
        coupled: whether it is differentiated through the best response.
        weight: factor of the cost.
        choice: the assumed choice model of the annotator. Labels between the outcomes 0, 1/2 (a tie) and 1 cost the linear
            interpolation, so expected labels are exact unless there are ties.

    Raises:
        ValueError: the choice is out of range.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jaxrlhf import objectives
        >>> returns, labels = jnp.array([[[2.0, 0.0], [0.0, 0.0]]]), jnp.array([[[1.0], [0.0]]])  # [B, M, 2], [B, M, 1]
        >>> objectives.likelihood(coupled=False).at(returns, labels).uncoupled.tolist()
        [[0.127, 0.693]]
    """
    choice.check()

    def pair_cost(returns, labels):
        if not isinstance(choice.mistake, jax.Array) and choice == BRADLEY_TERRY:
            difference = returns[..., 0] - returns[..., 1]
            return _part(weight * (jax.nn.softplus(difference) - jnp.mean(labels, axis=-1) * difference), coupled)
        loses, ties, wins = jnp.moveaxis(-log_outcomes(returns, choice), -1, 0)[..., None]
        if choice.tie > 0:
            cost = jnp.where(
                labels < 0.5,
                (1.0 - 2.0 * labels) * loses + 2.0 * labels * ties,
                (2.0 - 2.0 * labels) * ties + (2.0 * labels - 1.0) * wins,
            )
        else:
            cost = (1.0 - labels) * loses + labels * wins
        return _part(weight * jnp.mean(cost, axis=-1), coupled)

    return Objective(pair_cost)


def excess_likelihood(*, coupled: bool = True, weight: float = 1.0) -> Objective:
    """Returns KL(P, p) in nats: the likelihood less the entropy of the label: a correct reward costs nothing.

    Exact problems only: labels must be probabilities. The entropy of a label cannot be estimated without bias from two
    draws; `brier` is the objective with this property that can.
    """

    def pair_cost(returns, labels):
        difference, probability = returns[..., 0] - returns[..., 1], jnp.mean(labels, axis=-1)
        entropy = jax.scipy.special.entr(probability) + jax.scipy.special.entr(1.0 - probability)
        return _part(weight * (jax.nn.softplus(difference) - probability * difference - entropy), coupled)

    return Objective(pair_cost, against_reference=coupled, exact_only=True)


def brier(*, coupled: bool = True, weight: float = 1.0) -> Objective:
    """Returns `(p - z1) (p - z2)` with two independent labels: an unbiased estimate of (p - P(y0 preferred))^2.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jaxrlhf import objectives
        >>> objectives.brier().at(jnp.zeros((1, 1, 2)), jnp.array([[[1.0, 0.0]]])).coupled.tolist()  # p = 1/2, two labels
        [[-0.25]]
    """

    def pair_cost(returns, labels):
        probability = jax.nn.sigmoid(returns[..., 0] - returns[..., 1])
        return _part(weight * (probability - labels[..., 0]) * (probability - labels[..., 1]), coupled)

    return Objective(pair_cost, labels=2, against_reference=coupled)


def utility(*, kl_price: float | jax.Array, weight: float = 1.0) -> Objective:
    """Returns `weight (-win rate against the reference + kl_price KL)`, always coupled: it has no reward to fit.

    Near the reference the win rate rises by a quarter of the gold reward's gain (the slope of the sigmoid at 0), so
    `kl_price = beta / 4` asks for the trade-off between reward and KL that the lower level makes.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jaxrlhf import objectives
        >>> objective = objectives.utility(kl_price=0.03)
        >>> objective.at(jnp.zeros((1, 2, 2)), jnp.array([[[1.0], [0.5]]])).coupled.tolist()  # a win, a tie
        [[-1.0, -0.5]]
        >>> objective.kl_price, objective.against_reference
        (0.03, True)
    """

    def pair_cost(returns, labels):
        del returns
        return _part(-weight * jnp.mean(labels, axis=-1), coupled=True)

    return Objective(pair_cost, kl_price=weight * kl_price, against_reference=True)


def add(*objectives: Objective) -> Objective:
    """Returns the sum: costs and KL prices add, and the strictest requirement holds.

    Examples:
        >>> from jaxrlhf import objectives
        >>> objective = objectives.add(objectives.likelihood(coupled=False), objectives.utility(kl_price=0.05))
        >>> objective.kl_price, objective.labels, objective.against_reference
        (0.05, 1, True)
    """
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
        exact_only=any(objective.exact_only for objective in objectives),
    )


def weighted(objective: Objective, weight: float) -> Objective:
    """Returns the objective with the costs of its pairs, and not its price of KL, multiplied.

    Where a fraction of the pairs, drawn at random, is labelled, the weight 1 / fraction leaves every expectation as it is:
    skipped pairs cost nothing, and the KL is counted on all.
    """

    def pair_cost(returns, labels):
        return jax.tree.map(lambda part: weight * part, objective.pair_cost(returns, labels))

    return objective._replace(pair_cost=pair_cost)


def _part(cost: jax.Array, coupled: bool) -> PairCost:
    return PairCost(cost, jnp.zeros_like(cost)) if coupled else PairCost(jnp.zeros_like(cost), cost)
