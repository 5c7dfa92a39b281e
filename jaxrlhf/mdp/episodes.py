"""Episodes of a finite Markov decision process with a horizon short enough to enumerate every trajectory.

Shape legend of this package: `S` states, `A` actions, `K` states that may follow a state and an action, `B` prompts
(start states), `T` steps (the horizon), `M` pairs per prompt, `F` features.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrlhf.base.problem import Sample
from jaxrlhf.base.types import Key


class Episodes(NamedTuple):
    """The `frozen` argument of an episode problem.

    Attributes:
        starts: `[B]` int, the start state of each prompt; prompts have equal weight.
        successors: `[S, A, K]` int, the states that may follow; distinct for each state and action.
        transition: `[S, A, K]`, their probabilities; they sum to 1 over K.
        discount: `[T]`, gamma^t, positive. Its length is the horizon.
        features: `[S, A, F]`, the features of a step, which the learner's reward is a function of.
        gold: `[S, A]`, the annotator's hidden reward of a step.
        reference: `[S, A]`, log-probabilities of the reference policy in nats.
    """

    starts: jax.Array
    successors: jax.Array
    transition: jax.Array
    discount: jax.Array
    features: jax.Array
    gold: jax.Array
    reference: jax.Array


class Trajectories(NamedTuple):
    """The `responses` of a sample. The state after the last action is left out: no reward depends on it.

    Attributes:
        states: `[B, M, 2, T]` int.
        actions: `[B, M, 2, T]` int.
    """

    states: jax.Array
    actions: jax.Array


def random_episodes(
    key: Key,
    *,
    prompts: int = 2,
    states: int = 3,
    actions: int = 2,
    horizon: int = 3,
    successors: int = 2,
    features: int = 4,
    gamma: float = 0.9,
) -> Episodes:
    """Returns a random instance with `actions (actions successors)^(horizon - 1)` trajectories per prompt.

    Features, gold rewards and the logits of the reference and of the transitions are standard normal. Consumes the key.

    Raises:
        ValueError: more successors than states, a horizon below 1, or gamma outside (0, 1].
    """
    if successors > states:
        raise ValueError(f"successors must not exceed states, got {successors} of {states}: they are different states.")
    if horizon < 1:
        raise ValueError(f"horizon must be at least 1, got {horizon}.")
    if not 0 < gamma <= 1:
        raise ValueError(f"gamma must lie in (0, 1], got {gamma:g}: a step of weight 0 has no best policy.")
    next_key, transition_key, feature_key, gold_key, reference_key = jax.random.split(key, 5)
    shuffled = jnp.broadcast_to(jnp.arange(states), (states, actions, states))
    return Episodes(
        starts=jnp.arange(prompts) % states,
        successors=jax.random.permutation(next_key, shuffled, axis=-1, independent=True)[..., :successors],
        transition=jax.nn.softmax(jax.random.normal(transition_key, (states, actions, successors))),
        discount=gamma ** jnp.arange(horizon, dtype=float),
        features=jax.random.normal(feature_key, (states, actions, features)),
        gold=jax.random.normal(gold_key, (states, actions)),
        reference=jax.nn.log_softmax(jax.random.normal(reference_key, (states, actions))),
    )


def at_steps(table: jax.Array, trajectories: Trajectories) -> jax.Array:
    """Returns the table `[S, A]` at each step of each trajectory, `[B, M, 2, T]`."""
    return table[trajectories.states, trajectories.actions]


def gold_score(sample: Sample, frozen: Episodes) -> jax.Array:
    """The annotator's hidden score: the discounted gold return of both trajectories, `[B, M, 2]`."""
    return jnp.sum(sample.cumulative_discount * gold_steps(sample, frozen), axis=-1)


def gold_steps(sample: Sample, frozen: Episodes) -> jax.Array:
    """The hidden reward of each step, undiscounted, `[B, M, 2, T]`; `preferences.myopic` turns it into a score."""
    return at_steps(frozen.gold, sample.responses)
