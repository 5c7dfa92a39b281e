"""Two quadratic losses: everything about the problem is known in closed form."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrlhf.bilevel import ZeroOrder, bilevel_descent_on_losses, closed_form, zero_order_descent_on_losses
from jaxrlhf.known.problem import KnownProblem


class Quadratic(NamedTuple):
    """The `frozen` argument: G = |lower - target|^2 / 2 and -J = |lower - matrix upper|^2 / 2.

    Attributes:
        matrix: `[2, 2]`.
        target: `[2]`.
    """

    matrix: jax.Array
    target: jax.Array


def _upper_loss(upper, lower, data, frozen: Quadratic) -> jax.Array:
    return 0.5 * jnp.sum((lower - frozen.target) ** 2)


def _lower_loss(upper, lower, data, frozen: Quadratic) -> jax.Array:
    return 0.5 * jnp.sum((lower - frozen.matrix @ upper) ** 2)


def _solution(task, index) -> jax.Array:
    matrix, target = task.frozen
    tilt = task.tilts[index]
    return (matrix @ task.upper + tilt * target) / (1.0 + tilt)


def _algorithm(rule, solver, upper_optimizer, pairs=None, **options):
    del pairs
    if isinstance(rule, ZeroOrder):
        return zero_order_descent_on_losses(_upper_loss, _lower_loss, rule, solver, upper_optimizer, **options)
    return bilevel_descent_on_losses(_upper_loss, _lower_loss, rule, solver, upper_optimizer, **options)


def quadratic(*, conditioning: float = 4.0) -> KnownProblem:
    """G = |lower - target|^2 / 2 and -J = |lower - A upper|^2 / 2; the best response is A upper, Phi* = 0.

    The gold value of a policy is -G. `conditioning` is the ratio of A's singular values, squared in Phi.
    """
    rotation = jnp.array([[0.8, -0.6], [0.6, 0.8]])
    frozen = Quadratic(
        matrix=rotation @ jnp.diag(jnp.array([1.0, conditioning])),
        target=jnp.array([1.0, -1.0]),
    )

    def phi(upper):
        return _upper_loss(upper, frozen.matrix @ upper, None, frozen)

    return KnownProblem(
        algorithm=_algorithm,
        frozen=frozen,
        data=None,
        start=lambda key, scale: (scale * jax.random.normal(key, (2,)), jnp.zeros(2)),
        solver=closed_form(_solution),
        phi=phi,
        gold_value_of_best_response=lambda upper: -phi(upper),
        gold_value=lambda lower: -_upper_loss(None, lower, None, frozen),
        best_gold_value=jnp.zeros(()),
        optimum=0.0,
        beta=1.0,
        exact_solver=True,
    )
