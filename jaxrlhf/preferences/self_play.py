"""Wins against the reference, read off labels between two responses of the policy.

The utility asks how often the policy wins against the reference. Pairs of its own responses say more of that than pairs
with the reference do: once a policy wins most of those, each label says little, of the reward and of the price alike. So
both responses of a pair are the policy's, the pair is used from both sides, and what its label is worth against the
reference is told by the learned reward. By Bradley and Terry, with a reward r, z a pair's label and y' the reference's,

    E[z] = sigmoid(r(y0) - r(y1)),      u(y) = E_y' sigmoid(r(y) - r(y'))  the win rate of y against the reference,

the utility moves by Cov_pi(u, l) = E[(u(y0) - u(y1)) (l(y0) - l(y1))] / 2 along l, and self-play measures
E[(z - 1/2) (l(y0) - l(y1))] / 2. They agree once each label counts by its *exchange rate*

    w(y0, y1) = (u(y0) - u(y1)) / (sigmoid(r(y0) - r(y1)) - 1/2),      0 < w < 2.

w comes from the learned reward, and the sign from the label: the estimate is right where the reward is, and where the
reward is wrong about a pair, its label says so and counts by the same rate. Mistakes of the annotator scale the estimate
as they scale the win rate that is observed. u is a mean over y', so that few responses of the reference do.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxrlhf.base.problem import BilevelProblem, Labelled, PairCost
from jaxrlhf.base.types import Params

LEVEL = 0.05
"""Difference of returns below which the exchange rate is taken from its limit; the error is of order LEVEL^2 / 100."""


def win_rates(returns: jax.Array, reference: jax.Array) -> jax.Array:
    """Returns `[B, M, 2]`: u_i = mean_k sigmoid(r_i - reference_k), how often each response wins against the reference.

    By the reward itself and not by labels: a policy that is trained on it wins by it more often than in truth.

    Args:
        returns, reference: as in `exchange_rate`.
    """
    return jax.nn.sigmoid(returns[..., None] - reference[:, None, None, :]).mean(axis=-1)


def exchange_rate(returns: jax.Array, reference: jax.Array) -> jax.Array:
    """Returns w `[B, M]`: wins against the reference for a win between the responses of a pair.

        w = (u_0 - u_1) / (sigmoid(r_0 - r_1) - 1/2),      u of `win_rates`

    4 mean_k sigmoid'(r - reference_k) where r_0 = r_1 = r. 1 where all returns are equal.

    Args:
        returns: `[B, M, 2]`, of pairs, in the units of the labels' log-odds.
        reference: `[B, K]`, of the reference's responses to the same prompts.
    """
    wins = win_rates(returns, reference)
    middle = jax.nn.sigmoid(returns.mean(axis=-1)[..., None] - reference[:, None, :])
    limit = 4.0 * jnp.mean(middle * (1.0 - middle), axis=-1)
    difference = returns[..., 0] - returns[..., 1]
    is_level = jnp.abs(difference) < LEVEL
    margin = jax.nn.sigmoid(jnp.where(is_level, 1.0, difference)) - 0.5
    return jnp.where(is_level, limit, (wins[..., 0] - wins[..., 1]) / margin)


def wins_against_reference(
    problem: BilevelProblem, *, scale: Callable[[Params], jax.Array | float] = lambda upper: 1.0
) -> BilevelProblem:
    """Returns the problem whose coupled cost c(z) of a label z is c(1/2) + w (c(z) - c(1/2)).

    With the utility as coupled cost and pairs of self-play (`annotators.from_both_sides`), its hypergradient is that of
    the win rate against the reference. The uncoupled cost stays.

    Args:
        problem: with `reference_returns`.
        scale: `(upper) -> ` the factor of the problem's returns over the log-odds of labels: exp(log_scale) of a learned
            scale.

    Raises:
        ValueError: the problem has no responses of the reference.
    """
    if problem.reference_returns is None:
        raise ValueError(
            "Wins against the reference need its responses; give the problem reference_responses=1 or more."
        )
    reference_returns = problem.reference_returns

    def cost(upper: Params, reward: jax.Array, labelled: Labelled, frozen: Params) -> PairCost:
        sample, labels = labelled
        fixed, unit = jax.lax.stop_gradient(upper), jax.lax.stop_gradient(scale(upper))
        returns = jnp.sum(sample.cumulative_discount * jax.lax.stop_gradient(reward), axis=-1)
        rate = exchange_rate(returns / unit, reference_returns(fixed, sample, frozen) / unit)
        given = problem.cost(upper, reward, labelled, frozen)
        ties = labelled._replace(labels=jnp.where(labels < 0, labels, 0.5))
        level = problem.cost(upper, reward, ties, frozen).coupled
        return given._replace(coupled=level + rate * (given.coupled - level))

    return problem._replace(cost=cost)
