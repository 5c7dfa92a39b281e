"""G, J and the tilted loss of a policy, on one labelled sample at one reward."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrlhf.base import importance
from jaxrlhf.base.problem import BilevelProblem, Labelled, PairCost
from jaxrlhf.base.types import Params


class SampledObjectives(NamedTuple):
    """G and J as functions of the policy: everything else that they depend on, at one phi; lives inside a trace.

    Attributes:
        problem: its four functions and the KL price.
        beta: weight of the lower level's KL.
        max_importance_weight: bound of the importance weights, or None.
        labelled: the sample and its labels.
        frozen: what no gradient touches.
        reward: `[B, M, 2, T]`, the reward model's outputs at the present phi.
        cost: the costs `[B, M]` of the pairs there.
    """

    problem: BilevelProblem
    beta: float | jax.Array
    max_importance_weight: float | None
    labelled: Labelled
    frozen: Params
    reward: jax.Array
    cost: PairCost

    def log_prob(self, lower: Params) -> jax.Array:
        """Returns the policy's log-probabilities `[B, M, 2, T]`: the policy's forward pass."""
        return self.problem.log_prob(lower, self.labelled.sample, self.frozen)

    def log_weights(self, log_prob: jax.Array) -> jax.Array:
        """Returns the cumulative log density ratios to the behaviour policy, `[B, M, 2, T]`."""
        return importance.step_log_weights(log_prob, self.labelled.sample, largest=self.max_importance_weight)

    def values(self, log_prob: jax.Array) -> importance.Values:
        """Returns G, J and the KL of the policy behind `log_prob`, differentiable in it."""
        return importance.evaluate(
            log_prob,
            self.reward,
            self.cost,
            self.labelled.sample,
            beta=self.beta,
            kl_price=self.problem.kl_price,
            largest=self.max_importance_weight,
        )

    def tempering_slopes(self, log_prob: jax.Array) -> importance.Slopes:
        """Returns how the coupled cost and the KL of the policy behind `log_prob` change along its way."""
        return importance.tempering_slopes(
            log_prob, self.cost, self.labelled.sample, largest=self.max_importance_weight
        )

    def tilted_loss(self, lower: Params, tilt: jax.Array) -> jax.Array:
        """Returns h(phi, lower; tilt) = tilt G - J, `[]`."""
        return importance.tilted_loss(self.values(self.log_prob(lower)), tilt)


def output_cotangent(
    objectives: SampledObjectives,
    upper: Params,
    pair_weights: jax.Array,
    reward_weights: jax.Array | float = 0.0,
    uncoupled_weight: jax.Array | float = 1.0,
) -> tuple[jax.Array, Params]:
    """Returns the gradient of a rule's weighted objective at the reward model's outputs, and what bypasses them.

        sum_bm measure (pair_weights coupled + uncoupled_weight uncoupled + sum_kt reward_weights discount reward)

    The hypergradient is the first pulled back through the reward model, plus the second, which is nonzero only if `cost`
    reads `upper` directly. k is the response's slot in its pair.

    Args:
        objectives: of the sample that is weighted.
        upper: the reward parameters.
        pair_weights: `[B, M]`, of the coupled cost.
        reward_weights: `[B, M, 2, T]`, of the discounted reward.
        uncoupled_weight: `[]`, of the uncoupled cost.
    """
    sample = objectives.labelled.sample

    def weighted_cost(reward: jax.Array, upper: Params) -> jax.Array:
        cost = objectives.problem.cost(upper, reward, objectives.labelled, objectives.frozen)
        return importance.expectation(pair_weights * cost.coupled + uncoupled_weight * cost.uncoupled, sample)

    cotangent, direct = jax.grad(weighted_cost, argnums=(0, 1))(objectives.reward, upper)
    return cotangent + sample.measure[:, :, None, None] * sample.cumulative_discount * reward_weights, direct


def policy_weights(log_weights: jax.Array) -> jax.Array:
    """Returns the pair weights `[B, M]` of the policy at tilt 0, from log-weights `[S, B, M, 2, T]`.

    They give the fixed-policy gradient, without the coupling.
    """
    return jnp.exp(importance.pair_log_weights(log_weights[0]))
