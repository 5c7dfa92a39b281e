"""The tree of histories: every situation in which the policy may have to choose an action.

A node is a history s_0, a_0, s_1, ..., s_t. Nodes are numbered as in a heap: the root (the start state) is 0, and
action a followed by the k-th successor leads from node n to `A K n + 1 + K a + k`. A prompt has
`N = sum_{t<T} (A K)^t` nodes and `P = A (A K)^(T - 1)` trajectories; trajectory p ends with action `p mod A` at the
`p // A`-th of the deepest nodes. Trees of different prompts have the same shape and differ in their states.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrlhf.mdp.episodes import Episodes, Trajectories

MAX_TRAJECTORIES = 1024
"""Limit per prompt: every pair of trajectories is listed, and a million pairs still fit comfortably in memory."""


class Tree(NamedTuple):
    """All histories of the prompts.

    Attributes:
        levels: slices of the nodes, one per step.
        steps: `[N]` static, the step of each node.
        nodes: `[P, T]` static, the nodes along each trajectory.
        actions: `[P, T]` static, the actions along each trajectory.
        states: `[B, N]`, the state at each node.
        environment: `[B, P]`, log-probability in nats of the transitions of each trajectory.
    """

    levels: tuple[slice, ...]
    steps: np.ndarray
    nodes: np.ndarray
    actions: np.ndarray
    states: jax.Array
    environment: jax.Array

    def along(self, table: jax.Array) -> jax.Array:
        """Returns a table over nodes and actions, `[B, N, A]`, at the steps of every trajectory: `[B, P, T]`."""
        return table[:, self.nodes, self.actions]

    def log_prob(self, log_policy: jax.Array) -> jax.Array:
        """Returns the log-probability of every trajectory, transitions included: `[B, P]` from `[B, N, A]`."""
        return self.environment + jnp.sum(self.along(log_policy), axis=-1)

    def returns(self, reward: jax.Array, discount: jax.Array) -> jax.Array:
        """Returns the discounted return of every trajectory: `[B, P]` from a reward `[S, A]` and `discount` `[T]`."""
        return self.along(reward[self.states]) @ discount

    def trajectories(self) -> Trajectories:
        """Returns every trajectory: states and actions `[B, P, T]`."""
        states = self.states[:, self.nodes]
        return Trajectories(states, jnp.broadcast_to(self.actions, states.shape))


def history_tree(frozen: Episodes) -> Tree:
    """Returns the tree of all histories.

    Raises:
        ValueError: at trace time, when a prompt has more than `MAX_TRAJECTORIES` trajectories.
    """
    horizon, batch = len(frozen.discount), len(frozen.starts)
    actions, branches = frozen.successors.shape[1:]
    fan = actions * branches
    count = actions * fan ** (horizon - 1)
    if count > MAX_TRAJECTORIES:
        raise ValueError(
            f"{horizon} steps of {actions} actions and {branches} successors make {count} trajectories a prompt, more "
            f"than the {MAX_TRAJECTORIES} that can be listed in pairs; draw pairs, or shorten the horizon."
        )
    states, environment = [frozen.starts[:, None]], jnp.zeros((batch, 1), frozen.transition.dtype)
    for _ in range(horizon - 1):
        log_transition = jnp.log(frozen.transition)[states[-1]]
        environment = (environment[:, :, None, None] + log_transition).reshape(batch, -1)
        states.append(frozen.successors[states[-1]].reshape(batch, -1))

    sizes = [fan**step for step in range(horizon)]
    edges = np.concatenate([[0], np.cumsum(sizes)])
    path_nodes, path_actions = _paths(horizon, actions, branches)
    return Tree(
        levels=tuple(slice(int(edges[step]), int(edges[step + 1])) for step in range(horizon)),
        steps=np.repeat(np.arange(horizon), sizes),
        nodes=path_nodes,
        actions=path_actions,
        states=jnp.concatenate(states, axis=1),
        environment=jnp.repeat(environment, actions, axis=1),
    )


def _paths(horizon: int, actions: int, branches: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the nodes and the actions along every trajectory, `[P, T]` each."""
    fan = actions * branches
    count = actions * fan ** (horizon - 1)
    leaf, last = np.divmod(np.arange(count), actions)
    # The digits of the leaf's position, in base A K, are the choices that led to it.
    choices = leaf[:, None] // fan ** np.arange(horizon - 2, -1, -1) % fan
    nodes = np.zeros((count, horizon), int)
    for step in range(horizon - 1):
        nodes[:, step + 1] = fan * nodes[:, step] + 1 + choices[:, step]
    return nodes, np.concatenate([choices // branches, last[:, None]], axis=1)


def nodes_of(trajectories: Trajectories, frozen: Episodes) -> jax.Array:
    """Returns the node at each step of given trajectories: `[..., T]` from states and actions `[..., T]`.

    For horizons too long to enumerate the numbers overflow and are meaningless; policies of state and step ignore them.
    """
    states, actions = trajectories
    num_actions, branches = frozen.successors.shape[1:]
    successors = frozen.successors[states[..., :-1], actions[..., :-1]]
    branch = jnp.argmax(successors == states[..., 1:, None], axis=-1)
    steps = np.arange(states.shape[-1])
    # The heap's recursion unrolled: node_t = sum_{u < t} (A K)^(t - 1 - u) (1 + choice_u).
    levels = steps[None, :] - 1 - steps[:-1, None]
    powers = np.where(levels < 0, 0, (num_actions * branches) ** np.maximum(levels, 0))
    choices = actions[..., :-1] * branches + branch
    return (1 + choices) @ jnp.asarray(powers.astype(choices.dtype))
