"""Algorithms that train a policy without a reward model.

`label_policy_gradient` minimises the coupled upper objective over the policy directly,

    min_lambda  E_{pi_lambda}[cost(y0, y1, labels)] + kappa KL(pi_lambda || reference),

by the importance-weighted score function with leave-one-out baselines (RLOO, arXiv 2402.14740): the bilevel method
without the detour through a reward, and so the honest baseline beside the utility objective. A reward model generalises
from labels to responses that nobody labelled; whether that pays is what the comparison measures.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import optax

from jaxrlhf.base import importance
from jaxrlhf.base.algorithm import Algorithm, Annotator, compose, label_by, owned
from jaxrlhf.base.problem import BilevelProblem, Labelled
from jaxrlhf.base.types import Params


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
        ess_fraction: effective sample size (sum w)^2 / sum w^2 of the pairs' importance weights, as a fraction of the
            sample in (0, 1].
        kl: KL(policy || reference) in nats, by importance weights where the sample came from another policy.
        labels: labels consumed; an enumerated expectation consumes none.
    """

    loss: jax.Array
    gradient_norm: jax.Array
    ess_fraction: jax.Array
    kl: jax.Array
    labels: jax.Array


def policy_algorithm(
    problem: BilevelProblem,
    loss: Callable[[jax.Array, Labelled, Params], jax.Array],
    optimizer: optax.GradientTransformation,
    *,
    annotate: Annotator | None = None,
    sampler: Callable[[Params, Params], Params] = lambda policy, frozen: policy,
    steps: int = 1,
) -> Algorithm:
    """Returns the algorithm that descends a loss of the policy's log-probabilities on labelled pairs.

    Its state is `PolicyState`, its info `PolicyInfo`; `init` has no use for `upper`, and `()` will do.

    Args:
        problem: of it `sample` and `log_prob` are used.
        loss: `(log_prob [B, M, 2, T], labelled, frozen) -> []`, differentiable in the first.
        optimizer: of the policy.
        annotate: as in `bilevel_descent`.
        sampler: `(policy, frozen) -> ` parameters of the policy that samples the pairs: the policy itself, or
            `lambda policy, frozen: frozen.reference` for offline methods.
        steps: gradient steps on each labelled sample.

    Raises:
        ValueError: steps < 1.
    """
    if steps < 1:
        raise ValueError(f"An update needs at least 1 step a sample, got {steps}.")

    def init(key, upper, policy):
        del key, upper
        policy = owned(policy)
        return PolicyState(jnp.zeros((), jnp.int32), policy, optimizer.init(policy))

    def propose(key, state, data, frozen):
        return problem.sample(key, sampler(state.policy, frozen), data, frozen)

    def update(key, state, labelled, frozen):
        del key
        sample = labelled.sample

        def loss_and_log_prob(policy):
            log_prob = problem.log_prob(policy, sample, frozen)
            return loss(log_prob, labelled, frozen), log_prob

        def gradient_step(carry, _):
            policy, optimizer_state = carry
            (value, log_prob), gradient = jax.value_and_grad(loss_and_log_prob, has_aux=True)(policy)
            updates, optimizer_state = optimizer.update(gradient, optimizer_state, policy)
            pair_weights = importance.pair_log_weights(importance.step_log_weights(log_prob, sample))
            ess, kl = importance.ess_fraction(pair_weights, sample), importance.kl(log_prob, sample)
            diagnostics = value, optax.tree.norm(gradient), ess, kl
            return (optax.apply_updates(policy, updates), optimizer_state), diagnostics

        carry = (state.policy, state.optimizer)
        (policy, optimizer_state), (values, norms, ess, kls) = jax.lax.scan(gradient_step, carry, None, length=steps)
        info = PolicyInfo(values[0], norms[-1], ess[0], kls[0], importance.count_labels(labelled))
        return PolicyState(state.step + 1, policy, optimizer_state), info

    return Algorithm(init, compose(propose, label_by(annotate), update), propose, update)


def label_policy_gradient(
    problem: BilevelProblem,
    optimizer: optax.GradientTransformation,
    *,
    annotate: Annotator | None = None,
    steps: int = 1,
) -> Algorithm:
    """Returns the algorithm that trains the policy on the labels alone.

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
        no_reward = jnp.zeros_like(labelled.sample.behaviour_log_prob)
        cost = problem.cost((), no_reward, labelled, frozen)
        values = importance.evaluate(log_prob, no_reward, cost, labelled.sample, beta=0.0, kl_price=problem.kl_price)
        return values.upper

    return policy_algorithm(problem, loss, optimizer, annotate=annotate, steps=steps)
