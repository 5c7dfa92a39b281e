"""Algorithms that move a policy with no reward model.

`label_policy_gradient` minimises the coupled upper objective over the policy directly,

    min_lambda  E_{pi_lambda}[cost(y0, y1, labels)] + kappa KL(pi_lambda || reference),

by the importance-weighted score function with leave-one-out baselines (REINFORCE leave-one-out, arXiv 2402.14740), that
is what the bilevel method does without the detour through a reward: the honest baseline beside the utility objective. A
reward model generalises from labels to responses that nobody judged; whether that pays is what the comparison measures.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import optax

from jaxrlhf.base import importance
from jaxrlhf.base.problem import BilevelProblem, Labelled, Sample
from jaxrlhf.base.types import Batch, Key, Params


class PolicyState(NamedTuple):
    """Updates taken `[]`, the policy, and its optimiser's state."""

    step: jax.Array
    policy: Params
    optimizer: Any


class PolicyInfo(NamedTuple):
    """Diagnostics of one step, all scalars.

    Attributes:
        loss: what is minimised, on the step's sample before its first gradient step.
        gradient_norm: of the policy's gradient, before the last gradient step.
        ess_fraction: (sum w)^2 / sum w^2 of the pairs' importance weights, as a share of the sample in (0, 1].
        kl: KL(policy || reference) in nats, by importance weights where the sample came from another policy.
        labels: labels consumed; an enumerated expectation consumes none.
    """

    loss: jax.Array
    gradient_norm: jax.Array
    ess_fraction: jax.Array
    kl: jax.Array
    labels: jax.Array


class PolicyAlgorithm(NamedTuple):
    """Pure functions with the signatures of `BilevelAlgorithm`'s, without a reward.

    Attributes:
        init: `(key, upper, policy) -> PolicyState`. Copies the policy; there is nothing to do with `upper`, and `()`
            will do.
        step: `(key, state, data, frozen) -> (PolicyState, PolicyInfo)`.
        propose: `(key, state, data, frozen) -> Sample`.
        update: `(key, state, labelled, frozen) -> (PolicyState, PolicyInfo)`.
    """

    init: Callable[[Key, Params, Params], PolicyState]
    step: Callable[[Key, PolicyState, Batch, Params], tuple[PolicyState, PolicyInfo]]
    propose: Callable[[Key, PolicyState, Batch, Params], Sample]
    update: Callable[[Key, PolicyState, Labelled, Params], tuple[PolicyState, PolicyInfo]]


def policy_algorithm(
    problem: BilevelProblem,
    loss: Callable[[jax.Array, Labelled, Params], jax.Array],
    optimizer: optax.GradientTransformation,
    *,
    annotate: Callable[[Key, Sample, Params], jax.Array] | None = None,
    sampler: Callable[[Params, Params], Params] = lambda policy, frozen: policy,
    steps: int = 1,
) -> PolicyAlgorithm:
    """Returns the algorithm that descends a loss of the policy's log-probabilities on labelled pairs.

    Args:
        problem: of it `sample` and `log_prob` are used.
        loss: `(log_prob [B, M, 2, T], labelled, frozen) -> []`, differentiable in the first.
        optimizer: of the policy.
        annotate: as in `bilevel_descent`.
        sampler: `(policy, frozen) -> ` the policy that gives the pairs: itself, or `lambda policy, frozen:
            frozen.reference` for offline methods.
        steps: gradient steps on each labelled sample.

    Raises:
        ValueError: steps < 1.
    """
    if steps < 1:
        raise ValueError(f"An update needs at least 1 step a sample, got {steps}.")

    def init(key, upper, policy):
        del key, upper
        policy = jax.tree.map(lambda leaf: jnp.array(leaf, jnp.asarray(leaf).dtype, copy=True), policy)
        return PolicyState(jnp.zeros((), jnp.int32), policy, optimizer.init(policy))

    def propose(key, state, data, frozen):
        return problem.sample(key, sampler(state.policy, frozen), data, frozen)

    def update(key, state, labelled, frozen):
        del key
        sample = labelled.sample

        def at(policy):
            log_prob = problem.log_prob(policy, sample, frozen)
            return loss(log_prob, labelled, frozen), log_prob

        def one(carry, _):
            policy, optimizer_state = carry
            (value, log_prob), gradient = jax.value_and_grad(at, has_aux=True)(policy)
            move, optimizer_state = optimizer.update(gradient, optimizer_state, policy)
            pairs = importance.pair_log_weights(importance.step_log_weights(log_prob, sample))
            share, kl = importance.ess_fraction(pairs, sample), importance.kl(log_prob, sample)
            seen = value, optax.tree.norm(gradient), share, kl
            return (optax.apply_updates(policy, move), optimizer_state), seen

        carry = (state.policy, state.optimizer)
        (policy, optimizer_state), (values, norms, shares, kls) = jax.lax.scan(one, carry, None, length=steps)
        info = PolicyInfo(values[0], norms[-1], shares[0], kls[0], importance.count_labels(labelled))
        return PolicyState(state.step + 1, policy, optimizer_state), info

    return PolicyAlgorithm(init, composed(propose, update, annotate), propose, update)


def composed(
    propose: Callable, update: Callable, annotate: Callable[[Key, Sample, Params], jax.Array] | None
) -> Callable:
    """Returns the `step` of an algorithm from its two halves and an annotator; without one it raises ValueError."""

    def step(key, state, data, frozen):
        if annotate is None:
            raise ValueError("step needs an annotator: give the algorithm one, or use propose and update.")
        sample_key, label_key, update_key = jax.random.split(key, 3)
        sample = propose(sample_key, state, data, frozen)
        return update(update_key, state, Labelled(sample, annotate(label_key, sample, frozen)), frozen)

    return step


def label_policy_gradient(
    problem: BilevelProblem,
    optimizer: optax.GradientTransformation,
    *,
    annotate: Callable[[Key, Sample, Params], jax.Array] | None = None,
    steps: int = 1,
) -> PolicyAlgorithm:
    """Returns the algorithm that moves the policy by the labels alone.

    Args:
        problem: its objective must be one of labels, `objectives.utility`: a cost that reads the reward sees 0
            everywhere. `problem.kl_price` is what keeps the policy near the reference.
        optimizer: of the policy.
        annotate: as in `bilevel_descent`.
        steps: gradient steps on each labelled sample, by importance weights.

    Raises:
        ValueError: the KL price is not positive, or steps < 1.
    """
    if not isinstance(problem.kl_price, jax.core.Tracer) and not problem.kl_price > 0:
        raise ValueError(
            "Policy gradient on labels needs a KL price, objectives.utility(kl_price=...): nothing else holds it."
        )

    def loss(log_prob, labelled, frozen):
        nothing = jnp.zeros_like(labelled.sample.behaviour_log_prob)
        cost = problem.cost((), nothing, labelled, frozen)
        levels = importance.evaluate(log_prob, nothing, cost, labelled.sample, beta=0.0, kl_price=problem.kl_price)
        return levels.upper

    return policy_algorithm(problem, loss, optimizer, annotate=annotate, steps=steps)
