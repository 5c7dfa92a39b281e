"""Ensembles of rewards: several members fitted to the same labels; the policy is trained on their mean.

The members are one pytree whose leaves lead with the member, `[E, ...]`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxrlhf.algorithms.reward_learning import RewardAlgorithm, RewardInfo, RewardState, fit
from jaxrlhf.base.problem import Labelled, Sample
from jaxrlhf.base.types import Key, Params
from jaxrlhf.preferences.buffer import PreferenceBuffer

SampleReward = Callable[[Params, Sample, Params], jax.Array]
"""`(upper, sample, frozen) -> [B, M, 2, T]`, as in `BilevelProblem.reward`."""


def of_samples(reward: Callable[[Params, jax.Array, jax.Array], jax.Array]) -> SampleReward:
    """Returns a reward `(upper, observations [..., O], actions) -> [...]` as one of samples of `trajectories.Segments`."""

    def sample_reward(upper: Params, sample: Sample, frozen: Params) -> jax.Array:
        del frozen
        return reward(upper, sample.responses.observations, sample.responses.actions)

    return sample_reward


def mean_of(reward: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Returns the mean reward of an ensemble: `(members, *rest) -> [...]` from one member's `(member, *rest) -> [...]`."""

    def mean_reward(members: Params, *rest: Any) -> jax.Array:
        return jnp.mean(jax.vmap(lambda member: reward(member, *rest))(members), axis=0)

    return mean_reward


def first_members(key: Key, first: Callable[[Key], Params], count: int) -> Params:
    """Returns `count` members, each with parameters of its own from `first(key)`. Consumes the key.

    Raises:
        ValueError: there is no member.
    """
    if count < 1:
        raise ValueError(f"An ensemble has at least 1 member, got {count}.")
    return jax.vmap(first)(jax.random.split(key, count))


def segment_returns(reward: SampleReward, upper: Params, sample: Sample) -> jax.Array:
    """Returns a reward summed over both segments of each pair, `[B, M, 2]`."""
    return jnp.sum(sample.responses.window * reward(upper, sample, ()), axis=-1)


def win_probabilities(reward: SampleReward, members: Params, sample: Sample) -> jax.Array:
    """Returns each member's Bradley-Terry probability that segment 0 is preferred, `[E, B, M]`."""
    returns = jax.vmap(lambda member: segment_returns(reward, member, sample))(members)
    return jax.nn.sigmoid(returns[..., 0] - returns[..., 1])


def fit_members(
    key: Key,
    algorithm: RewardAlgorithm,
    members: RewardState,
    buffer: PreferenceBuffer,
    frozen: Params = (),
    *,
    size: int,
    steps: int,
) -> tuple[RewardState, RewardInfo]:
    """Fits every member by `reward_learning.fit` to draws of its own from the buffer; all leaves lead with the member.

    Consumes the key.
    """
    keys = jax.random.split(key, len(jax.tree.leaves(members.upper)[0]))
    return jax.vmap(lambda key, member: fit(key, algorithm, member, buffer, frozen, size=size, steps=steps))(
        keys, members
    )


def agreement(reward: SampleReward, members: Params, labelled: Labelled) -> jax.Array:
    """Returns the fraction of the labels that each member predicts, `[E]`; ties and skipped pairs left out, 1 if none."""
    returns = jax.vmap(lambda member: segment_returns(reward, member, labelled.sample))(members)
    prefers = (returns[..., 0] > returns[..., 1]).astype(labelled.labels.dtype)[..., None]
    decided = ((labelled.labels == 0) | (labelled.labels == 1)).astype(prefers.dtype)[None]
    right = jnp.sum(decided * (prefers == labelled.labels[None]), axis=(1, 2, 3))
    count = jnp.sum(decided)
    return jnp.where(count > 0, right / jnp.maximum(count, 1.0), 1.0)


def fit_until(
    key: Key,
    fit: RewardAlgorithm,
    members: RewardState,
    reward: SampleReward,
    buffer: PreferenceBuffer,
    *,
    size: int,
    steps: int,
    epochs: int,
    enough: float,
) -> tuple[RewardState, jax.Array, jax.Array]:
    """Fits the members until each predicts more than `enough` of the buffer's labels, for at most so many epochs.

    Consumes the key.

    Returns:
        The members, the smallest of their accuracies, and the epochs taken.
    """

    def measured(members: RewardState) -> jax.Array:
        return jnp.min(agreement(reward, members.upper, buffer.pairs))

    def unfinished(carry: tuple) -> jax.Array:
        _, accuracy, epoch = carry
        return (epoch < epochs) & (accuracy <= enough)

    def one_epoch(carry: tuple) -> tuple:
        members, _, epoch = carry
        members, _ = fit_members(jax.random.fold_in(key, epoch), fit, members, buffer, size=size, steps=steps)
        return members, measured(members), epoch + 1

    return jax.lax.while_loop(unfinished, one_epoch, (members, measured(members), jnp.zeros((), jnp.int32)))
