"""A contextual bandit that is solved exactly: C contexts, K arms, any reward function, any policy over the arms.

The smallest instance of a `BilevelProblem`, and the oracle of the others: its `sample` lists every pair of arms with its
probability, so each step of `bilevel_descent` is exact. With `pairs` it draws instead; with `counts` it draws any number
of pairs at the cost of listing them, for studies of sample complexity.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrlhf.base.problem import BilevelProblem, Sample, uniform_measure
from jaxrlhf.base.types import Key, Params
from jaxrlhf.bilevel.lower import LowerSolver, LowerTask, closed_form
from jaxrlhf.bilevel.stencil import Index
from jaxrlhf.preferences import BRADLEY_TERRY, Choice, preference
from jaxrlhf.preferences.objectives import Objective


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


def table(lower: Params, frozen: Bandit) -> jax.Array:
    """The tabular policy: its parameters are the logits `[C, K]`."""
    del frozen
    return lower


def bandit_problem(
    reward: Callable[[Params, jax.Array], jax.Array],
    objective: Objective,
    *,
    policy: Callable[[Params, Bandit], jax.Array] = table,
    against_reference: bool = True,
    pairs: int | None = None,
    counts: bool = False,
) -> BilevelProblem:
    """Returns the bandit as a bilevel problem.

    Its `data` is ignored, but with `counts`: there it is the number of pairs to draw a context, `[]`, any size, and the
    sample lists all K^2 pairs with their share of the draws (use `preferences.counted_annotator`).

    Args:
        reward: `(upper, features [C, K, F]) -> [C, K]`.
        objective: the upper objective.
        policy: `(lower, frozen) -> logits [C, K]`.
        against_reference: whether the second response of a pair comes from the reference.
        pairs: pairs drawn a context and step; None enumerates all K^2.
        counts: whether to draw the numbers of each pair in place of the pairs.

    Raises:
        ValueError: the objective does not suit the pairs (`Objective.check`), or pairs < 1, or counts are asked for
            together with a number of pairs or an objective of several labels.
    """
    objective.check(against_reference=against_reference, exact=pairs is None and not counts)
    if pairs is not None and (pairs < 1 or counts):
        raise ValueError(f"pairs must be at least 1, or None to enumerate or to count, got {pairs}.")
    if counts and objective.labels > 1:
        raise ValueError("Counted pairs carry one mean label; an objective of several labels needs drawn pairs.")

    def sample(key: Key, lower: Params, data, frozen: Bandit) -> Sample:
        own = jax.nn.log_softmax(policy(lower, frozen), axis=-1)
        second = frozen.reference if against_reference else own
        contexts, arms = own.shape
        first_arm, second_arm = (axis.ravel() for axis in jnp.indices((arms, arms)))
        listed = jnp.broadcast_to(jnp.stack([first_arm, second_arm], axis=-1), (contexts, arms**2, 2))
        if counts:
            chosen, num_draws = listed, jnp.asarray(data, own.dtype)
            measure = _counts(key, own, second, num_draws).reshape(contexts, -1) / (num_draws * contexts)
        elif pairs is None:
            chosen, num_draws = listed, jnp.asarray(jnp.inf, own.dtype)
            measure = jnp.exp(own[:, first_arm] + second[:, second_arm]) / contexts
        else:
            keys = jax.random.split(key)
            chosen = jnp.stack(
                [_draw(key, logits, pairs) for key, logits in zip(keys, (own, second), strict=True)], axis=-1
            )
            measure, num_draws = uniform_measure(contexts, pairs, dtype=own.dtype)
        from_policy = jnp.array([1.0, 0.0 if against_reference else 1.0], own.dtype)
        behaviour = jnp.stack([_take(own, chosen[..., 0]), _take(second, chosen[..., 1])], axis=-1)
        return Sample(
            prompts=jnp.arange(contexts),
            responses=chosen,
            behaviour_log_prob=behaviour[..., None],
            reference_log_prob=at_arms(frozen.reference, chosen),
            cumulative_discount=jnp.ones_like(behaviour[..., None]),
            measure=measure,
            from_policy=from_policy,
            num_draws=num_draws,
        )

    def log_prob(lower, sample, frozen):
        return _at_sample(jax.nn.log_softmax(policy(lower, frozen), axis=-1), sample)

    return BilevelProblem(
        sample=sample,
        log_prob=log_prob,
        reward=lambda upper, sample, frozen: _at_sample(reward(upper, frozen.features), sample),
        cost=objective.cost,
        kl_price=objective.kl_price,
    )


def at_arms(table: jax.Array, arms: jax.Array) -> jax.Array:
    """Returns the table `[C, K]` at arms `[C, M, 2]`, with a step axis: `[C, M, 2, 1]`."""
    return _take(table, arms.reshape(arms.shape[0], -1)).reshape(*arms.shape, 1)


def _at_sample(table: jax.Array, sample: Sample) -> jax.Array:
    # Row by row: a sample from a buffer holds contexts in any order, some twice.
    return at_arms(table[sample.prompts], sample.responses)


def gold_score(sample: Sample, frozen: Bandit) -> jax.Array:
    """The annotator's hidden score of both responses, `[C, M, 2]`."""
    return _at_sample(frozen.gold, sample)[..., 0]


def best_response(
    reward: Callable[[Params, jax.Array], jax.Array],
    objective: Objective,
    *,
    beta: float,
    against_reference: bool = True,
    choice: Choice = BRADLEY_TERRY,
    from_labels: bool = False,
    iterations: int = 100,
) -> LowerSolver:
    """Returns the exact solver of the tilted problem argmin s G - J, for the tabular policy and labels by `choice`.

    It knows the gold reward: with drawn pairs its tilted policies hold what no label has told, the limit of a noiseless
    inner problem. With `from_labels` the mean cost of an arm is taken over the step's own pairs instead (an arm that was
    not drawn has the mean of its context), and the solver is one that a learner could have; against the reference only.

    Its solution satisfies pi proportional to reference * exp((R - s dG/dpi) / (beta + s kappa)), where dG/dpi is the
    mean coupled cost of an arm. Against the reference that is explicit; on policy-policy pairs it is iterated, a
    contraction while |s| times the range of the cost is below beta.

    Raises:
        ValueError: from_labels on policy-policy pairs.
    """
    if from_labels and not against_reference:
        raise ValueError("A best response from labels needs policy-reference pairs; set against_reference=True.")

    def solution(task: LowerTask, index: Index) -> Params:
        frozen: Bandit = task.frozen
        upper = task.upper_of(index)
        rewards = reward(upper, frozen.features)
        tilt = task.tilt_of(index).astype(rewards.dtype)
        price = beta + tilt * objective.kl_price
        start = frozen.reference + rewards / beta
        if from_labels:
            slope = _mean_costs(objective, upper, reward, index, task)
            return frozen.reference + (rewards - tilt * slope) / price

        def both(table):
            return jnp.stack(jnp.broadcast_arrays(table[:, :, None], table[:, None, :]), axis=-1)

        labels = jnp.repeat(preference(both(frozen.gold), choice)[..., None], objective.labels, axis=-1)
        costs = objective.at(both(rewards), labels).coupled

        def improve(_, logits):
            own = jnp.exp(jax.nn.log_softmax(logits, axis=-1))
            if against_reference:
                slope = jnp.einsum("cij,cj->ci", costs, jnp.exp(frozen.reference))
            else:
                slope = jnp.einsum("cij,cj->ci", costs + costs.swapaxes(1, 2), own)
            return frozen.reference + (rewards - tilt * slope) / price

        return jax.lax.fori_loop(0, 1 if against_reference else iterations, improve, start)

    return closed_form(solution)


def _mean_costs(objective: Objective, upper: Params, reward: Callable, index: Index, task: LowerTask) -> jax.Array:
    """Returns `[C, K]`, the mean coupled cost of the pairs in which the policy chose each arm, less the context's mean."""
    labelled, frozen = task.labelled, task.frozen
    if labelled.labels.ndim > 3:  # a sample for each tilt
        labelled = jax.tree.map(lambda leaf: leaf[index], labelled)
    sample, table = labelled.sample, reward(upper, frozen.features)
    cost = objective.cost(upper, at_arms(table, sample.responses), labelled, frozen).coupled
    mean = jnp.sum(sample.measure * cost, axis=-1, keepdims=True) / jnp.sum(sample.measure, axis=-1, keepdims=True)
    chosen = jax.nn.one_hot(sample.responses[:, :, 0], table.shape[-1], dtype=table.dtype)
    weight = jnp.einsum("cm,cmk->ck", sample.measure, chosen)
    excess = jnp.einsum("cm,cmk->ck", sample.measure * (cost - mean), chosen)
    return excess / jnp.where(weight > 0, weight, 1.0)


def _draw(key: Key, logits: jax.Array, pairs: int) -> jax.Array:
    return jax.random.categorical(key, logits[:, None, :], axis=-1, shape=(logits.shape[0], pairs))


def _counts(key: Key, first: jax.Array, second: jax.Array, num_draws: jax.Array) -> jax.Array:
    """Returns `[C, K, K]`, how often each pair occurs among `draws` pairs a context."""
    first_key, second_key = jax.random.split(key)
    once = _multinomial(first_key, jnp.broadcast_to(num_draws, first.shape[:1]), jnp.exp(first))
    chances = jnp.broadcast_to(jnp.exp(second)[:, None, :], (*once.shape, second.shape[-1]))
    return _multinomial(second_key, once, chances)


def _multinomial(key: Key, num_draws: jax.Array, chances: jax.Array) -> jax.Array:
    """Returns counts `[..., K]` that sum to `draws` `[...]`: each arm takes its share of what the arms before it left."""
    behind = jnp.cumsum(chances[..., ::-1], axis=-1)[..., ::-1]
    shares = jnp.moveaxis(jnp.clip(chances / jnp.maximum(behind, 1e-30), 0.0, 1.0), -1, 0)[:-1]

    def take(left, now):
        key, share = now
        taken = jax.random.binomial(key, left, share, dtype=chances.dtype)
        return left - taken, taken

    left, counts = jax.lax.scan(take, num_draws, (jax.random.split(key, len(shares)), shares))
    return jnp.concatenate([jnp.moveaxis(counts, 0, -1), left[..., None]], axis=-1)


def _take(table: jax.Array, arms: jax.Array) -> jax.Array:
    return jnp.take_along_axis(table, arms, axis=1)
