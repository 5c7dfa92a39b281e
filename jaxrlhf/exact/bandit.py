"""A contextual bandit that can be solved exactly: C contexts, K arms, any reward function, any policy over the arms.

The smallest instance of a `BilevelProblem`, and the reference that the others are tested against. By default `sample`
lists every pair of arms with its probability, so each step of `bilevel_descent` is exact. With `pairs` it draws pairs;
with `counts` it draws how often each pair occurs, so any number of draws costs no more than the listing (for studies of
sample complexity).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrlhf.base.problem import BilevelProblem, Sample, uniform_measure
from jaxrlhf.base.types import Key, Params
from jaxrlhf.bilevel.solvers import LowerSolver, LowerTask, closed_form
from jaxrlhf.bilevel.stencil import Index
from jaxrlhf.exact.tables import cost_gradient, coupled_costs
from jaxrlhf.preferences import BRADLEY_TERRY, Choice
from jaxrlhf.preferences.objectives import Objective


class Bandit(NamedTuple):
    """The `frozen` argument of a bandit problem.

    Attributes:
        features: `[C, K, F]`, the features of each arm, which the learner's reward is a function of.
        gold: `[C, K]`, the annotator's hidden reward.
        reference: `[C, K]`, log-probabilities of the reference policy.
    """

    features: jax.Array
    gold: jax.Array
    reference: jax.Array


class ArmPairs(NamedTuple):
    """Pairs of arms and their weights: the part of a `Sample` that depends on how pairs are obtained.

    Attributes:
        arms: `[C, M, 2]` int.
        measure: `[C, M]`, non-negative, sums to 1.
        num_draws: `[]`, pairs drawn per context; infinity where all are listed.
    """

    arms: jax.Array
    measure: jax.Array
    num_draws: jax.Array


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
    reference_responses: int = 0,
) -> BilevelProblem:
    """Returns the bandit as a bilevel problem.

    `data` is ignored unless `counts` is set: then it is the number of pairs to draw per context, `[]`, any size, and the
    sample lists all K^2 pairs, each weighted by its fraction of the draws (use `preferences.counted_annotator`).

    Args:
        reward: `(upper, features [C, K, F]) -> [C, K]`.
        objective: the upper objective.
        policy: `(lower, frozen) -> logits [C, K]`.
        against_reference: whether the second response of a pair comes from the reference.
        pairs: pairs drawn per context and step; None lists all K^2.
        counts: whether to draw how often each pair occurs in place of the pairs.
        reference_responses: arms that the reference draws in each context beside the pairs (`preferences.self_play`).

    Raises:
        ValueError: the objective does not suit the pairs (`Objective.check`), or pairs < 1, or counts are asked for
            together with a number of pairs or an objective of several labels.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jaxrlhf import bandit, objectives
        >>> frozen = bandit.Bandit(jnp.ones((4, 8, 3)), jnp.zeros((4, 8)), jnp.full((4, 8), -jnp.log(8.0)))
        >>> problem = bandit.bandit_problem(lambda phi, features: features @ phi, objectives.likelihood(), pairs=5)
        >>> shapes = jax.eval_shape(problem.sample, jax.random.key(0), frozen.reference, None, frozen)
        >>> shapes.responses.shape, shapes.behaviour_log_prob.shape
        ((4, 5, 2), (4, 5, 2, 1))
    """
    objective.check(against_reference=against_reference, exact=pairs is None and not counts)
    if pairs is not None and (pairs < 1 or counts):
        raise ValueError(f"pairs must be at least 1, or None to enumerate or to count, got {pairs}.")
    if counts and objective.labels > 1:
        raise ValueError("Counted pairs carry one mean label; an objective of several labels needs drawn pairs.")

    def sample(key: Key, lower: Params, data, frozen: Bandit) -> Sample:
        log_policy = jax.nn.log_softmax(policy(lower, frozen), axis=-1)
        second = frozen.reference if against_reference else log_policy
        if counts:
            arms, measure, num_draws = _count_pairs(key, log_policy, second, jnp.asarray(data, log_policy.dtype))
        elif pairs is None:
            arms, measure, num_draws = _list_pairs(log_policy, second)
        else:
            arms, measure, num_draws = _draw_pairs(key, log_policy, second, pairs)
        behaviour = jnp.stack([_gather(log_policy, arms[..., 0]), _gather(second, arms[..., 1])], axis=-1)[..., None]
        return Sample(
            prompts=jnp.arange(len(log_policy)),
            responses=arms,
            behaviour_log_prob=behaviour,
            reference_log_prob=at_arms(frozen.reference, arms),
            cumulative_discount=jnp.ones_like(behaviour),
            measure=measure,
            from_policy=jnp.array([1.0, 0.0 if against_reference else 1.0], log_policy.dtype),
            num_draws=num_draws,
            reference_responses=reference_arms(key, frozen),
        )

    def reference_arms(key: Key, frozen: Bandit):
        if not reference_responses:
            return ()
        shape, key = (reference_responses, len(frozen.reference)), jax.random.fold_in(key, 1)
        return jax.random.categorical(key, frozen.reference, axis=-1, shape=shape).T

    def reference_returns(upper, sample, frozen):
        return _gather(reward(upper, frozen.features)[sample.prompts], sample.reference_responses)

    def log_prob(lower, sample, frozen):
        return _at_sample(jax.nn.log_softmax(policy(lower, frozen), axis=-1), sample)

    return BilevelProblem(
        sample=sample,
        log_prob=log_prob,
        reward=lambda upper, sample, frozen: _at_sample(reward(upper, frozen.features), sample),
        cost=objective.cost,
        kl_price=objective.kl_price,
        reference_returns=reference_returns if reference_responses else None,
    )


def at_arms(table: jax.Array, arms: jax.Array) -> jax.Array:
    """Returns the table `[C, K]` at arms `[C, M, 2]`, with a step axis: `[C, M, 2, 1]`."""
    return _gather(table, arms.reshape(arms.shape[0], -1)).reshape(*arms.shape, 1)


def _at_sample(table: jax.Array, sample: Sample) -> jax.Array:
    # Indexed by prompt: a sample from a buffer holds contexts in any order, possibly repeated.
    return at_arms(table[sample.prompts], sample.responses)


def _gather(table: jax.Array, arms: jax.Array) -> jax.Array:
    return jnp.take_along_axis(table, arms, axis=1)


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

    It reads the gold reward: with drawn pairs its tilted policies use information that no label carries, the limit of a
    noiseless inner problem. With `from_labels` the mean cost of an arm is taken over the step's own pairs instead (an arm
    that was not drawn gets the mean of its context), which a learner could compute too; against the reference only.

    The solution satisfies pi proportional to reference * exp((R - s dG/dpi) / (beta + s kappa)), where dG/dpi is the
    mean coupled cost of an arm. Against the reference that is explicit; on policy-policy pairs it is iterated, a
    contraction while |s| times the range of the cost is below beta.

    Raises:
        ValueError: from_labels on policy-policy pairs.
    """
    if from_labels and not against_reference:
        raise ValueError("A best response from labels needs policy-reference pairs; set against_reference=True.")

    def solution(task: LowerTask, index: Index) -> Params:
        frozen: Bandit = task.frozen
        upper = task.upper
        rewards = reward(upper, frozen.features)
        tilt = task.tilts[index].astype(rewards.dtype)

        def tilted_logits(gradient):
            return frozen.reference + (rewards - tilt * gradient) / (beta + tilt * objective.kl_price)

        if from_labels:
            return tilted_logits(_cost_gradient_from_labels(objective, upper, rewards, index, task))
        costs = coupled_costs(objective, rewards, frozen.gold, choice)

        def improve(_, logits):
            log_policy = jax.nn.log_softmax(logits, axis=-1)
            return tilted_logits(
                cost_gradient(costs, log_policy, frozen.reference, against_reference=against_reference)
            )

        untilted = frozen.reference + rewards / beta
        return jax.lax.fori_loop(0, 1 if against_reference else iterations, improve, untilted)

    return closed_form(solution)


def _cost_gradient_from_labels(
    objective: Objective, upper: Params, rewards: jax.Array, index: Index, task: LowerTask
) -> jax.Array:
    """Returns `[C, K]`, the mean coupled cost of the pairs in which the policy chose each arm, less the context's mean."""
    labelled = task.labelled
    if labelled.labels.ndim > 3:  # a sample for each tilt
        labelled = jax.tree.map(lambda leaf: leaf[index], labelled)
    sample = labelled.sample
    cost = objective.cost(upper, at_arms(rewards, sample.responses), labelled, task.frozen).coupled
    mean = jnp.sum(sample.measure * cost, axis=-1, keepdims=True) / jnp.sum(sample.measure, axis=-1, keepdims=True)
    chosen = jax.nn.one_hot(sample.responses[:, :, 0], rewards.shape[-1], dtype=rewards.dtype)
    weight = jnp.einsum("cm,cmk->ck", sample.measure, chosen)
    excess = jnp.einsum("cm,cmk->ck", sample.measure * (cost - mean), chosen)
    return excess / jnp.where(weight > 0, weight, 1.0)


def _all_pairs(contexts: int, arms: int) -> jax.Array:
    """Returns every pair of arms in every context, `[C, K^2, 2]`."""
    first, second = (axis.ravel() for axis in jnp.indices((arms, arms)))
    return jnp.broadcast_to(jnp.stack([first, second], axis=-1), (contexts, arms**2, 2))


def _list_pairs(first: jax.Array, second: jax.Array) -> ArmPairs:
    """Lists all pairs with their probabilities under log-probabilities `[C, K]` of the first and the second response."""
    contexts, arms = first.shape
    measure = jnp.exp(first[:, :, None] + second[:, None, :]).reshape(contexts, -1) / contexts
    return ArmPairs(_all_pairs(contexts, arms), measure, jnp.asarray(jnp.inf, first.dtype))


def _draw_pairs(key: Key, first: jax.Array, second: jax.Array, pairs: int) -> ArmPairs:
    """Draws `pairs` pairs per context. Consumes the key."""
    contexts = len(first)
    arms = [
        jax.random.categorical(key, logits[:, None, :], axis=-1, shape=(contexts, pairs))
        for key, logits in zip(jax.random.split(key), (first, second), strict=True)
    ]
    return ArmPairs(jnp.stack(arms, axis=-1), *uniform_measure(contexts, pairs, dtype=first.dtype))


def _count_pairs(key: Key, first: jax.Array, second: jax.Array, num_draws: jax.Array) -> ArmPairs:
    """Lists all pairs with their fraction of `num_draws` draws per context. Consumes the key."""
    contexts, arms = first.shape
    first_key, second_key = jax.random.split(key)
    first_counts = _multinomial(first_key, jnp.broadcast_to(num_draws, (contexts,)), jnp.exp(first))
    probability = jnp.broadcast_to(jnp.exp(second)[:, None, :], (contexts, arms, arms))
    counts = _multinomial(second_key, first_counts, probability)
    measure = counts.reshape(contexts, -1) / (num_draws * contexts)
    return ArmPairs(_all_pairs(contexts, arms), measure, num_draws)


def _multinomial(key: Key, num_draws: jax.Array, probability: jax.Array) -> jax.Array:
    """Returns counts `[..., K]` that sum to `num_draws` `[...]`, by one conditional binomial draw per arm."""
    tail = jnp.cumsum(probability[..., ::-1], axis=-1)[..., ::-1]
    conditional = jnp.moveaxis(jnp.clip(probability / jnp.maximum(tail, 1e-30), 0.0, 1.0), -1, 0)[:-1]

    def draw_arm(remaining, key_and_probability):
        key, probability = key_and_probability
        count = jax.random.binomial(key, remaining, probability, dtype=tail.dtype)
        return remaining - count, count

    remaining, counts = jax.lax.scan(draw_arm, num_draws, (jax.random.split(key, len(conditional)), conditional))
    return jnp.concatenate([jnp.moveaxis(counts, 0, -1), remaining[..., None]], axis=-1)
