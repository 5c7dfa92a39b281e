"""Hypergradient rules: how the upper level feels the policy's answer to it.

Every first-order estimator of grad Phi is a reweighting. A rule returns one weight per pair for the cost and one per
step for the reward, and the hypergradient is a single backward pass through the reward model of

    sum_bm measure (coupled * coupled_cost + uncoupled * uncoupled_cost + sum_kt reward_weight * discount * reward).

With w_i the density ratio of the lower iterate at tilt s_i to the behaviour policy:

| rule | weight of the coupled cost | weight of the reward |
|---|---|---|
| stencil | sum_i c_i s_i w_i(y0) w_i(y1) | - sum_i c_i w_i |
| boltzmann | w_0(y0) w_0(y1) | (1 / beta) (centred dG/dpi) |
| decoupled | w_0(y0) w_0(y1) | 0 |

Reward weights are centred over the responses to the same prompt (leave one out): their expectation is 0, so this
changes no expectation, and a reward that is constant over a prompt's responses gets no gradient.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrlhf.bilevel import importance
from jaxrlhf.bilevel.problem import Sample
from jaxrlhf.bilevel.schedules import SigmaSchedule, as_schedule
from jaxrlhf.bilevel.stencil import CENTRAL, FIVE_POINT, FORWARD, Stencil


class Evidence(NamedTuple):
    """What a rule sees.

    Attributes:
        sample: the pairs.
        log_weights: `[S, B, M, 2, T]`, cumulative log density ratios of the S lower iterates, tilt 0 first.
        log_ratio: `[B, M, 2, T]`, log(policy / reference) of tilt 0, step by step.
        coupled_cost: `[B, M]` at the present reward.
        sigma: `[]`, the perturbation, relative_sigma * beta.
        beta: weight of the lower level's KL.
        kl_price: weight of the upper level's KL.
    """

    sample: Sample
    log_weights: jax.Array
    log_ratio: jax.Array
    coupled_cost: jax.Array
    sigma: jax.Array
    beta: float
    kl_price: float


class Weights(NamedTuple):
    """What a rule returns.

    Attributes:
        coupled: `[B, M]`, multiplies the coupled cost.
        reward: `[B, M, 2, T]`, multiplies the discounted reward.
    """

    coupled: jax.Array
    reward: jax.Array


class HypergradientRule(NamedTuple):
    """A way to estimate grad Phi.

    Attributes:
        stencil: the tilts that lower iterates are kept at, in units of sigma.
        relative_sigma: schedule of sigma / beta.
        weights: `Evidence -> Weights`.
    """

    stencil: Stencil
    relative_sigma: SigmaSchedule
    weights: Callable[[Evidence], Weights]


def stencil(points: Stencil, relative_sigma: float | SigmaSchedule) -> HypergradientRule:
    """Returns the penalty gradient over a stencil, `sum_i c_i grad_phi [s_i G - J](phi, lambda_i)`.

    For `FORWARD` it is grad G(lambda_sigma) + [grad J(lambda_0) - grad J(lambda_sigma)] / sigma of arXiv 2410.15610.
    Its error is O(sigma^order). Differences of weights are taken through expm1 of log-ratio differences, which stays
    exact where the weights themselves agree to the last digit. Departure from the paper: all tilts share one sample.

    Args:
        points: the stencil.
        relative_sigma: sigma / beta, or a schedule of it; positive. It is a Taylor step in the tilt, so its useful
            range does not depend on beta: the error is about 0.1 relative_sigma forward, 0.03 relative_sigma^2 central.

    Raises:
        ValueError: relative_sigma is not positive.
    """
    offsets, coefficients = jnp.asarray(points.offsets), jnp.asarray(points.coefficients)

    def weights(evidence: Evidence) -> Weights:
        log_weights, sample = evidence.log_weights, evidence.sample
        pair_weights = jnp.exp(importance.pair_log_weights(log_weights))
        # c_i s_i = coefficient_i offset_i: sigma cancels.
        coupled = jnp.tensordot((coefficients * offsets).astype(pair_weights.dtype), pair_weights, axes=1)
        # The coefficients sum to 0, so sum_i c_i w_i = w_0 sum_i c_i (w_i / w_0 - 1).
        excess = jnp.expm1(log_weights - log_weights[:1])
        scale = (coefficients.astype(excess.dtype)) / evidence.sigma
        reward = -jnp.exp(log_weights[0]) * jnp.tensordot(scale, excess, axes=1)
        centred = reward - importance.others_mean_responses(reward, sample)
        return Weights(coupled, importance.policy_share(sample) * centred)

    return HypergradientRule(points, as_schedule(relative_sigma), weights)


def forward(relative_sigma: float | SigmaSchedule = 0.05) -> HypergradientRule:
    """Returns the paper's rule: two policies, error O(sigma). See `stencil`."""
    return stencil(FORWARD, relative_sigma)


def central(relative_sigma: float | SigmaSchedule = 0.2) -> HypergradientRule:
    """Returns the default rule: three policies, error O(sigma^2). See `stencil`."""
    return stencil(CENTRAL, relative_sigma)


def five_point(relative_sigma: float | SigmaSchedule = 0.4) -> HypergradientRule:
    """Returns the fourth-order rule: five policies, error O(sigma^4). See `stencil`."""
    return stencil(FIVE_POINT, relative_sigma)


def boltzmann() -> HypergradientRule:
    """Returns the rule for a lower level solved by pi proportional to reference * exp(R / beta).

    Then d pi(y) / d phi = pi(y) (grad R(y) - E grad R) / beta and

        grad Phi = E[grad_phi cost] + (1 / beta) Cov_pi(dG/dpi, grad_phi R).

    A pair contributes its cost to dG/dpi at each of its policy responses, which is right for costs that are not
    symmetric too (an annotator that favours a position); a KL price contributes kappa log(pi / reference). Exact at
    the optimal policy, biased in proportion to the inner error otherwise. No second policy and no sigma. On a Markov
    decision process with per-step weights the same formula holds with the return from a step onwards in place of the
    cost; this rule is the one-step form and refuses T > 1.

    Raises:
        ValueError: at trace time, when responses have more than one step, or when prompts have a single drawn pair
            (nothing to centre the cost against).
    """
    points = Stencil((0.0,), (0.0,), order=0)

    def weights(evidence: Evidence) -> Weights:
        sample, cost = evidence.sample, evidence.coupled_cost
        if evidence.log_weights.shape[-1] != 1:
            raise ValueError("boltzmann needs one-step responses (T = 1); use a stencil on longer trajectories.")
        if cost.shape[1] < 2:
            raise ValueError("boltzmann needs at least 2 pairs a prompt, to compare a pair's cost with its prompt's.")
        joint = jnp.exp(importance.pair_log_weights(evidence.log_weights[0]))
        single = jnp.exp(evidence.log_weights[0])
        through_cost = joint * (cost - importance.others_mean(joint * cost, sample))
        log_ratio = evidence.log_ratio
        through_price = single * (log_ratio - importance.others_mean_responses(single * log_ratio, sample))
        reward = (
            sample.by_policy[None, None, :, None] * through_cost[:, :, None, None]
            + evidence.kl_price * importance.policy_share(sample) * through_price
        )
        return Weights(joint, reward / evidence.beta)

    return HypergradientRule(points, as_schedule(1.0), weights)


def decoupled() -> HypergradientRule:
    """Returns the rule of iterated RLHF: grad_phi G with the policy held fixed, the coupling ignored."""
    points = Stencil((0.0,), (0.0,), order=0)

    def weights(evidence: Evidence) -> Weights:
        coupled = jnp.exp(importance.pair_log_weights(evidence.log_weights[0]))
        return Weights(coupled, jnp.zeros_like(evidence.log_weights[0]))

    return HypergradientRule(points, as_schedule(1.0), weights)
