"""Regularised policy gradient with a critic (PPO): the gradient of J for policies on long episodes.

With the regularised reward `rho_t = r_t - beta log(mu / reference)` of the policy mu that sampled, and a critic v,

    delta_t = rho_t + gamma v_{t+1} - v_t            v_{t+1} = 0 after the last step
    A_t     = delta_t + gamma trace A_{t+1}          generalised advantages (arXiv 1506.02438)
    loss    = - E sum_t gamma^t min(w_t A_t, clip(w_t, 1 - c, 1 + c) A_t),    w_t = pi(a_t | s_t) / mu(a_t | s_t)

which on the first step, pi = mu, has the gradient `E sum_t gamma^t A_t grad log pi`; the clipping (arXiv 1707.06347)
bounds what later steps on the same sample may do. The critic descends `E sum_t gamma^t (v_t - A_t - v_t(old))^2 / 2`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxrlhf.base import importance
from jaxrlhf.base.algorithm import owned
from jaxrlhf.base.problem import BilevelProblem, Sample
from jaxrlhf.base.types import Params
from jaxrlhf.bilevel.solvers import LowerTask, PolicyGradientEstimator


class CriticState(NamedTuple):
    """The critic's parameters and its optimiser's state."""

    critic: Params
    optimizer: Any


def advantages(reward: jax.Array, value: jax.Array, discount: jax.Array, *, trace: float | jax.Array) -> jax.Array:
    """Returns the generalised advantages, `[..., T]`.

    Args:
        reward: `[..., T]`, regularised, not discounted.
        value: `[..., T]`, the critic at each step's state.
        discount: `[..., T]`, gamma^t on the steps taken, 0 after the end; truncated episodes count as ended.
        trace: lambda in [0, 1]; 1 is the return to go less the critic, 0 one step.
    """
    following = jnp.concatenate([discount[..., 1:], jnp.zeros_like(discount[..., :1])], axis=-1)
    gamma = jnp.where(discount > 0, following / jnp.where(discount > 0, discount, 1.0), 0.0)
    next_value = jnp.concatenate([value[..., 1:], jnp.zeros_like(value[..., :1])], axis=-1)
    delta = jnp.where(discount > 0, reward + gamma * next_value - value, 0.0)

    def backward(later, now):
        delta, gamma = now
        total = delta + gamma * trace * later
        return total, total

    steps = (jnp.moveaxis(delta, -1, 0), jnp.moveaxis(gamma, -1, 0))
    _, result = jax.lax.scan(backward, jnp.zeros_like(delta[..., 0]), steps, reverse=True)
    return jnp.moveaxis(result, 0, -1)


def actor_critic(
    problem: BilevelProblem,
    value: Callable[[Params, Sample, Params], jax.Array],
    critic: Params | Callable[[Params], Params],
    optimizer: optax.GradientTransformation,
    *,
    beta: float | jax.Array,
    trace: float = 0.95,
    clip: float = 0.2,
    every_response: bool = False,
) -> PolicyGradientEstimator:
    """Returns the estimator of the gradient of -J by advantages; it trains the critic as it goes.

    Args:
        problem: for its `reward` and `log_prob`.
        value: `(critic, sample, frozen) -> [B, M, 2, T]`, the value of each step's state; slots that the reference filled
            may hold anything.
        critic: the first parameters, or `(policy) -> ` them, for a critic that starts from the policy's own weights.
        optimizer: of the critic.
        beta: weight of the lower level's KL, as in `bilevel_descent`.
        trace: lambda of the advantages.
        clip: c of the clipped ratio.
        every_response: whether to learn from responses that another policy gave too, by their clipped ratio; for
            opponents that are recent copies of the policy.

    Raises:
        ValueError: the trace lies outside of [0, 1], or the clip is not positive.
    """
    if not 0 <= trace <= 1:
        raise ValueError(f"trace must lie in [0, 1], got {trace:g}.")
    if not clip > 0:
        raise ValueError(f"clip must be positive, got {clip:g}.")

    def step(policy: Params, state: CriticState, task: LowerTask):
        sample, frozen = task.labelled.sample, task.frozen
        if every_response:
            sample = sample._replace(from_policy=jnp.ones_like(sample.from_policy))
        reward = problem.reward(task.upper, sample, frozen)
        reward = reward - beta * (sample.behaviour_log_prob - sample.reference_log_prob)
        old = value(state.critic, sample, frozen)
        advantage = advantages(reward, old, sample.cumulative_discount, trace=trace)

        def mean(values):
            return importance.expectation(
                jnp.sum(importance.policy_slot_weights(sample) * sample.cumulative_discount * values, axis=(-2, -1)),
                sample,
            )

        def actor_loss(policy):
            difference = problem.log_prob(policy, sample, frozen) - sample.behaviour_log_prob
            ratio = jnp.exp(jnp.where(sample.from_policy[None, None, :, None] > 0, difference, 0.0))
            return -mean(jnp.minimum(ratio * advantage, jnp.clip(ratio, 1.0 - clip, 1.0 + clip) * advantage))

        def critic_loss(critic):
            return 0.5 * mean(jnp.square(value(critic, sample, frozen) - advantage - old))

        move, optimizer_state = optimizer.update(jax.grad(critic_loss)(state.critic), state.optimizer, state.critic)
        return jax.grad(actor_loss)(policy), CriticState(optax.apply_updates(state.critic, move), optimizer_state)

    def init(policy: Params = ()):
        params = owned(critic(policy) if callable(critic) else critic)
        return CriticState(params, optimizer.init(params))

    return PolicyGradientEstimator(init, step)
