"""Two quadratics: the problem whose every answer fits on a line."""

import jax
import jax.numpy as jnp

from jaxrlhf.bilevel import bilevel_descent_on_losses, closed_form
from jaxrlhf.known.problem import KnownProblem


def quadratic(*, conditioning: float = 4.0) -> KnownProblem:
    """G = |lower - target|^2 / 2 and -J = |lower - A upper|^2 / 2; the answer is A upper, Phi* = 0.

    The worth of a policy is -G. `conditioning` is the ratio of A's singular values, squared in Phi.
    """
    turn = jnp.array([[0.8, -0.6], [0.6, 0.8]])
    matrix = turn @ jnp.diag(jnp.array([1.0, conditioning]))
    target = jnp.array([1.0, -1.0])

    def upper_loss(upper, lower, data, frozen):
        return 0.5 * jnp.sum((lower - frozen[1]) ** 2)

    def lower_loss(upper, lower, data, frozen):
        return 0.5 * jnp.sum((lower - frozen[0] @ upper) ** 2)

    def solution(task, index):
        matrix, target = task.frozen
        tilt = task.tilt_of(index)
        return (matrix @ task.upper_of(index) + tilt * target) / (1.0 + tilt)

    def algorithm(rule, solver, upper_optimizer, pairs=None, **options):
        del pairs
        return bilevel_descent_on_losses(upper_loss, lower_loss, rule, solver, upper_optimizer, **options)

    def phi(upper):
        return 0.5 * jnp.sum((matrix @ upper - target) ** 2)

    return KnownProblem(
        algorithm=algorithm,
        frozen=(matrix, target),
        data=None,
        start=lambda key, scale: (scale * jax.random.normal(key, (2,)), jnp.zeros(2)),
        solver=closed_form(solution),
        phi=phi,
        exploited=lambda upper: -phi(upper),
        worth=lambda lower: -0.5 * jnp.sum((lower - target) ** 2),
        best_worth=jnp.zeros(()),
        optimum=0.0,
        beta=1.0,
        exact_solver=True,
    )
