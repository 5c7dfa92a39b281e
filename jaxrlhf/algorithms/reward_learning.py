"""Reward learning on labelled pairs: the upper objective with every policy held fixed.

Offline and iterated RLHF do this, and so does the first stage of most pipelines. `update` descends

    E_labelled[coupled + uncoupled cost]        for `objectives.likelihood` Bradley-Terry maximum likelihood

on the labelled pairs it is given; `fit` draws them from a `PreferenceBuffer`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxrlhf.base import importance
from jaxrlhf.base.algorithm import owned
from jaxrlhf.base.problem import BilevelProblem, Labelled
from jaxrlhf.base.types import Key, Params
from jaxrlhf.preferences import buffer as preference_buffer
from jaxrlhf.preferences.buffer import PreferenceBuffer


class RewardState(NamedTuple):
    """Updates taken `[]`, reward parameters, and their optimiser's state."""

    step: jax.Array
    upper: Params
    optimizer: Any


class RewardInfo(NamedTuple):
    """The cost of the pairs before the update, and the norm of its gradient, both `[]`."""

    loss: jax.Array
    gradient_norm: jax.Array


class RewardAlgorithm(NamedTuple):
    """Pure functions.

    Attributes:
        init: `(upper) -> RewardState`. Copies.
        update: `(state, labelled, frozen) -> (RewardState, RewardInfo)`.
    """

    init: Callable[[Params], RewardState]
    update: Callable[[RewardState, Labelled, Params], tuple[RewardState, RewardInfo]]


def reward_learning(problem: BilevelProblem, optimizer: optax.GradientTransformation) -> RewardAlgorithm:
    """Returns the algorithm that fits the reward of a problem; of the problem only `reward` and `cost` are used."""

    def init(upper):
        upper = owned(upper)
        return RewardState(jnp.zeros((), jnp.int32), upper, optimizer.init(upper))

    def update(state, labelled, frozen):
        def loss(upper):
            cost = problem.cost(upper, problem.reward(upper, labelled.sample, frozen), labelled, frozen)
            return importance.expectation(cost.coupled + cost.uncoupled, labelled.sample)

        value, gradient = jax.value_and_grad(loss)(state.upper)
        move, optimizer_state = optimizer.update(gradient, state.optimizer, state.upper)
        upper = optax.apply_updates(state.upper, move)
        return RewardState(state.step + 1, upper, optimizer_state), RewardInfo(value, optax.tree.norm(gradient))

    return RewardAlgorithm(init, update)


def fit(
    key: Key,
    algorithm: RewardAlgorithm,
    state: RewardState,
    buffer: PreferenceBuffer,
    frozen: Params,
    *,
    size: int,
    steps: int,
) -> tuple[RewardState, RewardInfo]:
    """Takes `steps` updates on `size` pairs each, drawn from the buffer; the info's leaves are `[steps]`.

    Consumes the key.
    """

    def update(state, key):
        return algorithm.update(state, preference_buffer.draw(key, buffer, size=size), frozen)

    return jax.lax.scan(update, state, jax.random.split(key, steps))
