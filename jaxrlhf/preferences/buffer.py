"""A replay buffer of labelled pairs, as a pytree on the device: labels cost more than compute.

A row is a prompt with its M pairs and the log-probabilities they were sampled at, so that importance weights can reuse
them. Kept together, the pairs of a prompt remain each other's baselines:

    buffer = empty(sample, labels=1, capacity=1000)
    buffer = add(buffer, labelled, step=state.step)
    labelled = draw(key, buffer, size=16)                  # for `reward_learning.fit`, or any algorithm's `update`

`rows` makes every pair a row of its own, for learners who have only some pairs of a prompt labelled. To begin with
existing labels, add them first (`jaxrlhf.lm.offline.offline_pairs` makes them from texts).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrlhf.base.problem import SKIPPED, Labelled, Sample
from jaxrlhf.base.types import Key


class PreferenceBuffer(NamedTuple):
    """A ring buffer: new rows overwrite the oldest.

    Attributes:
        pairs: `B` is the capacity; empty rows are zeros, their labels `SKIPPED`.
        step: `[capacity]` int32, when a row was added.
        added: `[]` int32, rows ever added.
    """

    pairs: Labelled
    step: jax.Array
    added: jax.Array

    @property
    def filled(self) -> jax.Array:
        """Number of rows that the buffer holds, `[]`."""
        return jnp.minimum(self.added, len(self.step))

    def age(self, step: jax.Array | int) -> jax.Array:
        """Returns the mean age of its rows in steps, `[]`; 0 while it is empty."""
        held = jnp.arange(len(self.step)) < self.filled
        return jnp.sum(jnp.where(held, step - self.step, 0)) / jnp.maximum(self.filled, 1)


def rows(sample: Sample) -> Sample:
    """Returns a sample's pairs as rows: `[B, M, ...]` becomes `[B M, 1, ...]`, each pair beside its prompt."""
    batch, pairs = sample.measure.shape

    def flat(leaf):
        return leaf.reshape(batch * pairs, 1, *leaf.shape[2:])

    return Sample(
        prompts=jax.tree.map(lambda leaf: jnp.repeat(leaf, pairs, axis=0), sample.prompts),
        responses=jax.tree.map(flat, sample.responses),
        behaviour_log_prob=flat(sample.behaviour_log_prob),
        reference_log_prob=flat(sample.reference_log_prob),
        cumulative_discount=flat(sample.cumulative_discount),
        measure=flat(sample.measure),
        from_policy=sample.from_policy,
        num_draws=jnp.ones_like(sample.num_draws),
        reference_responses=jax.tree.map(lambda leaf: jnp.repeat(leaf, pairs, axis=0), sample.reference_responses),
    )


def take(sample: Sample, indices: jax.Array) -> Sample:
    """Returns some of a sample's rows, `indices` `[N]`, with equal measures."""
    kept = _by_row(lambda leaf: leaf[indices], sample)
    return kept._replace(measure=jnp.full_like(kept.measure, 1.0 / kept.measure.size))


def take_pairs(sample: Sample, rows: jax.Array, columns: jax.Array) -> Sample:
    """Returns some of a sample's pairs as rows `[N, 1, ...]` with equal measures, by their places `[N]`, `[N]`."""

    def pair(leaf):
        return leaf[rows, columns][:, None]

    return Sample(
        prompts=jax.tree.map(lambda leaf: leaf[rows], sample.prompts),
        responses=jax.tree.map(pair, sample.responses),
        behaviour_log_prob=pair(sample.behaviour_log_prob),
        reference_log_prob=pair(sample.reference_log_prob),
        cumulative_discount=pair(sample.cumulative_discount),
        measure=jnp.full((len(rows), 1), 1.0 / len(rows), sample.measure.dtype),
        from_policy=sample.from_policy,
        num_draws=jnp.ones_like(sample.num_draws),
        reference_responses=jax.tree.map(lambda leaf: leaf[rows], sample.reference_responses),
    )


def empty(sample: Sample, *, labels: int, capacity: int) -> PreferenceBuffer:
    """Returns a buffer for rows like those of `sample` (arrays, or their shapes), with `labels` labels a pair.

    Raises:
        ValueError: there is no room for a label or a row.
    """
    if labels < 1 or capacity < 1:
        raise ValueError(f"A buffer needs room for 1 label and 1 row at least, got {labels} and {capacity}.")
    zeros = _by_row(lambda leaf: jnp.zeros((capacity, *leaf.shape[1:]), leaf.dtype), sample)
    # What is common to all rows is set by the first that are added.
    zeros = zeros._replace(
        from_policy=jnp.zeros(sample.from_policy.shape, sample.from_policy.dtype),
        num_draws=jnp.zeros(sample.num_draws.shape, sample.num_draws.dtype),
    )
    unlabelled = jnp.full((capacity, sample.measure.shape[1], labels), SKIPPED, sample.measure.dtype)
    return PreferenceBuffer(Labelled(zeros, unlabelled), jnp.zeros(capacity, jnp.int32), jnp.zeros((), jnp.int32))


def add(buffer: PreferenceBuffer, labelled: Labelled, *, step: jax.Array | int = 0) -> PreferenceBuffer:
    """Returns the buffer with rows added; where it is full they overwrite the oldest.

    Args:
        buffer: the buffer.
        labelled: rows; all additions have the same number of draws a prompt and the same policy slots.
        step: when they were labelled, for `age`.

    Raises:
        ValueError: at trace time, where there are more rows than the buffer holds.
    """
    capacity, count = len(buffer.step), len(labelled.labels)
    if count > capacity:
        raise ValueError(f"{count} rows do not fit into a buffer of {capacity}.")
    places = (buffer.added + jnp.arange(count)) % capacity

    def put(old, new):
        return old.at[places].set(new)

    sample = _by_row(put, buffer.pairs.sample, labelled.sample)
    pairs = Labelled(sample, put(buffer.pairs.labels, labelled.labels))
    when = jnp.full(count, step, buffer.step.dtype)
    return PreferenceBuffer(pairs, put(buffer.step, when), buffer.added + count)


def draw(key: Key, buffer: PreferenceBuffer, *, size: int) -> Labelled:
    """Returns `size` rows drawn uniformly with replacement; from an empty buffer, rows that cost nothing.

    Consumes the key.
    """
    indices = jax.random.randint(key, (size,), 0, jnp.maximum(buffer.filled, 1))
    return Labelled(take(buffer.pairs.sample, indices), buffer.pairs.labels[indices])


def _by_row(function: Callable, *samples: Sample) -> Sample:
    """Applies a function to the leaves with a row axis; the others are taken from the last sample."""
    last = samples[-1]
    mapped = jax.tree.map(function, *(sample._replace(from_policy=None, num_draws=None) for sample in samples))
    return mapped._replace(from_policy=last.from_policy, num_draws=last.num_draws)
