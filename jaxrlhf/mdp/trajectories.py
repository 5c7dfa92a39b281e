"""Online RLHF on trajectories of any environment as a `BilevelProblem`: preferences over segments of episodes.

The learner's reward is a function of observation and action. A pair is two episodes, one by the policy and one by the
reference, by an opponent or by the policy again. The annotator and the objective compare the discounted returns of one
segment of each, `sum_{t in segment} gamma^(t - first) r_t`. The policy maximises the discounted return of whole episodes
less beta KL.

In control a good policy soon wins every comparison with a poor reference, and labels carry no more information. An
opponent that is a copy of the policy, refreshed every few steps, keeps them informative.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxrlhf.base.problem import BilevelProblem, Labelled, PairCost, Sample, uniform_measure
from jaxrlhf.base.types import Key, Params
from jaxrlhf.mdp.environments import Actor, Environment, Rollouts, roll_out
from jaxrlhf.preferences.objectives import Objective


class FrozenPolicies(NamedTuple):
    """The `frozen` argument: parameters of the fixed policies.

    Attributes:
        reference: of the reference actor.
        opponent: of the opponent, which is the same actor as the policy; used where pairs are against an opponent.
    """

    reference: Params = ()
    opponent: Params = ()


class Segments(NamedTuple):
    """The `responses` of a sample: `[1, M, 2, T]`, zeros after an episode's end.

    Attributes:
        observations: `[1, M, 2, T, O]`.
        actions: `[1, M, 2, T]` int, or `[1, M, 2, T, D]`.
        gold: the environment's own reward of each step, hidden from the learner.
        window: the weight of each step in the segment's return: gamma^(t - first) within, 0 outside.
    """

    observations: jax.Array
    actions: jax.Array
    gold: jax.Array
    window: jax.Array


def trajectory_problem(
    environment: Environment,
    actor: Actor,
    reward: Callable[[Params, jax.Array, jax.Array], jax.Array],
    objective: Objective,
    *,
    reference: Actor,
    pairs: int,
    steps: int,
    gamma: float,
    segment: int | None = None,
    against: Literal["reference", "opponent", "policy"] = "reference",
) -> BilevelProblem:
    """Returns the problem; its `frozen` is a `FrozenPolicies`, its `data` is ignored.

    Args:
        environment: what episodes are drawn from.
        actor: the policy.
        reward: `(upper, observations [..., O], actions) -> [...]`.
        objective: the upper objective; it compares segment returns.
        reference: the actor of the KL penalty.
        pairs: drawn per step.
        steps: maximum length of an episode.
        gamma: the discount.
        segment: length of the segments compared, each at a random place within its episode; None compares whole episodes.
        against: who gives response 1: the reference, the actor with `FrozenPolicies.opponent`, or the policy again. Only
            the last counts as the policy's own response (`Sample.from_policy`); `behaviour_log_prob` of an opponent's
            response is kept all the same.

    Raises:
        ValueError: the objective does not suit the pairs (`Objective.check`), or a number is out of range.
    """
    objective.check(against_reference=against != "policy", exact=False)
    if pairs < 1 or steps < 1:
        raise ValueError(f"Needs at least 1 pair and 1 step, got {pairs} and {steps}.")
    if not 0 < gamma <= 1:
        raise ValueError(f"gamma must lie in (0, 1], got {gamma:g}.")
    if segment is not None and not 1 <= segment <= steps:
        raise ValueError(f"A segment has 1 to {steps} steps, those of an episode; got {segment}.")
    discounts = gamma ** jnp.arange(steps)

    def sample(key: Key, lower: Params, data, frozen: FrozenPolicies) -> Sample:
        del data
        episode_key, window_key = jax.random.split(key)
        adversaries = {
            "reference": (reference, frozen.reference),
            "opponent": (actor, frozen.opponent),
            "policy": (actor, lower),
        }
        slots = ((actor, lower), adversaries[against])
        episodes = _draw_pairs(episode_key, slots, environment, pairs=pairs, steps=steps)
        discount = episodes.alive * discounts[None, None, None, :]
        window = discount if segment is None else _windows(window_key, episodes.alive, segment, gamma)
        reference_log_prob = reference.log_prob(frozen.reference, episodes.observations, episodes.actions)
        measure, num_draws = uniform_measure(1, pairs, dtype=discount.dtype)
        return Sample(
            prompts=jnp.zeros((1, 0)),
            responses=Segments(episodes.observations, episodes.actions, episodes.reward, window),
            behaviour_log_prob=episodes.log_prob,
            reference_log_prob=reference_log_prob * episodes.alive,
            cumulative_discount=discount,
            measure=measure,
            from_policy=jnp.array([1.0, float(against == "policy")], discount.dtype),
            num_draws=num_draws,
        )

    def log_prob(lower: Params, sample: Sample, frozen: Params) -> jax.Array:
        del frozen
        log_probs = actor.log_prob(lower, sample.responses.observations, sample.responses.actions)
        return jnp.where(sample.cumulative_discount > 0, log_probs, 0.0)

    def step_reward(upper: Params, sample: Sample, frozen: Params) -> jax.Array:
        del frozen
        rewards = reward(upper, sample.responses.observations, sample.responses.actions)
        return jnp.where(sample.cumulative_discount > 0, rewards, 0.0)

    def cost(upper: Params, reward: jax.Array, labelled: Labelled, frozen: Params) -> PairCost:
        del upper, frozen
        return objective.at(jnp.sum(labelled.sample.responses.window * reward, axis=-1), labelled.labels)

    return BilevelProblem(sample, log_prob, step_reward, cost, kl_price=objective.kl_price)


def gold_score(sample: Sample, frozen: Params) -> jax.Array:
    """The annotator's hidden score: the discounted environment return of both segments, `[1, M, 2]`."""
    del frozen
    return jnp.sum(sample.responses.window * sample.responses.gold, axis=-1)


def _draw_pairs(
    key: Key, slots: tuple[tuple[Actor, Params], ...], environment: Environment, *, pairs: int, steps: int
) -> Rollouts:
    """Draws an episode for each pair and slot, leaves `[1, pairs, 2, ...]`. Consumes the key."""
    episodes = [
        roll_out(key, actor, params, environment, episodes=pairs, steps=steps)
        for key, (actor, params) in zip(jax.random.split(key), slots, strict=True)
    ]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves, axis=1)[None], *episodes)


def _windows(key: Key, alive: jax.Array, segment: int, gamma: float) -> jax.Array:
    """Returns the weights of the segments, each starting at a uniform draw from the places where it fits its episode."""
    lengths = jnp.sum(alive, axis=-1, keepdims=True)
    num_places = jnp.maximum(lengths - segment, 0.0) + 1.0
    first = jnp.floor(jax.random.uniform(key, lengths.shape, alive.dtype) * num_places)
    offset = jnp.broadcast_to(jnp.arange(alive.shape[-1], dtype=alive.dtype), alive.shape) - first
    return jnp.where((offset >= 0) & (offset < segment), gamma ** jnp.maximum(offset, 0.0), 0.0) * alive
