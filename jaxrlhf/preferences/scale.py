"""The reward's scale as an upper variable: the trade-off between winning and KL is stated, not swept.

The upper objective states what a nat of KL is worth: G = -E[win] + kappa KL (`objectives.utility`). How far the policy
goes is decided by the lower level, through the reward's scale over beta. With `learn_scale` that scale is one more upper
parameter alpha, beside the reward parameters phi:

    lower level     lambda*(phi, alpha) = argmax over lambda of  E[exp(alpha) R_phi] - beta KL
    upper level     minimise over phi, alpha:  uncoupled cost of R_phi  +  coupled cost at lambda*(phi, alpha)

The uncoupled cost, such as the likelihood of the labels, sees the reward without its scale and keeps it calibrated; the
coupled cost sees the scaled one and alone moves alpha. At a best response with one step,

    d Phi / d alpha = (1 / beta) Cov_pi(dG/dpi, exp(alpha) R) = coupled_slope + kappa kl_slope

(`BilevelInfo`), one number averaged over the whole sample. It vanishes where the marginal price -coupled_slope / kl_slope,
what the next nat of KL still buys, equals kappa. `beta` becomes a unit: the policy sees beta exp(-alpha) alone.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax

from jaxrlhf.base.problem import BilevelProblem, Labelled, PairCost, Sample
from jaxrlhf.base.types import Params


class ScaledReward(NamedTuple):
    """Upper parameters with a learned scale.

    Attributes:
        reward: phi, the reward model's parameters.
        log_scale: `[]`, alpha.
    """

    reward: Params
    log_scale: jax.Array

    def effective_beta(self, beta: float | jax.Array) -> jax.Array:
        """Returns beta exp(-alpha): the weight of the KL beside the reward without its scale."""
        return beta * jnp.exp(-self.log_scale)


def with_scale(reward: Params, scale: float = 1.0) -> ScaledReward:
    """Returns upper parameters that start at a positive scale.

    Raises:
        ValueError: the scale is not positive.
    """
    if not scale > 0:
        raise ValueError(f"The reward's scale must be positive, got {scale}.")
    return ScaledReward(reward, jnp.log(jnp.asarray(scale, float)))


def scaled(reward: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Returns `(upper, ...) -> exp(alpha) reward(phi, ...)` for `upper` a `ScaledReward`."""

    def function(upper: ScaledReward, *arguments: Any) -> jax.Array:
        rewards = reward(upper.reward, *arguments)
        return jnp.exp(upper.log_scale).astype(rewards.dtype) * rewards

    return function


def learn_scale(problem: BilevelProblem) -> BilevelProblem:
    """Returns the problem with `ScaledReward` as its upper parameters; everything else stays.

    Any reward, sample, rule and solver: the scale multiplies the reward's outputs. Rules that do not differentiate through
    the best response (`decoupled`) leave it where it is.
    """

    def cost(upper: ScaledReward, reward: jax.Array, labelled: Labelled, frozen: Params) -> PairCost:
        # d/d alpha of the unscaled reward is 0: what comes through `reward` and through `log_scale` cancels.
        unscaled = reward * jnp.exp(-upper.log_scale).astype(reward.dtype)
        return PairCost(
            coupled=problem.cost(upper.reward, reward, labelled, frozen).coupled,
            uncoupled=problem.cost(upper.reward, unscaled, labelled, frozen).uncoupled,
        )

    def reward(upper: ScaledReward, sample: Sample, frozen: Params) -> jax.Array:
        return scaled(problem.reward)(upper, sample, frozen)

    return problem._replace(reward=reward, cost=cost)


def scale_optimizer(
    reward: optax.GradientTransformation, scale: optax.GradientTransformation
) -> optax.GradientTransformation:
    """Returns an optimiser of `ScaledReward` from one for phi and one for alpha."""

    def init(params: Any) -> ScaledReward:
        return ScaledReward(reward.init(params.reward), cast(Any, scale.init(params.log_scale)))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[ScaledReward, ScaledReward]:
        parts = (None, None) if params is None else params
        reward_updates, reward_state = reward.update(updates.reward, state.reward, parts[0])
        scale_update, scale_state = scale.update(updates.log_scale, state.log_scale, parts[1])
        return ScaledReward(reward_updates, cast(Any, scale_update)), ScaledReward(reward_state, cast(Any, scale_state))

    return optax.GradientTransformation(init, update)


def marginal_price(coupled_slope: jax.Array, kl_slope: jax.Array) -> jax.Array:
    """Returns `-coupled_slope / kl_slope`, the cost that the next nat of KL saves along the reward; to set beside kappa.

    Slopes of single steps are noisy: average them over steps before dividing. At the reference the first nat is free, and
    the price infinite.
    """
    return -coupled_slope / kl_slope
