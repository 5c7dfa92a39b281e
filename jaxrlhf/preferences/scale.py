"""The reward's scale as an upper variable: the trade-off between winning and KL is stated, not swept.

The upper objective states what a nat of KL is worth: G = -E[win] + kappa KL (`objectives.utility`). How far the policy
goes is decided by the lower level, through the reward's scale over beta. With `learn_scale` that scale is one more upper
parameter alpha, beside the reward parameters phi:

    lower level     lambda*(phi, alpha) = argmax over lambda of  E[exp(alpha) R_phi] - beta KL
    upper level     minimise over phi, alpha:  uncoupled cost of R_phi  +  coupled cost at lambda*(phi, alpha)

The uncoupled cost, such as the likelihood of the labels, sees the reward without its scale and keeps it calibrated; the
coupled cost sees the scaled one and alone moves alpha. At a best response with one step,

    d Phi / d alpha = Cov_pi(dG/dpi, l) = coupled_slope + kappa kl_slope,    l = log(pi / reference) = exp(alpha) R / beta

up to a constant of each prompt: one number, averaged over the whole sample. It vanishes where the marginal price of KL,
-coupled_slope / kl_slope of `BilevelInfo`, equals kappa. `beta` becomes a unit: only beta exp(-alpha) matters.

A network is never quite at its best response: it lags, and spends KL on the noise of its training. Along the reward, which
such a policy has not yet followed, the next nat looks cheap; along the policy's own way it costs what it costs. So the
derivative is taken along l = log(mu / reference) of the policy mu that drew the sample, in every rule: `reward` has the
derivative beta l in alpha. Where l has little to do with the reward yet (`FOLLOWED`), as at first, it is mostly noise, and
the reward takes its place at half its size: a policy that stands still is credited with half of the response. At a best
response l is the reward, and nothing changes.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax

from jaxrlhf.base import importance
from jaxrlhf.base.problem import BilevelProblem, Labelled, PairCost, Sample
from jaxrlhf.base.types import Params

FOLLOWED = 0.4
"""The correlation of a policy's log-ratio with its reward from which the policy counts as having followed it."""


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

    Examples:
        >>> import jax.numpy as jnp
        >>> from jaxrlhf.preferences.scale import with_scale
        >>> upper = with_scale(jnp.zeros(4), scale=2.0)
        >>> round(float(upper.effective_beta(0.1)), 3)
        0.05
    """
    if not scale > 0:
        raise ValueError(f"The reward's scale must be positive, got {scale}.")
    return ScaledReward(reward, jnp.log(jnp.asarray(scale, float)))


def scaled(reward: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Returns `(upper, ...) -> exp(alpha) reward(phi, ...)` for `upper` a `ScaledReward`."""

    def function(upper: ScaledReward, *arguments: Any) -> jax.Array:
        return _times_scale(upper, reward(upper.reward, *arguments))

    return function


def learn_scale(problem: BilevelProblem, *, beta: float | jax.Array) -> BilevelProblem:
    """Returns the problem with `ScaledReward` as its upper parameters; everything else stays.

    Any reward, sample and solver, and any rule that follows the best response; `decoupled` does not, and needs
    `optax.set_to_zero()` for alpha. Labels that the reward was fitted to before the update make its scale grow: fit after
    it (`replay.refitted(held_out=True)`).

    Args:
        problem: any.
        beta: that of `bilevel_descent`.
    """

    def reward(upper: ScaledReward, sample: Sample, frozen: Params) -> jax.Array:
        rewards = scaled(problem.reward)(jax.lax.stop_gradient(upper)._replace(reward=upper.reward), sample, frozen)
        return rewards + _zero(upper) * jax.lax.stop_gradient(_direction(rewards, sample, beta))

    def cost(upper: ScaledReward, reward: jax.Array, labelled: Labelled, frozen: Params) -> PairCost:
        # What alpha moves in `reward` is taken off again: the costs see R, which does not depend on it, and exp(alpha) R.
        fixed = reward - _zero(upper) * jax.lax.stop_gradient(_direction(reward, labelled.sample, beta))
        unscaled = fixed * jnp.exp(-jax.lax.stop_gradient(upper.log_scale)).astype(reward.dtype)
        return PairCost(
            coupled=problem.cost(upper.reward, _times_scale(upper, unscaled), labelled, frozen).coupled,
            uncoupled=problem.cost(upper.reward, unscaled, labelled, frozen).uncoupled,
        )

    def reference_returns(upper: ScaledReward, sample: Sample, frozen: Params) -> jax.Array:
        assert problem.reference_returns is not None
        return _times_scale(upper, problem.reference_returns(upper.reward, sample, frozen))

    returns = None if problem.reference_returns is None else reference_returns
    return problem._replace(reward=reward, cost=cost, reference_returns=returns)


def _zero(upper: ScaledReward) -> jax.Array:
    """Returns 0, with the derivative 1 in alpha."""
    return upper.log_scale - jax.lax.stop_gradient(upper.log_scale)


def _direction(rewards: jax.Array, sample: Sample, beta: float | jax.Array) -> jax.Array:
    """Returns `trust beta l + (1 - trust) rewards / 2`, `[B, M, 2, T]`, with trust = min(1, correlation / FOLLOWED)^2.

    The correlation of l and the rewards, at least 0, is that of the policy's responses within their prompts.
    """
    along = beta * importance.policy_log_ratio(sample.behaviour_log_prob, sample)
    weights = sample.measure[:, :, None] * importance.policy_slot_weights(sample)[..., 0]

    def centred(values: jax.Array) -> jax.Array:
        returns = jnp.sum(sample.cumulative_discount * values, axis=-1)
        mean = jnp.sum(weights * returns, axis=(1, 2), keepdims=True) / jnp.sum(weights, axis=(1, 2), keepdims=True)
        return returns - mean

    def inner(first: jax.Array, second: jax.Array) -> jax.Array:
        return jnp.sum(weights * first * second)

    by_reward, by_policy = centred(rewards), centred(along)
    size = jnp.sqrt(inner(by_reward, by_reward) * inner(by_policy, by_policy))
    correlation = inner(by_reward, by_policy) / jnp.maximum(size, jnp.finfo(size.dtype).tiny)
    trust = jnp.square(jnp.clip(correlation / FOLLOWED, 0.0, 1.0))
    return (trust * along + (1.0 - trust) * 0.5 * rewards).astype(rewards.dtype)


def _times_scale(upper: ScaledReward, rewards: jax.Array) -> jax.Array:
    return jnp.exp(upper.log_scale).astype(rewards.dtype) * rewards


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
    """Returns `-coupled_slope / kl_slope`, the cost that the policy's next nat of KL saves; to set beside kappa.

    Slopes of single steps are noisy: average them over steps before dividing. At the reference the first nat is free, and
    the price infinite.

    Examples:
        >>> from jaxrlhf.preferences.scale import marginal_price
        >>> round(marginal_price(-0.06, 2.0), 3)  # wins gained and nats spent, both per unit of the same direction
        0.03
    """
    return -coupled_slope / kl_slope
