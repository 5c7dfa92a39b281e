"""Group-relative policy optimisation (GRPO): the gradient of J without a critic, from comparing a prompt's responses.

With the rewards of a prompt's responses, their mean and standard deviation,

    A = (R - mean) / (standard deviation + 1e-6)                                   the same for every step of a response
    loss = - E sum_t min(w_t A, clip(w_t, 1 - c, 1 + c) A) + beta KL,      w_t = pi(a_t | s_t) / mu(a_t | s_t)

(arXiv 2402.03300). Dividing by the standard deviation makes beta a weight in units of it: the fixed point is
`pi proportional to reference * exp(R / (beta standard deviation of R under pi))`, prompt by prompt, another problem
than the lower level's. `scaled=False` leaves the division out ("Dr. GRPO", arXiv 2503.20783) and has the lower level's
own.

Departures: the KL's gradient is the KL's (`importance.kl`); the published one differentiates k3 as it stands, which
descends KL(reference || policy) instead. Steps are summed and not averaged over a response, so that length changes no
weight.
"""

import jax
import jax.numpy as jnp

from jaxrlhf.base import importance
from jaxrlhf.base.problem import BilevelProblem, Sample
from jaxrlhf.base.types import Params
from jaxrlhf.bilevel.solvers import LowerTask, PolicyGradientEstimator


def group_relative(
    problem: BilevelProblem, *, beta: float | jax.Array, clip: float = 0.2, scaled: bool = True
) -> PolicyGradientEstimator:
    """Returns the estimator of the gradient of -J by group-relative advantages, for `tangent(..., policy_gradient=...)`.

    Args:
        problem: for its `reward` and `log_prob`. The ratio is clipped per step where responses have steps (a
            language problem with per_token=True), per response otherwise.
        beta: weight of the KL; where `scaled`, in units of the rewards' standard deviation.
        clip: c of the clipped ratio, positive.
        scaled: whether advantages are divided by the standard deviation.

    Raises:
        ValueError: the clip is not positive.
    """
    if not clip > 0:
        raise ValueError(f"clip must be positive, got {clip:g}.")

    def step(policy: Params, state, task: LowerTask):
        sample, frozen = task.labelled.sample, task.frozen
        reward = problem.reward(task.upper, sample, frozen)
        advantage = group_advantages(jnp.sum(sample.cumulative_discount * reward, axis=-1), sample, scaled=scaled)[
            ..., None
        ]

        def loss(policy):
            log_prob = problem.log_prob(policy, sample, frozen)
            difference = log_prob - sample.behaviour_log_prob
            ratio = jnp.exp(jnp.where(sample.from_policy[None, None, :, None] > 0, difference, 0.0))
            gain = jnp.minimum(ratio * advantage, jnp.clip(ratio, 1.0 - clip, 1.0 + clip) * advantage)
            taken = (sample.cumulative_discount > 0).astype(gain.dtype)
            total = jnp.sum(importance.policy_slot_weights(sample) * taken * gain, axis=(-2, -1))
            return beta * importance.kl(log_prob, sample) - importance.expectation(total, sample)

        return jax.grad(loss)(policy), state

    return PolicyGradientEstimator(lambda policy: (), step)


def group_advantages(returns: jax.Array, sample: Sample, *, scaled: bool = True) -> jax.Array:
    """Returns `[B, M, 2]`: returns less the mean of their prompt, over their standard deviation if `scaled`.

    Over the policy's responses, weighted by their measure: exact where pairs are listed.
    """
    weights = sample.measure / jnp.sum(sample.measure, axis=-1, keepdims=True)
    weights = weights[..., None] * importance.policy_slot_weights(sample)[..., 0]
    centred = returns - jnp.sum(weights * returns, axis=(1, 2), keepdims=True)
    if not scaled:
        return centred
    return centred / (jnp.sqrt(jnp.sum(weights * jnp.square(centred), axis=(1, 2), keepdims=True)) + 1e-6)
