"""Labels used again: algorithms with a buffer of the labelled pairs they have paid for.

    algorithm = replayed(descent, shapes, capacity=64, size=16, updates=2)        # everything learns from old pairs
    algorithm = refitted(descent, learning, shapes, capacity=1000, size=32)       # only the reward does

With `replayed`, the update on a step's fresh pairs is followed by `updates` more on rows drawn from the buffer. Pairs
keep the log-probability that they were sampled at, so importance weights correct for the policy's changes since; the
effective sample size that remains is reported. With `refitted`, each update is preceded by fitting the reward to pairs
of the buffer, as iterated RLHF does, which needs no importance weights and takes labels of any age.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxrlhf.algorithms.reward_learning import RewardAlgorithm, fit
from jaxrlhf.base.algorithm import Algorithm, Annotator, compose, label_by
from jaxrlhf.base.problem import Sample
from jaxrlhf.base.types import Key, Params
from jaxrlhf.preferences import buffer as preference_buffer
from jaxrlhf.preferences.buffer import PreferenceBuffer


class ReplayedState(NamedTuple):
    """What is carried.

    Attributes:
        step: outer steps taken, `[]`.
        inner: the algorithm's state.
        fitted: state of the reward's own fit, without its parameters, which the algorithm holds; () without one.
        buffer: the labelled pairs; replace it to start from other labels.
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
    """Diagnostics of one step; scalars.

    Attributes:
        fresh: the algorithm's info of the update on fresh pairs.
        kl: of that update.
        labels: labels paid for: those of the fresh pairs, however often they are used.
        age: mean number of outer steps since the buffer's pairs were sampled, their staleness.
        ess_fraction: `replayed`: the smallest among the updates from the buffer, as a fraction of the rows drawn, 1
            without one; `refitted`: of the update on fresh pairs.
    """

    fresh: Any
    kl: jax.Array
    labels: jax.Array
    age: jax.Array
    ess_fraction: jax.Array


def replayed(
    algorithm: Algorithm,
    sample: Sample,
    *,
    capacity: int,
    size: int,
    updates: int = 1,
    labels: int = 1,
    annotate: Annotator | None = None,
) -> Algorithm:
    """Returns the algorithm that keeps every labelled pair and learns from some of them again.

    Its state is `ReplayedState`, its info `ReplayedInfo`.

    Args:
        algorithm: any.
        sample: what it proposes, or its shapes: `jax.eval_shape(algorithm.propose, key, state, data, frozen)`.
        capacity: prompts kept; the oldest are overwritten.
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

    def update(key, state, labelled, frozen):
        fresh_key, *keys = jax.random.split(key, 1 + updates)
        buffer = preference_buffer.add(state.buffer, labelled, step=state.step)
        inner, info = algorithm.update(fresh_key, state.inner, labelled, frozen)

        def again(inner, key):
            return replay(key, algorithm, inner, buffer, frozen, size=size)

        ess_fraction = jnp.ones(())
        if updates:
            inner, ess_fractions = jax.lax.scan(again, inner, jnp.stack(keys))
            ess_fraction = jnp.min(ess_fractions)
        report = ReplayedInfo(info, info.kl, info.labels, buffer.age(state.step), ess_fraction)
        return ReplayedState(state.step + 1, inner, (), buffer), report

    return _wrapped(algorithm, init, update, annotate)


def refitted(
    algorithm: Algorithm,
    learning: RewardAlgorithm,
    sample: Sample,
    *,
    capacity: int,
    size: int,
    updates: int = 1,
    labels: int = 1,
    held_out: bool = False,
    annotate: Annotator | None = None,
) -> Algorithm:
    """Returns bilevel descent whose reward is also fitted to all labels so far, before or after each of its updates.

    Its state is `ReplayedState`, its info `ReplayedInfo`.

    Args:
        algorithm: `bilevel_descent`, or another whose state has an `upper`.
        learning: `reward_learning` of the same reward, with an optimiser of its own.
        sample: what the algorithm proposes, or its shapes.
        capacity: prompts kept; the oldest are overwritten.
        size: prompts drawn for an update of the fit.
        updates: of the fit, each outer step.
        labels: labels a pair.
        held_out: whether the fit comes after the update, whose labels are then ones that the reward has not seen. A reward
            that was fitted to a step's labels explains them too well, and the coupling that is measured on them is too
            strong: a learned scale (`preferences.scale`) then grows without end.
        annotate: as in `bilevel_descent`.

    Raises:
        ValueError: a size is not positive, or updates < 1.
    """
    if updates < 1 or size < 1:
        raise ValueError(f"A fit needs updates and a size of at least 1, got {updates} and {size}.")

    sample = pairs_alone(sample)

    def init(key, upper, lower):
        buffer = preference_buffer.empty(sample, labels=labels, capacity=capacity)
        inner = algorithm.init(key, upper, lower)
        return ReplayedState(jnp.zeros((), jnp.int32), inner, learning.init(upper)._replace(upper=()), buffer)

    def update(key, state, labelled, frozen):
        fit_key, update_key = jax.random.split(key)
        pairs = labelled._replace(sample=pairs_alone(labelled.sample))
        buffer = preference_buffer.add(state.buffer, pairs, step=state.step)

        def refit_with(inner):
            before = state._replace(inner=inner, buffer=buffer)
            return refit(fit_key, learning, before, frozen, size=size, updates=updates)

        if held_out:
            inner, info = algorithm.update(update_key, state.inner, labelled, frozen)
            after = refit_with(inner)
        else:
            fitted = refit_with(state.inner)
            inner, info = algorithm.update(update_key, fitted.inner, labelled, frozen)
            after = fitted._replace(inner=inner)
        report = ReplayedInfo(info, info.kl, info.labels, buffer.age(state.step), info.ess_fraction)
        return after._replace(step=state.step + 1), report

    return _wrapped(algorithm, init, update, annotate)


def pairs_alone(sample: Sample) -> Sample:
    """Returns the sample without its responses of the reference, which a fit to labels does not read."""
    return sample._replace(reference_responses=())


def replay(
    key: Key, algorithm: Algorithm, inner: Any, buffer: PreferenceBuffer, frozen: Params, *, size: int
) -> tuple[Any, jax.Array]:
    """Returns the inner algorithm's state after one update on `size` prompts of the buffer, and the `ess_fraction`."""
    draw_key, update_key = jax.random.split(key)
    old = preference_buffer.draw(draw_key, buffer, size=size)
    inner, info = algorithm.update(update_key, inner, old, frozen)
    return inner, info.ess_fraction


def refit(
    key: Key, learning: RewardAlgorithm, state: ReplayedState, frozen: Params, *, size: int, updates: int
) -> ReplayedState:
    """Returns a state of `refitted` after updates of its reward on the buffer alone, from the reward as it is."""
    start = state.fitted._replace(upper=state.upper)
    fitted, _ = fit(key, learning, start, state.buffer, frozen, size=size, steps=updates)
    return state._replace(inner=state.inner._replace(upper=fitted.upper), fitted=fitted._replace(upper=()))


def _wrapped(algorithm: Algorithm, init, update, annotate: Annotator | None) -> Algorithm:
    """The algorithm that proposes as the one inside it does."""

    def propose(key, state, data, frozen):
        return algorithm.propose(key, state.inner, data, frozen)

    return Algorithm(init, compose(propose, label_by(annotate), update), propose, update)
