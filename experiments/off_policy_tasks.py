"""The tasks of `off_policy.py`: environments whose true reward only the annotator and the oracle see."""

from collections.abc import Callable
from typing import NamedTuple

import gymnax
import jax
import jax.numpy as jnp
from networks import forward, network

from jaxrlhf.control import soft_policies
from jaxrlhf.mdp.environments import Environment, brax_environment, gymnax_environment


class Task(NamedTuple):
    """An environment and what a run on it uses.

    Attributes:
        make: returns the environment.
        units: factors `[O]` that observations are multiplied by, before the networks and in distances.
        episode_steps: time limit, which truncates.
        segment: steps of a compared segment.
        scale: factor on the true reward for the oracle, so that its values are as large as those of a learned reward.
        gamma: discount.
        labels: bought in a run.
    """

    make: Callable[[], Environment]
    units: tuple[float, ...]
    episode_steps: int
    segment: int
    scale: float
    gamma: float
    labels: int


class Parts(NamedTuple):
    """What the algorithms are made of.

    Attributes:
        environment: with the true reward.
        soft: the policy and its critics.
        reward: `(parameters, observations, actions) -> [...]` in [-1, 1], one member of the ensemble.
        first_policy, first_critic, first_reward: `key -> parameters`.
    """

    environment: Environment
    soft: soft_policies.SoftPolicy
    reward: Callable
    first_policy: Callable
    first_critic: Callable
    first_reward: Callable


def _brax(name: str) -> Callable[[], Environment]:
    def make() -> Environment:
        from brax import envs  # pyright: ignore[reportMissingImports]

        return brax_environment(envs.get_environment(name, backend="generalized"), name)

    return make


def _gymnax(name: str) -> Callable[[], Environment]:
    return lambda: gymnax_environment(*gymnax.make(name))


TASKS = {
    "inverted pendulum": Task(_brax("inverted_pendulum"), (1.0, 5.0, 0.5, 0.2), 200, 25, 0.3, 0.98, 200),
    "double pendulum": Task(_brax("inverted_double_pendulum"), (1.0,) * 5 + (0.2,) * 3, 200, 25, 0.03, 0.98, 200),
    "reacher": Task(_brax("reacher"), (1.0,) * 4 + (5.0,) * 2 + (0.1,) * 2 + (5.0,) * 3, 50, 25, 1.0, 0.95, 400),
    "pendulum": Task(_gymnax("Pendulum-v1"), (1.0, 1.0, 0.2), 200, 25, 0.1, 0.95, 200),
    "cartpole": Task(_gymnax("CartPole-v1"), (0.5, 0.5, 5.0, 0.5), 200, 100, 0.3, 0.98, 200),
}
"""Tasks by their name on the command line; the first three are brax's."""


def parts_of(task: Task, *, width: int) -> Parts:
    """Returns the networks of a task, each with two hidden layers of `width` units."""
    environment, units = task.make(), jnp.asarray(task.units)
    observed, actions = environment.observation_size, environment.actions
    if len(task.units) != observed:
        raise ValueError(f"{environment.name}: {len(task.units)} units were given for {observed} observations.")

    def seen(observations: jax.Array) -> jax.Array:
        return units * observations

    def with_actions(observations: jax.Array, chosen: jax.Array) -> jax.Array:
        encoded = chosen if environment.continuous else jax.nn.one_hot(chosen, actions)
        return jnp.concatenate([seen(observations), encoded], axis=-1)

    def value(critic, observations, chosen):
        return forward(critic, with_actions(observations, chosen))[..., 0]

    def head(parameters, observations):
        return forward(parameters, seen(observations))

    def moments(policy, observations):
        return jnp.split(head(policy, observations), 2, axis=-1)

    if environment.continuous:
        soft = soft_policies.continuous(moments, value, environment)
        policy_outputs, critic_sizes = 2 * actions, (observed + actions, width, 1)
    else:
        soft = soft_policies.discrete(head, head, environment, target_entropy=0.15)
        policy_outputs, critic_sizes = actions, (observed, width, actions)
    return Parts(
        environment=environment,
        soft=soft,
        reward=lambda member, observations, chosen: jnp.tanh(value(member, observations, chosen)),
        first_policy=lambda key: network(key, observed, width, policy_outputs),
        first_critic=lambda key: network(key, *critic_sizes),
        first_reward=lambda key: network(key, observed + actions, width, 1),
    )
