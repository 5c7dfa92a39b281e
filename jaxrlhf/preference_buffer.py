"""Labels cost more than compute: a buffer that keeps every labelled pair, as a pytree that lives on the device.

A pair is a row, that is a sample of one prompt with one pair (`B` rows, `M = 1`), so that pairs of different prompts and
steps stand beside one another:

    buffer = empty(rows(sample), labels=1, capacity=1000)
    buffer = add(buffer, Labelled(asked, annotate(key, asked, frozen)))      # asked = take(rows(sample), indices)
    labelled = draw(key, buffer, size=64)                                    # for `reward_learning`
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrlhf.bilevel.problem import SKIPPED, Labelled, Sample
from jaxrlhf.types import Key


class PreferenceBuffer(NamedTuple):
    """A ring: the oldest pairs go first.

    Attributes:
        pairs: rows, `B` the capacity; those never filled are zeros, their labels `SKIPPED`.
        added: `[]` int32, pairs ever added.
    """

    pairs: Labelled
    added: jax.Array


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
        discount=flat(sample.discount),
        measure=flat(sample.measure),
        by_policy=sample.by_policy,
        draws=jnp.ones_like(sample.draws),
    )


def take(sample: Sample, indices: jax.Array) -> Sample:
    """Returns some of a sample's rows, `indices` `[N]`, with equal measures."""
    kept = _by_row(lambda leaf: leaf[indices], sample)
    return kept._replace(measure=jnp.full_like(kept.measure, 1.0 / len(indices)))


def empty(sample: Sample, *, labels: int, capacity: int) -> PreferenceBuffer:
    """Returns a buffer for rows like those of `sample`, with `labels` labels a pair.

    Raises:
        ValueError: the sample is not rows, or there is no room for a label or a pair.
    """
    if sample.measure.ndim != 2 or sample.measure.shape[1] != 1:
        raise ValueError(f"A buffer holds rows, of one pair each; got {sample.measure.shape} pairs. Use rows(sample).")
    if labels < 1 or capacity < 1:
        raise ValueError(f"A buffer needs room for 1 label and 1 pair at least, got {labels} and {capacity}.")
    nothing = _by_row(lambda leaf: jnp.zeros((capacity, *leaf.shape[1:]), leaf.dtype), sample)
    return PreferenceBuffer(
        Labelled(nothing, jnp.full((capacity, 1, labels), SKIPPED, sample.measure.dtype)), jnp.zeros((), jnp.int32)
    )


def add(buffer: PreferenceBuffer, labelled: Labelled) -> PreferenceBuffer:
    """Returns the buffer with rows added; they take the places of the oldest where it is full.

    Raises:
        ValueError: at trace time, where there are more rows than the buffer holds.
    """
    capacity, count = len(buffer.pairs.labels), len(labelled.labels)
    if count > capacity:
        raise ValueError(f"{count} pairs do not fit into a buffer of {capacity}.")
    places = (buffer.added + jnp.arange(count)) % capacity

    def put(old, new):
        return old.at[places].set(new)

    sample = _by_row(put, buffer.pairs.sample, labelled.sample)
    return PreferenceBuffer(Labelled(sample, put(buffer.pairs.labels, labelled.labels)), buffer.added + count)


def draw(key: Key, buffer: PreferenceBuffer, *, size: int) -> Labelled:
    """Returns `size` pairs drawn uniformly with replacement, while the buffer is empty pairs that cost nothing.

    Consumes the key.
    """
    filled = jnp.clip(buffer.added, 1, len(buffer.pairs.labels))
    indices = jax.random.randint(key, (size,), 0, filled)
    return Labelled(take(buffer.pairs.sample, indices), buffer.pairs.labels[indices])


def _by_row(function: Callable, *samples: Sample) -> Sample:
    """Applies a function to the leaves that lead with rows; the others are the last sample's."""
    last = samples[-1]
    mapped = jax.tree.map(function, *(sample._replace(by_policy=None, draws=None) for sample in samples))
    return mapped._replace(by_policy=last.by_policy, draws=last.draws)
