"""A reward that is a mixture of given scores: R = sum_k w_k s_k(x, y), with the weights w as upper parameters.

The scores are functions of texts that nobody trains: a length, a classifier, another reward model, a check of the
format. Their weights are usually set by hand; here they are learned from labels, and through the coupled objective also by
what they do to the policy. Scores are computed once a response, and travel in the sample: by a traceable function as the
pairs are drawn (`mixture_problem`), or on the host between `propose` and `update` (`attach_scores`).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxrlhf.base.problem import BilevelProblem, Labelled, Sample
from jaxrlhf.base.types import Batch, Key, Params


class Scored(NamedTuple):
    """Responses with their scores.

    Attributes:
        responses: as the problem inside has them.
        scores: `[B, M, 2, K]`.
    """

    responses: Any
    scores: jax.Array


class MixtureReward(NamedTuple):
    """Upper parameters of a mixture.

    Attributes:
        weights: `[K]`.
        network: parameters of the learned reward that is added, or `()`.
    """

    weights: jax.Array
    network: Params = ()


def mixture_problem(
    problem: BilevelProblem,
    scores: Callable[[Sample, Params], jax.Array] | None = None,
    *,
    with_network: bool = False,
) -> BilevelProblem:
    """Returns the problem with `MixtureReward` as its upper parameters and `Scored` responses in its samples.

    The score of a response arrives with its last step.

    Args:
        problem: brings sample, log_prob and cost, and with `with_network` the reward that is added to the mixture.
        scores: `(sample, frozen) -> [B, M, 2, K]`, traceable; None where `attach_scores` brings them before `update`
            (`sample` then returns the plain responses).
        with_network: whether the problem's own reward is added to the mixture.
    """

    def sample(key: Key, lower: Params, data: Batch, frozen: Params) -> Sample:
        drawn = problem.sample(key, lower, data, frozen)
        return drawn if scores is None else _with_scores(drawn, scores(drawn, frozen))

    def reward(upper: MixtureReward, sample: Sample, frozen: Params) -> jax.Array:
        plain = _without_scores(sample)
        mixed = jnp.einsum("...k,k->...", sample.responses.scores, upper.weights)
        rewards = mixed[..., None] * _last_step(sample)
        return rewards + problem.reward(upper.network, plain, frozen) if with_network else rewards

    def cost(upper: MixtureReward, reward: jax.Array, labelled: Labelled, frozen: Params):
        plain = labelled._replace(sample=_without_scores(labelled.sample))
        return problem.cost(upper.network, reward, plain, frozen)

    return problem._replace(
        sample=sample,
        log_prob=lambda lower, sample, frozen: problem.log_prob(lower, _without_scores(sample), frozen),
        reward=reward,
        cost=cost,
    )


def without_scores(annotate: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Returns an annotator, or a score of responses, that is shown the responses alone: `(..., sample, frozen)`."""

    def function(*arguments: Any) -> jax.Array:
        *before, sample, frozen = arguments
        return annotate(*before, _without_scores(sample), frozen)

    return function


def attach_scores(labelled: Labelled, scores: jax.Array) -> Labelled:
    """Returns the labelled sample with scores `[B, M, 2, K]` beside its responses."""
    return labelled._replace(sample=_with_scores(labelled.sample, scores))


def _with_scores(sample: Sample, scores: jax.Array) -> Sample:
    return sample._replace(responses=Scored(sample.responses, scores))


def _without_scores(sample: Sample) -> Sample:
    if not isinstance(sample.responses, Scored):
        raise ValueError("The sample carries no scores; attach them with attach_scores before update.")
    return sample._replace(responses=sample.responses.responses)


def _last_step(sample: Sample) -> jax.Array:
    """Returns `[B, M, 2, T]`, 1 / discount at the last step taken and 0 elsewhere, so that returns are the scores."""
    discount = sample.cumulative_discount
    taken = discount > 0
    last = taken & ~jnp.concatenate([taken[..., 1:], jnp.zeros_like(taken[..., :1])], axis=-1)
    return jnp.where(last, 1.0 / jnp.where(taken, discount, 1.0), 0.0)
