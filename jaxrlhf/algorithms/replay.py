"""Labels used again: algorithms with a buffer of the pairs that they paid for.

    algorithm = replayed(descent, shapes, capacity=64, size=16, updates=2)        # everything learns from old pairs
    algorithm = refitted(descent, learning, shapes, capacity=1000, size=32)       # the reward alone does

With `replayed`, after the update on a step's fresh pairs, `updates` more are taken on rows drawn from the buffer. Pairs
keep the log-probability that they were sampled at, so importance weights make an old pair stand for the policy of
today; how much of it is left is reported. With `refitted`, before each update the reward is fitted to pairs of the
buffer as they came, as iterated RLHF does, which needs no weights at all and takes labels of any age.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxrlhf.algorithms.policy_gradient import composed
from jaxrlhf.algorithms.reward_learning import RewardAlgorithm, fit
from jaxrlhf.base.problem import Labelled, Sample
from jaxrlhf.base.types import Batch, Key, Params
from jaxrlhf.preferences import buffer as preference_buffer
from jaxrlhf.preferences.buffer import PreferenceBuffer


class ReplayedState(NamedTuple):
    """What is carried.

    Attributes:
        step: outer steps taken, `[]`.
        inner: the algorithm's state.
        fitted: of the reward's own fit, without its parameters, which the algorithm holds; () where there is none.
        buffer: replace it to start from other labels.
    """

    step: jax.Array
    inner: Any
    fitted: Any
    buffer: PreferenceBuffer

    @property
    def policy(self) -> Params:
        """The policy that is deployed."""
        return self.inner.policy

    @property
    def upper(self) -> Params:
        """The reward's parameters, where the algorithm learns one."""
        return self.inner.upper


class ReplayedInfo(NamedTuple):
    """What a step says; scalars.

    Attributes:
        fresh: the algorithm's info of the update on fresh pairs.
        kl: of it.
        labels: labels paid for: those of the fresh pairs, however often they are used.
        age: mean number of outer steps since the buffer's pairs were sampled, their staleness.
        ess_fraction: `replayed`: the smallest among the updates from the buffer, as a share of the rows drawn, 1
            without one; `refitted`: of the update on fresh pairs.
    """

    fresh: Any
    kl: jax.Array
    labels: jax.Array
    age: jax.Array
    ess_fraction: jax.Array


class ReplayedAlgorithm(NamedTuple):
    """As the algorithm that it is made of, with `ReplayedState` and `ReplayedInfo`."""

    init: Callable[[Key, Params, Params], Any]
    step: Callable[[Key, Any, Batch, Params], tuple[Any, ReplayedInfo]]
    propose: Callable[[Key, Any, Batch, Params], Sample]
    update: Callable[[Key, Any, Labelled, Params], tuple[Any, ReplayedInfo]]


def replayed(
    algorithm: Any,
    sample: Sample,
    *,
    capacity: int,
    size: int,
    updates: int = 1,
    labels: int = 1,
    annotate: Callable[[Key, Sample, Params], jax.Array] | None = None,
) -> ReplayedAlgorithm:
    """Returns the algorithm that keeps every labelled pair and learns from some of them again.

    Args:
        algorithm: with `init`, `propose` and `update`.
        sample: what it proposes, or its shapes: `jax.eval_shape(algorithm.propose, key, state, data, frozen)`.
        capacity: prompts kept, the oldest go first.
        size: prompts drawn for an update.
        updates: updates from the buffer, each outer step.
        labels: labels a pair.
        annotate: as in `bilevel_descent`.

    Raises:
        ValueError: a size is not positive, or updates < 0.
    """
    if updates < 0 or size < 1:
        raise ValueError(f"A replay needs updates of at least 0 and a size of at least 1, got {updates} and {size}.")

    def init(key, upper, lower):
        buffer = preference_buffer.empty(sample, labels=labels, capacity=capacity)
        return ReplayedState(jnp.zeros((), jnp.int32), algorithm.init(key, upper, lower), (), buffer)

    def propose(key, state, data, frozen):
        return algorithm.propose(key, state.inner, data, frozen)

    def update(key, state, labelled, frozen):
        fresh_key, *keys = jax.random.split(key, 1 + updates)
        buffer = preference_buffer.add(state.buffer, labelled, step=state.step)
        inner, info = algorithm.update(fresh_key, state.inner, labelled, frozen)

        def again(inner, key):
            draw_key, update_key = jax.random.split(key)
            drawn = preference_buffer.draw(draw_key, buffer, size=size)
            inner, info = algorithm.update(update_key, inner, drawn, frozen)
            return inner, info.ess_fraction

        share = jnp.ones(())
        if updates:
            inner, shares = jax.lax.scan(again, inner, jnp.stack(keys))
            share = jnp.min(shares)
        report = ReplayedInfo(info, info.kl, info.labels, buffer.age(state.step), share)
        return ReplayedState(state.step + 1, inner, (), buffer), report

    return ReplayedAlgorithm(init, composed(propose, update, annotate), propose, update)


def refitted(
    algorithm: Any,
    learning: RewardAlgorithm,
    sample: Sample,
    *,
    capacity: int,
    size: int,
    updates: int = 1,
    labels: int = 1,
    annotate: Callable[[Key, Sample, Params], jax.Array] | None = None,
) -> ReplayedAlgorithm:
    """Returns bilevel descent whose reward is also fitted to every label there is, before each of its updates.

    Args:
        algorithm: a `BilevelAlgorithm`.
        learning: `reward_learning` of the same reward, with an optimiser of its own.
        sample: what the algorithm proposes, or its shapes.
        capacity: prompts kept, the oldest go first.
        size: prompts drawn for an update of the fit.
        updates: of the fit, each outer step.
        labels: labels a pair.
        annotate: as in `bilevel_descent`.

    Raises:
        ValueError: a size is not positive, or updates < 1.
    """
    if updates < 1 or size < 1:
        raise ValueError(f"A fit needs updates and a size of at least 1, got {updates} and {size}.")

    def init(key, upper, lower):
        buffer = preference_buffer.empty(sample, labels=labels, capacity=capacity)
        inner = algorithm.init(key, upper, lower)
        return ReplayedState(jnp.zeros((), jnp.int32), inner, learning.init(upper)._replace(upper=()), buffer)

    def propose(key, state, data, frozen):
        return algorithm.propose(key, state.inner, data, frozen)

    def update(key, state, labelled, frozen):
        fit_key, update_key = jax.random.split(key)
        buffer = preference_buffer.add(state.buffer, labelled, step=state.step)
        # What the algorithm did to the reward since the last fit is kept.
        start = state.fitted._replace(upper=state.inner.upper)
        fitted, _ = fit(fit_key, learning, start, buffer, frozen, size=size, steps=updates)
        inner, info = algorithm.update(update_key, state.inner._replace(upper=fitted.upper), labelled, frozen)
        report = ReplayedInfo(info, info.kl, info.labels, buffer.age(state.step), info.ess_fraction)
        return ReplayedState(state.step + 1, inner, fitted._replace(upper=()), buffer), report

    return ReplayedAlgorithm(init, composed(propose, update, annotate), propose, update)
