"""The tasks of `control.py`: environments whose true reward the learner never sees."""

from collections.abc import Callable
from typing import NamedTuple

import gymnax
import jax
import jax.numpy as jnp
import numpy as np
from networks import forward, network

from jaxrlhf.mdp import four_rooms as rooms
from jaxrlhf.mdp.environments import (
    Actor,
    Environment,
    categorical_actor,
    gaussian_actor,
    gymnax_environment,
    tabular_environment,
)


class Task(NamedTuple):
    """An environment, its networks and its settings.

    Attributes:
        environment: with the true reward.
        actor: the policy network.
        reference: the policy that the KL is measured to: uniform, or the standard normal.
        reward: `(parameters, observations, actions) -> [...]`, the reward network.
        value: `(parameters, observations) -> [...]`, the critic.
        units: factors that observations are multiplied by before the networks.
        first: `key -> (reward, policy, critic)`, initial parameters.
        steps: maximum length of an episode.
        gamma: discount of the policy's and the annotator's return.
        segment: length of the compared segments in steps; None compares whole episodes, for tasks where it matters when an
            episode ends.
        scale: factor on the true reward for the annotator and the oracle: 1 / temperature.
        beta: weight of the KL, in those units.
        outer_steps: of a run.
    """

    environment: Environment
    actor: Actor
    reference: Actor
    reward: Callable
    value: Callable
    units: jax.Array
    first: Callable
    steps: int
    gamma: float
    segment: int | None
    scale: float
    beta: float
    outer_steps: int


WIDTH = 32


def networks(environment: Environment, units: jax.Array) -> dict:
    """Returns the fields of a task that depend on its networks; observations are multiplied by `units`."""
    num_actions = environment.actions

    def reward(parameters, observations, actions):
        encoded = jnp.clip(actions, -2.0, 2.0) if environment.continuous else jax.nn.one_hot(actions, num_actions)
        return forward(parameters, jnp.concatenate([observations * units, encoded], axis=-1))[..., 0]

    def zeros(observations):
        return jnp.zeros((*observations.shape[:-1], num_actions))

    if environment.continuous:

        def mean_and_log_std(lower, observations):
            mean = forward(lower[0], observations * units)
            return mean, jnp.broadcast_to(lower[1], mean.shape)

        actor = gaussian_actor(mean_and_log_std)
        reference = gaussian_actor(lambda frozen, observations: (zeros(observations), zeros(observations)))
    else:
        actor = categorical_actor(lambda lower, observations: forward(lower, observations * units))
        reference = categorical_actor(lambda frozen, observations: zeros(observations))

    def first(key):
        reward_key, policy_key, critic_key = jax.random.split(key, 3)
        size = environment.observation_size
        policy = network(policy_key, size, WIDTH, num_actions)
        return (
            network(reward_key, size + num_actions, WIDTH, 1),
            (policy, jnp.zeros(num_actions)) if environment.continuous else policy,
            network(critic_key, size, WIDTH, 1),
        )

    return {
        "environment": environment,
        "actor": actor,
        "reference": reference,
        "reward": reward,
        "value": lambda critic, observations: forward(critic, observations * units)[..., 0],
        "units": units,
        "first": first,
    }


def gymnax_task(name: str, *, units: tuple[float, ...] | float = 1.0, **settings) -> Task:
    """Returns a task of gymnax; `settings` are the remaining fields of `Task`."""
    return Task(**networks(gymnax_environment(*gymnax.make(name)), jnp.asarray(units)), **settings)


def hidden_four_rooms() -> Task:
    """Returns the walk to a hidden cell: a step pays exp(-distance / 3), less 0.5 in the upper right room.

    Distances are shortest walks; no cell ends the episode.
    """
    world = jax.tree.map(lambda leaf: leaf[1], rooms.four_rooms().mdp)
    world = world._replace(terminal=jnp.zeros_like(world.terminal))
    place = {cell: state for state, cell in enumerate(rooms.CELLS)}
    distance = np.full(len(place), np.inf)
    distance[place[HIDDEN]] = 0.0
    reached: list[tuple[int, int]] = [HIDDEN]
    for row, column in reached:
        for down, right in rooms.MOVES:
            following = row + down, column + right
            if following in place and np.isinf(distance[place[following]]):
                distance[place[following]] = distance[place[row, column]] + 1.0
                reached.append(following)
    upper_right = np.array([row < 7 and column > 6 for row, column in rooms.CELLS], float)
    of_cell = np.exp(-distance / 3.0) - 0.5 * upper_right
    reward = jnp.repeat(jnp.asarray(of_cell)[:, None], len(rooms.MOVES), axis=1)
    environment = tabular_environment(world, reward, name="Four-Rooms")
    return Task(
        **networks(environment, jnp.asarray(1.0)),
        steps=100,
        gamma=0.97,
        segment=25,
        scale=3.0,
        beta=0.1,
        outer_steps=120,
    )


HIDDEN = (11, 11)
TASKS: dict[str, Callable[[], Task]] = {
    "four-rooms": hidden_four_rooms,
    "cartpole": lambda: gymnax_task(
        "CartPole-v1", steps=200, gamma=0.99, segment=None, scale=0.1, beta=0.02, outer_steps=50
    ),
    "pendulum": lambda: gymnax_task(
        "Pendulum-v1", units=(1.0, 1.0, 0.2), steps=200, gamma=0.95, segment=50, scale=0.15, beta=0.05, outer_steps=120
    ),
    "reacher": lambda: gymnax_task(
        "Reacher-misc", steps=100, gamma=0.97, segment=25, scale=3.0, beta=0.03, outer_steps=160
    ),
}
"""Tasks by their name on the command line."""
