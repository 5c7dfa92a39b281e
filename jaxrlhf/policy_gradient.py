"""Policy gradient on the label itself: the honest baseline beside the utility objective, with no reward model.

It minimises the coupled upper objective over the policy directly,

    min_lambda  E_{pi_lambda}[cost(y0, y1, labels)] + kappa KL(pi_lambda || reference),

by the importance-weighted score function with leave-one-out baselines (REINFORCE leave-one-out, arXiv 2402.14740), that is
what the bilevel method does without the detour through a reward. A reward model generalises from labels to responses that
nobody judged; whether that pays is what the comparison measures.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxrlhf.bilevel import importance
from jaxrlhf.bilevel.problem import BilevelProblem, Labelled, Sample
from jaxrlhf.types import Batch, Key, Params


class PolicyState(NamedTuple):
    """Outer steps taken `[]`, the policy, and its optimiser's state."""

    step: jax.Array
    policy: Params
    optimizer: Any


class PolicyInfo(NamedTuple):
    """Diagnostics of one step, all scalars.

    Attributes:
        loss: the coupled upper objective, KL price included, on the step's sample.
        gradient_norm: of the policy's gradient, before the last inner step.
        kl: KL(policy || reference) in nats.
        labels: labels consumed; an enumerated expectation consumes none.
    """

    loss: jax.Array
    gradient_norm: jax.Array
    kl: jax.Array
    labels: jax.Array


class PolicyAlgorithm(NamedTuple):
    """Pure functions, as `BilevelAlgorithm`'s, without a reward.

    Attributes:
        init: `(policy) -> PolicyState`. Copies.
        step: `(key, state, data, frozen) -> (PolicyState, PolicyInfo)`.
        propose: `(key, state, data, frozen) -> Sample`.
        update: `(state, labelled, frozen) -> (PolicyState, PolicyInfo)`.
    """

    init: Callable[[Params], PolicyState]
    step: Callable[[Key, PolicyState, Batch, Params], tuple[PolicyState, PolicyInfo]]
    propose: Callable[[Key, PolicyState, Batch, Params], Sample]
    update: Callable[[PolicyState, Labelled, Params], tuple[PolicyState, PolicyInfo]]


def label_policy_gradient(
    problem: BilevelProblem,
    optimizer: optax.GradientTransformation,
    *,
    annotate: Callable[[Key, Sample, Params], jax.Array] | None = None,
    steps: int = 1,
) -> PolicyAlgorithm:
    """Returns the algorithm that moves the policy by the labels alone.

    Args:
        problem: its objective must be one of labels, `objectives.utility`: a cost that reads the reward sees 0 everywhere.
            `problem.kl_price` is what keeps the policy near the reference.
        optimizer: of the policy.
        annotate: as in `bilevel_descent`.
        steps: gradient steps on each labelled sample, by importance weights.

    Raises:
        ValueError: the KL price is not positive, or steps < 1.
    """
    if not problem.kl_price > 0:
        raise ValueError(
            "Policy gradient on labels needs a KL price, objectives.utility(kl_price=...): nothing else holds it."
        )
    if steps < 1:
        raise ValueError(f"Policy gradient needs at least 1 step a sample, got {steps}.")

    def init(policy):
        policy = jax.tree.map(lambda leaf: jnp.array(leaf, jnp.asarray(leaf).dtype, copy=True), policy)
        return PolicyState(jnp.zeros((), jnp.int32), policy, optimizer.init(policy))

    def propose(key, state, data, frozen):
        return problem.sample(key, state.policy, data, frozen)

    def update(state, labelled, frozen):
        sample = labelled.sample
        nothing = jnp.zeros_like(sample.behaviour_log_prob)
        cost = problem.cost((), nothing, labelled, frozen)

        def loss(policy):
            log_prob = problem.log_prob(policy, sample, frozen)
            values = importance.evaluate(log_prob, nothing, cost, sample, beta=0.0, kl_price=problem.kl_price)
            return values.upper, values

        def one(carry, _):
            policy, optimizer_state = carry
            (_, values), gradient = jax.value_and_grad(loss, has_aux=True)(policy)
            move, optimizer_state = optimizer.update(gradient, optimizer_state, policy)
            return (optax.apply_updates(policy, move), optimizer_state), (values, optax.tree.norm(gradient))

        carry = (state.policy, state.optimizer)
        (policy, optimizer_state), (values, norms) = jax.lax.scan(one, carry, None, length=steps)
        info = PolicyInfo(values.upper[0], norms[-1], values.kl[0], importance.answers(labelled))
        return PolicyState(state.step + 1, policy, optimizer_state), info

    def step(key, state, data, frozen):
        if annotate is None:
            raise ValueError("step needs an annotator: give label_policy_gradient one, or use propose and update.")
        sample_key, label_key = jax.random.split(key)
        sample = propose(sample_key, state, data, frozen)
        return update(state, Labelled(sample, annotate(label_key, sample, frozen)), frozen)

    return PolicyAlgorithm(init, step, propose, update)
