"""Replay of experience: a ring of steps on the device, from which batches and segments are drawn.

Rewards are not stored for the learner: whoever draws computes them by the reward of the moment, so that all experience
is relabelled whenever the reward changes (arXiv 2106.05091) at no cost but that of the batch.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrlhf.base.problem import Sample, uniform_measure
from jaxrlhf.base.types import Key
from jaxrlhf.control.collection import Experience
from jaxrlhf.mdp.trajectories import Segments


class Replay(NamedTuple):
    """A ring buffer: new steps overwrite the oldest.

    Attributes:
        steps: leaves `[capacity, E, ...]`.
        added: `[]` int32, steps ever added in each environment.
    """

    steps: Experience
    added: jax.Array

    @property
    def filled(self) -> jax.Array:
        """Number of steps that each environment's ring holds, `[]`."""
        return jnp.minimum(self.added, self.capacity)

    @property
    def capacity(self) -> int:
        """Number of steps that each environment's ring has room for."""
        return self.steps.reward.shape[0]


def empty(example: Experience, *, capacity: int) -> Replay:
    """Returns a ring for experience like the example, arrays or shapes `[T, E, ...]`.

    Args:
        example: for shapes and dtypes.
        capacity: steps per environment.

    Raises:
        ValueError: there is no room for a step.
    """
    if capacity < 1:
        raise ValueError(f"A replay needs room for 1 step at least, got {capacity}.")
    return Replay(
        jax.tree.map(lambda leaf: jnp.zeros((capacity, *leaf.shape[1:]), leaf.dtype), example), jnp.zeros((), jnp.int32)
    )


def add(replay: Replay, experience: Experience) -> Replay:
    """Returns the ring with steps `[T, E]` added, which follow those that were added last.

    Raises:
        ValueError: at trace time, where there are more steps than the ring holds.
    """
    count = experience.reward.shape[0]
    if count > replay.capacity:
        raise ValueError(f"{count} steps do not fit into a replay of {replay.capacity}.")
    places = (replay.added + jnp.arange(count)) % replay.capacity
    steps = jax.tree.map(lambda old, new: old.at[places].set(new.astype(old.dtype)), replay.steps, experience)
    return Replay(steps, replay.added + count)


def draw(key: Key, replay: Replay, *, size: int) -> Experience:
    """Returns `size` steps drawn uniformly with replacement, leaves `[size, ...]`; zeros from an empty ring.

    Consumes the key.
    """
    time_key, track_key = jax.random.split(key)
    times = jax.random.randint(time_key, (size,), 0, jnp.maximum(replay.filled, 1))
    tracks = jax.random.randint(track_key, (size,), 0, replay.steps.reward.shape[1])
    return jax.tree.map(lambda leaf: leaf[times, tracks], replay.steps)


def draw_segments(key: Key, replay: Replay, *, pairs: int, steps: int) -> Sample:
    """Returns pairs of segments of consecutive steps as a sample `[1, pairs, 2, steps]` of `trajectories.Segments`.

    A segment begins at a uniform draw from the steps in the ring that have `steps - 1` others behind them, and stops at
    the end of its episode; steps past that are zeros. Returns of segments are not discounted, as in PEBBLE and B-Pref.
    Whoever acted is not known any more: log-probabilities are 0, and neither slot counts as the policy's.

    Consumes the key.

    Raises:
        ValueError: at trace time, where a segment is longer than the ring or has no step.
    """
    if not 1 <= steps <= replay.capacity:
        raise ValueError(f"A segment has 1 to {replay.capacity} steps, those of the replay; got {steps}.")
    time_key, track_key = jax.random.split(key)
    places = jnp.maximum(replay.filled - steps + 1, 1)
    oldest = replay.added - replay.filled
    first = oldest + jax.random.randint(time_key, (pairs, 2, 1), 0, places)
    times = (first + jnp.arange(steps)[None, None, :]) % replay.capacity
    tracks = jnp.broadcast_to(
        jax.random.randint(track_key, (pairs, 2, 1), 0, replay.steps.reward.shape[1]), times.shape
    )
    segments = jax.tree.map(lambda leaf: leaf[times, tracks][None], replay.steps)
    # A step belongs to the segment unless the episode ended before it.
    ends = jnp.cumsum(segments.ended, axis=-1) - segments.ended
    inside = (ends == 0).astype(segments.reward.dtype)

    def zero_after_end(leaf: jax.Array) -> jax.Array:
        mask = inside.reshape(inside.shape + (1,) * (leaf.ndim - inside.ndim)) > 0
        return jnp.where(mask, leaf, jnp.zeros((), leaf.dtype))

    observations, actions, gold = map(zero_after_end, (segments.observations, segments.actions, segments.reward))
    measure, num_draws = uniform_measure(1, pairs, dtype=inside.dtype)
    return Sample(
        prompts=jnp.zeros((1, 0)),
        responses=Segments(observations, actions, gold, inside),
        behaviour_log_prob=jnp.zeros_like(inside),
        reference_log_prob=jnp.zeros_like(inside),
        cumulative_discount=inside,
        measure=measure,
        from_policy=jnp.zeros(2, inside.dtype),
        num_draws=num_draws,
    )
