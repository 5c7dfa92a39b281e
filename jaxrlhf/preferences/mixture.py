"""A reward that is a mixture of given scores: R = sum_k w_k s_k(x, y), with the weights w as upper parameters.

The scores are functions of texts that nobody trains: a length, a classifier, another reward model, a check of the
format. Their weights are usually set by hand; here they are learned from labels, and through the coupled objective also by
what they do to the policy. Scores are computed once a response, and travel in the sample: by a traceable function as the
pairs are drawn (`mixture_problem`), or on the host between `propose` and `update` (`attach_scores`).

What a weight is worth is told by `marginal_gains`: with u = win - kappa log(pi / reference) of a response, a policy that
is tilted a little further along the score, pi exp(epsilon s_k), gains

    d/d epsilon  E[win] - kappa KL = Cov_pi(u, s_k)      within each prompt

It vanishes for every score where the mixture is the best of its class, and is positive where a score deserves more weight.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxrlhf.base import importance
from jaxrlhf.base.algorithm import Algorithm
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
        reference_returns=None,  # their scores are not known
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


class MixtureInfo(NamedTuple):
    """Diagnostics of one step of an algorithm that learns a mixture.

    Attributes:
        inner: the algorithm's own.
        weights: `[K]`, before the step, as the lower level sees them.
        gains: `[K]`, `marginal_gains` of the step's pairs.
    """

    inner: Any
    weights: jax.Array
    gains: jax.Array

    @property
    def kl(self) -> jax.Array:
        """KL to the reference in nats, the algorithm's own."""
        return self.inner.kl

    @property
    def labels(self) -> jax.Array:
        """Labels paid for, the algorithm's own."""
        return self.inner.labels

    @property
    def ess_fraction(self) -> jax.Array:
        """Effective sample size as a fraction, the algorithm's own."""
        return self.inner.ess_fraction


def report_mixture(
    algorithm: Algorithm,
    weights_of: Callable[[Any], jax.Array],
    *,
    kl_price: float | jax.Array,
    label_weight: float | jax.Array = 1.0,
) -> Algorithm:
    """Returns the algorithm, whose info is a `MixtureInfo`.

    Args:
        algorithm: updates from samples with scores.
        weights_of: `(state) -> [K]`.
        kl_price, label_weight: of `marginal_gains`.
    """

    def informed(update: Callable) -> Callable:
        def run(key: Key, state: Any, labelled: Labelled, frozen: Params):
            after, info = update(key, state, labelled, frozen)
            gains = marginal_gains(labelled, kl_price=kl_price, label_weight=label_weight)
            return after, MixtureInfo(info, weights_of(state), gains)

        return run

    return algorithm._replace(update=informed(algorithm.update))


def marginal_gains(
    labelled: Labelled, *, kl_price: float | jax.Array, label_weight: float | jax.Array = 1.0
) -> jax.Array:
    """Returns `[K]`: Cov(win - kl_price log(pi / reference), s_k) within prompts, in win rate for a unit of tilt.

    Unbiased for the policy that drew the sample; 0 where a prompt has a single pair. A pair without a label is a tie.

    Args:
        labelled: pairs with scores; the second response of each says against whom the win rate is.
        kl_price: kappa.
        label_weight: pairs over labels, where only some pairs, drawn at random, are labelled: the win of each then counts
            for several.
    """
    sample = labelled.sample
    _without_scores(sample)
    first = jnp.mean(labelled.labels, axis=-1)
    log_ratio = importance.policy_log_ratio(sample.behaviour_log_prob, sample)
    kl = jnp.sum(sample.cumulative_discount * log_ratio, axis=-1)[..., 0]
    win = 0.5 + label_weight * jnp.where(first < 0, 0.0, first - 0.5)
    utility = win - kl_price * kl
    centred = utility - importance.others_mean(utility, sample)
    gains = jax.vmap(lambda score: importance.expectation(centred * score, sample), in_axes=-1)(
        sample.responses.scores[:, :, 0]
    )
    return jnp.where(sample.num_draws > 1, gains, 0.0)


def mixture_optimizer(
    weights: optax.GradientTransformation, network: optax.GradientTransformation
) -> optax.GradientTransformation:
    """Returns an optimiser of `MixtureReward` from one for the weights and one for the network."""
    return optax.multi_transform(
        {"weights": weights, "network": network},
        lambda upper: MixtureReward("weights", jax.tree.map(lambda _: "network", upper.network)),  # pyright: ignore[reportArgumentType]
    )


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
