"""What a hypergradient rule is, what it reads, and what it returns."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax

from jaxrlhf.base import importance
from jaxrlhf.base.problem import Sample
from jaxrlhf.base.types import Params
from jaxrlhf.bilevel.sampling import Sampling
from jaxrlhf.bilevel.schedules import Balanced, SigmaSchedule
from jaxrlhf.bilevel.stencil import Stencil

ProblemKind = Literal["policies", "losses"]
"""A `BilevelProblem` with samples, or a problem given as two losses."""


class RuleInputs(NamedTuple):
    """What a rule reads of a labelled sample that all iterates share.

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
    beta: float | jax.Array
    kl_price: float | jax.Array


class PolicyFunctions(NamedTuple):
    """The policy at tilt 0 as something to differentiate, for rules that do (`implicit`).

    Attributes:
        lower: its parameters.
        values: `lower -> importance.Values` on the sample, differentiable twice.
        log_weights: `lower -> [B, M, 2, T]`, differentiable.
    """

    lower: Params
    values: Callable[[Params], importance.Values]
    log_weights: Callable[[Params], jax.Array]


class Weights(NamedTuple):
    """What a rule returns.

    Attributes:
        coupled: `[B, M]`, multiplies the coupled cost.
        reward: `[B, M, 2, T]`, multiplies the discounted reward.
    """

    coupled: jax.Array
    reward: jax.Array


class Losses(NamedTuple):
    """The two levels of a problem without samples, on one batch.

    Attributes:
        upper_loss: `(upper, lower) -> []`, G.
        lower_loss: `(upper, lower) -> []`, -J.
        data: the batch.
        frozen: what no gradient touches.
    """

    upper_loss: Callable[[Params, Params], jax.Array]
    lower_loss: Callable[[Params, Params], jax.Array]
    data: Any
    frozen: Params


def no_weights(inputs: RuleInputs) -> Weights:
    """The `weights` of a rule for two losses only."""
    raise ValueError("This rule is for problems given as two losses; use a stencil, boltzmann or implicit here.")


def no_surrogate(losses: Losses, lowers: Params, sigma: jax.Array) -> Callable[[Params], jax.Array]:
    """The `surrogate` of a rule for policies only."""
    raise ValueError("A problem given as two losses has no policy for this rule; use a stencil rule.")


class HypergradientRule(NamedTuple):
    """An estimator of grad Phi, first-order but for `implicit`.

    Attributes:
        name: what it is called in messages.
        stencil: the points that lower iterates are kept at, in units of sigma.
        relative_sigma: schedule of sigma / beta, or `Balanced`, which follows the measured inner error.
        weights: `RuleInputs -> Weights`, for policies; `(RuleInputs, PolicyFunctions) -> Weights` where
            `differentiates_policy`.
        surrogate: `(Losses, lowers, sigma) -> (upper -> [])`, for two losses: a function whose gradient is the
            hypergradient.
        applies_to: the kinds of problem that it can estimate.
        sampling: who draws the pairs, see `jaxrlhf.bilevel.sampling`.
        differentiates_policy: whether `weights` needs derivatives of the policy.
    """

    name: str
    stencil: Stencil
    relative_sigma: SigmaSchedule | Balanced
    weights: Callable[..., Weights] = no_weights
    surrogate: Callable[[Losses, Params, jax.Array], Callable[[Params], jax.Array]] = no_surrogate
    applies_to: tuple[ProblemKind, ...] = ("policies", "losses")
    sampling: Sampling = "shared"
    differentiates_policy: bool = False


def centred(reward_weights: jax.Array, sample: Sample) -> jax.Array:
    """Returns reward weights `[B, M, 2, T]` as averages over the policy's responses, less their prompt's mean."""
    return importance.policy_slot_weights(sample) * (
        reward_weights - importance.others_mean_responses(reward_weights, sample)
    )
