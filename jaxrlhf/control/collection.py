"""Experience for off-policy learners: parallel environments that step on from where they stand and begin anew at an end.

Shape legend: `T` steps, `E` parallel environments, `O` size of an observation, `D` dimensions of an action.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxrlhf.base.types import Key
from jaxrlhf.mdp.environments import Environment


class Experience(NamedTuple):
    """Steps taken, `[T, E]`.

    Attributes:
        observations: `[T, E, O]`, before each action.
        actions: `[T, E]` int, or `[T, E, D]`.
        next_observations: `[T, E, O]`, after it, in the same episode; of no use where `known` is 0.
        reward: the environment's own, hidden from learners of preferences.
        terminated: 1 where the episode ended by the task's own rule: nothing follows.
        ended: 1 where it ended in any way, a time limit included.
        known: 0 where the environment itself cut the episode off: what it returns then may be of the next episode.
    """

    observations: jax.Array
    actions: jax.Array
    next_observations: jax.Array
    reward: jax.Array
    terminated: jax.Array
    ended: jax.Array
    known: jax.Array


class Tracks(NamedTuple):
    """Where the parallel environments stand.

    Attributes:
        observation: `[E, O]`.
        state: of each environment, leaves `[E, ...]`.
        clock: `[E]` int32, steps taken in the episode at hand.
        total: `[E]`, its true return so far, undiscounted.
        finished: `[E]`, the true return of the last episode that ended; NaN before the first.
    """

    observation: jax.Array
    state: Any
    clock: jax.Array
    total: jax.Array
    finished: jax.Array


def begin(key: Key, environment: Environment, *, environments: int) -> Tracks:
    """Returns `environments` of them at the beginning of an episode. Consumes the key."""
    observation, state = jax.vmap(environment.reset)(jax.random.split(key, environments))
    # The dtypes of the first step are those of every step.
    observation = jnp.asarray(observation, float)
    zeros = jnp.zeros(environments)
    return Tracks(observation, state, jnp.zeros(environments, jnp.int32), zeros, jnp.full(environments, jnp.nan))


def collect(
    key: Key,
    environment: Environment,
    act: Callable[[Key, jax.Array], jax.Array],
    tracks: Tracks,
    *,
    steps: int,
    episode_steps: int | None = None,
) -> tuple[Experience, Tracks]:
    """Takes `steps` steps in every environment by `lax.scan`; returns them and where the environments stand then.

    Args:
        key: consumed.
        environment: what is stepped.
        act: `(key, observations [E, O]) -> actions`.
        tracks: where the environments stand.
        steps: to take.
        episode_steps: a time limit of the learner's own, which truncates: the next observation is still known. None
            leaves the end to the environment.
    """
    count = tracks.clock.shape[0]

    def advance(tracks: Tracks, key: Key) -> tuple[Tracks, Experience]:
        act_key, step_key, reset_key = jax.random.split(key, 3)
        actions = act(act_key, tracks.observation)
        step_keys, reset_keys = jax.random.split(step_key, count), jax.random.split(reset_key, count)
        observation, state, reward, terminated, *cut_off = jax.vmap(environment.step)(step_keys, tracks.state, actions)
        terminated = terminated.astype(bool)
        cut_off = cut_off[0].astype(bool) & ~terminated if cut_off else jnp.zeros_like(terminated)
        out_of_time = jnp.zeros_like(cut_off) if episode_steps is None else tracks.clock + 1 >= episode_steps
        ended = terminated | cut_off | out_of_time
        total = tracks.total + reward
        first_observation, first_state = jax.vmap(environment.reset)(reset_keys)

        def renew(new: jax.Array, old: jax.Array, like: jax.Array) -> jax.Array:
            where = ended.reshape(ended.shape + (1,) * (jnp.ndim(old) - 1))
            return jnp.where(where, new, old).astype(like.dtype)

        after = Tracks(
            observation=renew(first_observation, observation, tracks.observation),
            state=jax.tree.map(_renew_leaf(renew), first_state, state, tracks.state),
            clock=jnp.where(ended, 0, tracks.clock + 1),
            total=jnp.where(ended, 0.0, total),
            finished=jnp.where(ended, total, tracks.finished),
        )
        numbers = [flag.astype(tracks.total.dtype) for flag in (terminated, ended, ~cut_off)]
        observed = jnp.asarray(observation, tracks.observation.dtype)
        return after, Experience(tracks.observation, actions, observed, reward, *numbers)

    tracks, experience = jax.lax.scan(advance, tracks, jax.random.split(key, steps))
    return experience, tracks


def example_of(tracks: Tracks, actions: jax.Array | jax.ShapeDtypeStruct) -> Experience:
    """Returns one step of experience `[1, E]` with the shapes and dtypes of `collect`'s, zeros otherwise."""
    observed = jnp.zeros_like(tracks.observation)[None]
    number = jnp.zeros_like(tracks.total)[None]
    return Experience(observed, jnp.zeros((1, *actions.shape), actions.dtype), observed, number, number, number, number)


def _renew_leaf(renew: Callable) -> Callable:
    """Returns the function of state leaves; random keys are chosen by their raw data."""

    def leaf(new: jax.Array, old: jax.Array, like: jax.Array) -> jax.Array:
        if not jnp.issubdtype(jnp.asarray(like).dtype, jax.dtypes.prng_key):
            return renew(new, old, like)
        data = renew(*map(jax.random.key_data, (new, old, like)))
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(like))

    return leaf
