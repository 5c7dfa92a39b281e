"""Four-Rooms incentive design, the benchmark of "Contextual Bilevel Reinforcement Learning" (arXiv 2406.01575).

An agent (the follower) crosses four rooms to a goal, for a reward of 1. A leader who wants it to pass a target cell may
charge it for each cell that it visits. The leader's parameters are weights w, one for each free cell and a spare one:

    charge(cell) = 0.2 softmax(w)[cell]           so all charges together are at most 0.2
    follower's reward: 1 on the goal, -charge(cell) elsewhere; plus weighted entropy; the goal ends the episode
    leader's reward: 1 on the target cell; minus regulariser * sum of all charges on the goal

The goal is one of two, drawn uniformly and known to the follower; both discount by 0.99. Actions succeed with probability
0.56 and slip to each of the other three with 0.44 / 3; a move into a wall stays in place (the published transition
matrix).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrlhf.base.types import Params
from jaxrlhf.mdp.tabular import TabularMDP

GRID = (
    "xxxxxxxxxxxxx",
    "x     x     x",
    "x     x     x",
    "x           x",
    "x     x     x",
    "x     x     x",
    "xx xxxx     x",
    "x     xxx xxx",
    "x     x     x",
    "x     x     x",
    "x           x",
    "x     x     x",
    "xxxxxxxxxxxxx",
)
"""Rows from top to bottom, `x` a wall."""

MOVES = ((-1, 0), (0, 1), (1, 0), (0, -1))
"""Up, right, down, left, as (row, column)."""

CELLS = tuple((row, column) for row, line in enumerate(GRID) for column, kind in enumerate(line) if kind != "x")
"""The free cells, which are the states, in reading order."""

START = (4, 1)
GOALS = ((1, 9), (11, 11))
TARGET = (8, 4)
SLIP = 0.44
DISCOUNT = 0.99
MAX_TOTAL_CHARGE = 0.2


class FourRooms(NamedTuple):
    """The `frozen` argument: one context per goal.

    Attributes:
        mdp: leaves `[C, ...]`.
        goal: `[C, S]`, 1 on the goal.
        target: `[C, S]`, 1 on the cell that the leader wants the follower to pass.
    """

    mdp: TabularMDP
    goal: jax.Array
    target: jax.Array


class Coefficients(NamedTuple):
    """The `data` argument of a step: coefficients that may change from step to step, one context per goal.

    Attributes:
        weight: `[C]`, probability of each goal; one-hot where a single goal is drawn.
        entropy_weight: `[C]`, weight of the follower's entropy, in units of its reward; the same for every goal.
        regulariser: `[C]`, the leader's cost per unit of charges; the same for every goal.
    """

    weight: jax.Array
    entropy_weight: jax.Array
    regulariser: jax.Array


def four_rooms() -> FourRooms:
    """Returns the environment: 104 states, 4 actions, 2 contexts."""
    index = {cell: state for state, cell in enumerate(CELLS)}
    transition = np.zeros((len(CELLS), len(MOVES), len(CELLS)))
    for state, (row, column) in enumerate(CELLS):
        for slipped, (down, right) in enumerate(MOVES):
            next_state = index.get((row + down, column + right), state)
            for action in range(len(MOVES)):
                transition[state, action, next_state] += 1 - SLIP if action == slipped else SLIP / (len(MOVES) - 1)
    goal = np.array([[cell == goal for cell in CELLS] for goal in GOALS], float)
    start = np.array([cell == START for cell in CELLS], float)
    contexts = len(GOALS)
    return FourRooms(
        mdp=TabularMDP(
            transition=jnp.asarray(np.stack([transition] * contexts)),
            start=jnp.asarray(np.stack([start] * contexts)),
            terminal=jnp.asarray(goal),
            discount=jnp.full(contexts, DISCOUNT),
        ),
        goal=jnp.asarray(goal),
        target=jnp.asarray([[cell == TARGET for cell in CELLS]] * contexts, float),
    )


def coefficients(entropy_weight: float | jax.Array, regulariser: float | jax.Array) -> Coefficients:
    """Returns the coefficients of a cell of the published table, the same for both goals."""
    contexts = len(GOALS)
    return Coefficients(
        jnp.full(contexts, 1.0 / contexts), jnp.full(contexts, entropy_weight), jnp.full(contexts, regulariser)
    )


def charges(upper: jax.Array) -> jax.Array:
    """Returns the charge of each free cell, `[S]`, non-negative, in total at most `MAX_TOTAL_CHARGE`."""
    return MAX_TOTAL_CHARGE * jax.nn.softmax(upper)[:-1]


def follower_reward(upper: jax.Array, data: Coefficients, frozen: FourRooms) -> jax.Array:
    """Returns `[S, A]`, for one goal: 1 on the goal, minus the charge elsewhere."""
    del data
    return _for_all_actions(frozen.goal - (1.0 - frozen.goal) * charges(upper))


def leader_reward(upper: jax.Array, data: Coefficients, frozen: FourRooms) -> jax.Array:
    """Returns `[S, A]`, for one goal: 1 on the target, minus `regulariser * sum of all charges` on the goal."""
    return _for_all_actions(frozen.target - data.regulariser * jnp.sum(charges(upper)) * frozen.goal)


def draw_incentives(key: jax.Array, *, scale: float | jax.Array = 1.0) -> Params:
    """Returns normal weights `[S + 1]`, the published initialisation. Consumes the key."""
    return scale * jax.random.normal(key, (len(CELLS) + 1,))


def on_grid(table: np.ndarray) -> np.ndarray:
    """Returns a table `[S]` as a picture `[13, 13]`, NaN on walls."""
    picture = np.full((len(GRID), len(GRID[0])), np.nan)
    for value, cell in zip(np.asarray(table), CELLS, strict=True):
        picture[cell] = value
    return picture


def _for_all_actions(table: jax.Array) -> jax.Array:
    return jnp.broadcast_to(table[:, None], (len(CELLS), len(MOVES)))
