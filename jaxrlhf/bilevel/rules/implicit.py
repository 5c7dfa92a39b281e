"""The implicit function theorem as a rule, for comparison: it needs second derivatives of the policy's objective."""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import optax

from jaxrlhf.base import importance
from jaxrlhf.base.types import Params
from jaxrlhf.bilevel.iterates import first
from jaxrlhf.bilevel.rules.rule import HypergradientRule, Losses, PolicyFunctions, RuleInputs, Weights, centred
from jaxrlhf.bilevel.schedules import as_schedule
from jaxrlhf.bilevel.stencil import ALONE

Solve = Callable[[Callable[[Params], jax.Array], Params, Params], Params]
"""`(lower_loss, lower, gradient) -> ` the v that solves `(H + damping I) v = gradient`, H the Hessian of lower_loss."""


def implicit(
    *, iterations: int = 10, method: Literal["conjugate_gradient", "neumann"] = "conjugate_gradient",
    damping: float = 1e-3, neumann_rate: float = 1.0,
) -> HypergradientRule:  # fmt: skip
    """Returns the implicit-function rule of PARL (arXiv 2308.02585), for comparison.

        grad Phi = grad_phi G + d/dphi [ d/dlambda J . v ],    (H + damping I) v = grad_lambda G,    H = - d2 J / dlambda2

    by Hessian-vector products only. Exact where lambda maximises J and the linear system is solved; on drawn samples the
    inverse of a noisy Hessian is biased.

    Args:
        iterations: of the linear solver.
        method: "conjugate_gradient", or "neumann" for the truncated series `rate sum_k (I - rate H)^k g`.
        damping: added to the Hessian, which is singular along directions that do not change the policy (a softmax's
            constant) and may be indefinite away from the optimum.
        neumann_rate: below 2 / (largest eigenvalue of H).

    Raises:
        ValueError: the method is unknown or iterations < 1.
    """
    if method not in ("conjugate_gradient", "neumann"):
        raise ValueError(f"implicit solves by conjugate_gradient or neumann, got {method!r}.")
    if iterations < 1:
        raise ValueError(f"implicit needs at least 1 iteration, got {iterations}.")
    solve = _linear_solver(iterations, method, damping, neumann_rate)

    def direction(losses: Losses, upper: Params, lower: Params) -> Params:
        gradient = jax.grad(losses.upper_loss, argnums=1)(upper, lower)
        return solve(lambda lower: losses.lower_loss(upper, lower), lower, gradient)

    return implicit_from_direction(direction)._replace(
        name="implicit",
        weights=lambda inputs, policy: _weights(inputs, policy, solve),
        applies_to=("policies", "losses"),
        differentiates_policy=True,
    )


def implicit_from_direction(direction: Callable[[Losses, Params, Params], Params]) -> HypergradientRule:
    """Returns the implicit-function rule for two losses whose search direction v is known without a linear solver.

        grad Phi = grad_phi G + d/dphi [ d/dlambda J . v ],    v = H^-1 grad_lambda G,    H = - d2 J / dlambda2

    -v is how the policy moves as G is mixed into its loss, d lambda* / ds at s = 0; soft optima have it in closed form
    (`jaxrlhf.mdp.incentives.boltzmann`). Only the mixed derivative along v is taken.

    Args:
        direction: `(losses, upper, lower) -> v`, parameters like `lower`; taken at the policy of tilt 0.
    """

    def surrogate(losses: Losses, lowers: Params, sigma: jax.Array):
        del sigma
        lower = first(lowers)

        def loss(upper: Params) -> jax.Array:
            fixed = jax.lax.stop_gradient(upper)
            along = jax.lax.stop_gradient(direction(losses, fixed, lower))
            derivative = jax.jvp(lambda lower: losses.lower_loss(upper, lower), (lower,), (along,))[1]
            return losses.upper_loss(upper, lower) - derivative

        return loss

    return HypergradientRule(
        "implicit_from_direction", ALONE, as_schedule(1.0), surrogate=surrogate, applies_to=("losses",)
    )


def _weights(inputs: RuleInputs, policy: PolicyFunctions, solve: Solve) -> Weights:
    """The change of the importance weights along the search direction weighs the reward."""
    gradient = jax.grad(lambda lower: policy.values(lower).upper)(policy.lower)
    direction = solve(lambda lower: -policy.values(lower).lower, policy.lower, gradient)
    log_weights, change = jax.jvp(policy.log_weights, (policy.lower,), (direction,))
    joint = jnp.exp(importance.pair_log_weights(log_weights))
    return Weights(joint, centred(jnp.exp(log_weights) * change, inputs.sample))


def _linear_solver(iterations: int, method: str, damping: float, neumann_rate: float) -> Solve:
    def solve(lower_loss: Callable[[Params], jax.Array], lower: Params, gradient: Params) -> Params:
        def curvature(vector: Params) -> Params:
            product = jax.jvp(jax.grad(lower_loss), (lower,), (vector,))[1]
            return optax.tree.add_scale(product, damping, vector)

        if method == "conjugate_gradient":
            # tol=1e-12 so that the requested iterations are made: the default stops short of double precision.
            return jax.scipy.sparse.linalg.cg(curvature, gradient, tol=1e-12, maxiter=iterations)[0]

        def term(_, total: Params) -> Params:
            residual = optax.tree.sub(gradient, curvature(total))
            return optax.tree.add_scale(total, neumann_rate, residual)

        return jax.lax.fori_loop(0, iterations, term, optax.tree.zeros_like(gradient))

    return solve
