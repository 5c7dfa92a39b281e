"""The solver for neural policies: one policy, and its derivative in the tilt."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxrlhf.base.types import Params
from jaxrlhf.bilevel.estimate.objectives import SampledObjectives
from jaxrlhf.bilevel.iterates import first
from jaxrlhf.bilevel.solvers.solver import LowerSolver, LowerTask, check_steps


class PolicyGradientEstimator(NamedTuple):
    """A way to estimate the gradient of -J at the policy, with a state of its own (a critic, say).

    Attributes:
        init: `(policy) -> state`, from the first policy.
        step: `(policy, state, task) -> (gradient, state)`.
    """

    init: Callable[[Params], Any]
    step: Callable[[Params, Any, LowerTask], tuple[Params, Any]]


def loss_gradient() -> PolicyGradientEstimator:
    """Returns the gradient of the task's own loss at tilt 0: score functions with leave-one-out baselines."""
    return PolicyGradientEstimator(
        lambda policy: (), lambda policy, state, task: (jax.grad(task.loss)(policy, 0), state)
    )


class TangentState(NamedTuple):
    """States of the policy's and the tangent's optimisers and of the policy gradient, and the tangent d lambda / ds."""

    policy_optimizer: Any
    tangent_optimizer: Any
    policy_gradient: Any
    tangent: Params


def tangent(
    policy_optimizer: optax.GradientTransformation,
    tangent_optimizer: optax.GradientTransformation,
    *,
    steps: int = 1,
    policy_gradient: PolicyGradientEstimator | None = None,
) -> LowerSolver:
    """Returns the solver whose iterates lie on a line, `lambda_i = lambda_0 + tilt_i * tangent`.

    Tilt 0 takes optimiser steps on -J. Write theta for its parameters as the outer step begins, and mu for the policy that
    drew the sample. The tangent t, shaped like the policy's parameters, is updated with the gradient

        g(t) = sum_i c_i grad_lambda P_i(theta + s_i t),      P_i(lambda) = s_i G(lambda) + beta KL(lambda || mu),

    c_i and s_i the stencil's. The t with g(t) = 0 approximates d lambda* / ds at s = 0 to the stencil's order. After the
    last inner step, lambda_i = lambda_0 + s_i t around the updated lambda_0.

    Where tilt 0 is optimal the proximal problem P_i has the same minimiser as s_i G - J, because then
    J(lambda_0) - J(lambda) = beta KL(lambda || lambda_0). Where it is not yet, the tilts share its error instead of each
    adding its own, divided by sigma. To leading order the tangent's equation is linear and free of sigma, so sigma may be
    small, and the tangent averages label noise over steps: it wants a smaller rate than the policy. As the iterates lie on
    a line, `five_point` gains accuracy here but not its full order.

    Departure from arXiv 2410.15610, which trains a second policy of its own; `gradient` does that.

    Args:
        policy_optimizer: moves tilt 0.
        tangent_optimizer: moves the tangent; weight decay damps it.
        steps: inner steps.
        policy_gradient: estimates tilt 0's gradient, `loss_gradient` by default; on long episodes a critic's
            (`jaxrlhf.algorithms.actor_critic`) is less noisy. The tangent's always comes from the loss.

    Raises:
        ValueError: steps < 1; or at trace time, where no single policy sampled for all tilts: a problem given as two
            losses, or a rule with samples of their own.
    """
    check_steps(steps)
    estimator = loss_gradient() if policy_gradient is None else policy_gradient

    def init(lowers):
        policy = first(lowers)
        zero = jax.tree.map(jnp.zeros_like, policy)
        return TangentState(policy_optimizer.init(policy), tangent_optimizer.init(zero), estimator.init(policy), zero)

    def step(key, lowers, solver_state, task):
        del key
        sampler = first(lowers)

        def inner_step(carry, _):
            policy, state = carry
            gradient, estimator_state = estimator.step(policy, state.policy_gradient, task)
            tangent_gradient, norms = _tangent_gradient(task, sampler, state.tangent)
            policy_update, policy_state = policy_optimizer.update(gradient, state.policy_optimizer, policy)
            tangent_update, tangent_state = tangent_optimizer.update(
                tangent_gradient, state.tangent_optimizer, state.tangent
            )
            new_tangent = optax.apply_updates(state.tangent, tangent_update)
            state = TangentState(policy_state, tangent_state, estimator_state, new_tangent)
            return (optax.apply_updates(policy, policy_update), state), norms.at[0].set(optax.tree.norm(gradient))

        (policy, solver_state), residuals = jax.lax.scan(inner_step, (sampler, solver_state), None, length=steps)
        lowers = jax.vmap(lambda tilt: _along(policy, solver_state.tangent, tilt))(task.tilts)
        return lowers, solver_state, residuals[-1]

    return LowerSolver(init, step)


def _tangent_gradient(task: LowerTask, sampler: Params, tangent: Params) -> tuple[Params, jax.Array]:
    """Returns g(tangent) and the norms `[S]` of the gradients of P_i, 0 where c_i = 0."""
    if task.shared is None:
        raise ValueError(
            "tangent needs policies, a stencil in the tilt and one shared sample; use gradient for the others."
        )
    objectives, tilts = task.shared, task.tilts
    # Tilts of coefficient 0 say nothing about the tangent: tilt 0 of a central stencil, or of a one-policy rule.
    used = [index for index, coefficient in enumerate(task.stencil.coefficients) if coefficient]
    scale = jnp.asarray([task.stencil.coefficients[index] for index in used]) / task.sigma

    def gradient_at(index):
        loss = lambda lower: _proximal_loss(objectives, lower, tilts[index])  # noqa: E731
        return jax.grad(loss)(_along(sampler, tangent, tilts[index]))

    gradients = task.map(gradient_at)(np.array(used, int))
    combined = jax.tree.map(lambda leaf: jnp.tensordot(scale.astype(leaf.dtype), leaf, axes=1), gradients)
    return combined, jnp.zeros_like(tilts).at[np.array(used, int)].set(jax.vmap(optax.tree.norm)(gradients))


def _proximal_loss(objectives: SampledObjectives, lower: Params, tilt: jax.Array) -> jax.Array:
    """Returns P = tilt G + beta KL(lower || mu), mu the policy that sampled."""
    sample = objectives.labelled.sample
    # With R replaced by beta log(mu / reference), -J equals beta KL(lower || mu) in expectation.
    implied = objectives.beta * (sample.behaviour_log_prob - sample.reference_log_prob)
    return objectives._replace(reward=implied).tilted_loss(lower, tilt)


def _along(policy: Params, tangent: Params, tilt: jax.Array) -> Params:
    """Returns `policy + tilt * tangent`."""
    return jax.tree.map(lambda leaf, change: leaf + tilt.astype(leaf.dtype) * change, policy, tangent)
