"""A contextual bandit that is solved exactly: C contexts, K arms, any reward function, softmax policy.

The smallest instance of a `BilevelProblem`, and the oracle of the others: its `sample` lists every pair of arms with its
probability, so each step of `bilevel_descent` is exact. With `pairs` it draws instead.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrlhf.bilevel.lower import LowerSolver, LowerTask, closed_form
from jaxrlhf.bilevel.problem import BilevelProblem, Sample, drawn
from jaxrlhf.objectives import Objective
from jaxrlhf.types import Key, Params


class Bandit(NamedTuple):
    """The `frozen` argument of a bandit problem.

    Attributes:
        features: `[C, K, F]`, what the learner's reward sees of an arm.
        gold: `[C, K]`, the annotator's hidden reward.
        reference: `[C, K]`, log-probabilities of the reference policy.
    """

    features: jax.Array
    gold: jax.Array
    reference: jax.Array


def bandit_problem(
    reward: Callable[[Params, jax.Array], jax.Array],
    objective: Objective,
    *,
    against_reference: bool = True,
    pairs: int | None = None,
) -> BilevelProblem:
    """Returns the bandit as a bilevel problem. Its policy is a table of logits `[C, K]`, its `data` is ignored.

    Args:
        reward: `(upper, features [C, K, F]) -> [C, K]`.
        objective: the upper objective.
        against_reference: whether the second response of a pair comes from the reference.
        pairs: pairs drawn a context and step; None enumerates all K^2.

    Raises:
        ValueError: the objective needs pairs against the reference and would not get them.
    """
    if objective.against_reference and not against_reference:
        raise ValueError("This objective needs policy-reference pairs; set against_reference=True.")
    if pairs is not None and pairs < 1:
        raise ValueError(f"pairs must be at least 1, or None to enumerate, got {pairs}.")

    def sample(key: Key, lower: Params, data, frozen: Bandit) -> Sample:
        del data
        own = jax.nn.log_softmax(lower, axis=-1)
        second = frozen.reference if against_reference else own
        contexts, arms = own.shape
        if pairs is None:
            first_arm, second_arm = (axis.ravel() for axis in jnp.indices((arms, arms)))
            chosen = jnp.broadcast_to(jnp.stack([first_arm, second_arm], axis=-1), (contexts, arms**2, 2))
            measure = jnp.exp(own[:, first_arm] + second[:, second_arm]) / contexts
            draws = jnp.asarray(jnp.inf, own.dtype)
        else:
            keys = jax.random.split(key)
            chosen = jnp.stack(
                [_draw(key, logits, pairs) for key, logits in zip(keys, (own, second), strict=True)], axis=-1
            )
            measure, draws = drawn(contexts, pairs, dtype=own.dtype)
        by_policy = jnp.array([1.0, 0.0 if against_reference else 1.0], own.dtype)
        behaviour = jnp.stack([_take(own, chosen[..., 0]), _take(second, chosen[..., 1])], axis=-1)
        return Sample(
            prompts=jnp.arange(contexts),
            responses=chosen,
            behaviour_log_prob=behaviour[..., None],
            reference_log_prob=at_arms(frozen.reference, chosen),
            discount=jnp.ones_like(behaviour[..., None]),
            measure=measure,
            by_policy=by_policy,
            draws=draws,
        )

    return BilevelProblem(
        sample=sample,
        log_prob=lambda lower, sample, frozen: at_arms(jax.nn.log_softmax(lower, axis=-1), sample.responses),
        reward=lambda upper, sample, frozen: at_arms(reward(upper, frozen.features), sample.responses),
        cost=objective.cost,
        kl_price=objective.kl_price,
    )


def at_arms(table: jax.Array, arms: jax.Array) -> jax.Array:
    """Returns the table `[C, K]` at arms `[C, M, 2]`, with a step axis: `[C, M, 2, 1]`."""
    return _take(table, arms.reshape(arms.shape[0], -1)).reshape(*arms.shape, 1)


def gold_score(sample: Sample, frozen: Bandit) -> jax.Array:
    """The annotator's hidden score of both responses, `[C, M, 2]`."""
    return at_arms(frozen.gold, sample.responses)[..., 0]


def best_response(
    reward: Callable[[Params, jax.Array], jax.Array],
    objective: Objective,
    *,
    beta: float,
    against_reference: bool = True,
    iterations: int = 100,
) -> LowerSolver:
    """Returns the exact solver of the tilted problem argmin s G - J.

    Its solution satisfies pi proportional to reference * exp((R - s dG/dpi) / (beta + s kappa)), where dG/dpi is the
    mean coupled cost of an arm. Against the reference that is explicit; on policy-policy pairs it is iterated, a
    contraction while |s| times the range of the cost is below beta.
    """

    def solution(task: LowerTask, index: jax.Array) -> Params:
        frozen: Bandit = task.frozen
        tilt, rewards = task.tilt_of(index), reward(task.upper_of(index), frozen.features)
        gold = jax.nn.sigmoid(frozen.gold[:, :, None] - frozen.gold[:, None, :])
        returns = jnp.stack(jnp.broadcast_arrays(rewards[:, :, None], rewards[:, None, :]), axis=-1)
        costs = objective.pair_cost(returns, jnp.repeat(gold[..., None], objective.labels, axis=-1)).coupled

        def improve(_, logits):
            own = jnp.exp(jax.nn.log_softmax(logits, axis=-1))
            if against_reference:
                slope = jnp.einsum("cij,cj->ci", costs, jnp.exp(frozen.reference))
            else:
                slope = jnp.einsum("cij,cj->ci", costs + costs.swapaxes(1, 2), own)
            price = beta + tilt * objective.kl_price
            return frozen.reference + (rewards - tilt * slope) / price

        start = frozen.reference + rewards / beta
        return jax.lax.fori_loop(0, 1 if against_reference else iterations, improve, start)

    return closed_form(solution)


def _draw(key: Key, logits: jax.Array, pairs: int) -> jax.Array:
    return jax.random.categorical(key, logits[:, None, :], axis=-1, shape=(logits.shape[0], pairs))


def _take(table: jax.Array, arms: jax.Array) -> jax.Array:
    return jnp.take_along_axis(table, arms, axis=1)
