"""Zero-order descent, for comparison: Phi differenced along a random direction of the reward's parameters.

    gradient = u [Phi(phi + radius u) - Phi(phi - radius u)] / (2 radius),      u standard normal, a fresh one each step

Unbiased for grad Phi up to O(radius^2) where the lower problems at both points are solved; its variance grows with the
number of reward parameters. It perturbs the reward and not the tilt: each point has a lower problem of its own, at tilt
0, and the reward model runs at three points.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxrlhf.base.algorithm import Algorithm, Annotator, compose
from jaxrlhf.base.problem import BilevelProblem
from jaxrlhf.base.types import Batch, Key, Params
from jaxrlhf.bilevel import iterates
from jaxrlhf.bilevel.checks import check_problem
from jaxrlhf.bilevel.descent import (
    BilevelInfo,
    BilevelState,
    first_state,
    losses_on,
    pass_data,
    unlabelled,
)
from jaxrlhf.bilevel.estimate.interface import Levels, Setting
from jaxrlhf.bilevel.estimate.report import Report, fraction
from jaxrlhf.bilevel.estimate.shared_sample import on_shared_sample
from jaxrlhf.bilevel.estimate.two_losses import on_two_losses
from jaxrlhf.bilevel.rules.decoupled import decoupled
from jaxrlhf.bilevel.sampling import Sampling, check_sampling, labeller, proposer
from jaxrlhf.bilevel.schedules import Balanced, SigmaSchedule, as_schedule
from jaxrlhf.bilevel.solvers.solver import LowerSolver, LowerTask
from jaxrlhf.bilevel.stencil import ALONE, CENTRAL

POINTS = len(CENTRAL.offsets)
"""phi, phi + radius u and phi - radius u."""


class ZeroOrder(NamedTuple):
    """Settings of zero-order descent: a schedule of the radius, and who draws the pairs."""

    radius: SigmaSchedule
    sampling: Sampling


def zero_order(radius: float | SigmaSchedule = 0.1, *, sampling: Sampling = "shared") -> ZeroOrder:
    """Returns the settings of zero-order descent.

    Args:
        radius: length of the step a coordinate, in the units of the reward's parameters, or a schedule of it; positive.
        sampling: who draws the pairs, see `jaxrlhf.bilevel.sampling`.

    Raises:
        ValueError: the radius is not positive or follows an inner error, or the sampling is unknown.
    """
    check_sampling(sampling)
    schedule = as_schedule(radius)
    if isinstance(schedule, Balanced):
        raise ValueError("zero_order has no tilt whose inner error Balanced could follow; give a radius.")
    return ZeroOrder(schedule, sampling)


def zero_order_descent(
    problem: BilevelProblem,
    settings: ZeroOrder,
    solver: LowerSolver,
    upper_optimizer: optax.GradientTransformation,
    *,
    beta: float | jax.Array,
    annotate: Annotator | None = None,
    max_importance_weight: float | None = None,
    sequential: bool = False,
) -> Algorithm:
    """Returns zero-order descent on Phi, with the arguments, the state and the info of `bilevel_descent`.

    The direction is new at every step, so the iterates solved for earlier ones are of no use: all start from the policy
    of phi, and a `gradient` solver needs enough steps to reach the best response.

    Raises:
        ValueError: beta, the KL price or max_importance_weight is out of range.
    """
    check_problem(problem, beta, max_importance_weight)
    setting = Setting(problem, decoupled(), beta, max_importance_weight, sequential)

    def levels_at(upper: Params, labelled: Any, frozen: Params) -> Levels:
        return on_shared_sample(setting, upper, jnp.zeros(1), labelled, frozen)

    return _descent(
        levels_at, settings, solver, upper_optimizer, sequential,
        propose=proposer(problem, settings.sampling, POINTS), label=labeller(annotate, settings.sampling, POINTS),
    )  # fmt: skip


def zero_order_descent_on_losses(
    upper_loss: Callable[[Params, Params, Batch, Params], jax.Array],
    lower_loss: Callable[[Params, Params, Batch, Params], jax.Array],
    settings: ZeroOrder,
    solver: LowerSolver,
    upper_optimizer: optax.GradientTransformation,
) -> Algorithm:
    """As `zero_order_descent`, for a problem without samples; see `bilevel_descent_on_losses`.

    Raises:
        ValueError: the settings ask for samples of their own.
    """
    if settings.sampling != "shared":
        raise ValueError("A problem given as two losses has no samples; leave the sampling shared.")

    def levels_at(upper: Params, data: Batch, frozen: Params) -> Levels:
        return on_two_losses(losses_on(upper_loss, lower_loss, data, frozen), decoupled(), upper, jnp.zeros(1))

    return _descent(levels_at, settings, solver, upper_optimizer, False, propose=pass_data, label=unlabelled)


def _descent(
    levels_at: Callable[[Params, Any, Params], Levels],
    settings: ZeroOrder,
    solver: LowerSolver,
    upper_optimizer: optax.GradientTransformation,
    sequential: bool,
    *,
    propose: Callable,
    label: Callable | None,
) -> Algorithm:
    own_samples = settings.sampling != "shared"

    def every(function: Callable) -> Callable:
        return iterates.map_iterates(function, sequential=sequential)

    def init(key: Key, upper: Params, lower: Params) -> BilevelState:
        del key
        # At each point the solver moves a stack of one iterate.
        init_solver = jax.vmap(lambda lower: solver.init(iterates.stack(lower, 1)))
        return first_state(upper, lower, upper_optimizer, init_solver, POINTS)

    def update(key: Key, state: BilevelState, labelled: Any, frozen: Params) -> tuple[BilevelState, BilevelInfo]:
        solver_key, direction_key = jax.random.split(key)
        radius = jnp.asarray(settings.radius(state.step))
        direction = optax.tree.random_like(direction_key, state.upper, jax.random.normal)
        points = (_points(state.upper, direction, radius * jnp.asarray(CENTRAL.offsets)), jnp.arange(POINTS))

        def labels_at(index: jax.Array) -> Any:
            return iterates.at(labelled, index) if own_samples else labelled

        def solve(upper: Params, index: jax.Array, solver_state: Any) -> tuple[Params, Any, jax.Array, Report]:
            levels = levels_at(upper, labels_at(index), frozen)
            task = LowerTask(
                loss=levels.tilted_loss,
                upper=upper,
                tilts=jnp.zeros(1),
                stencil=ALONE,
                sigma=radius,
                labelled=labels_at(index),
                frozen=frozen,
            )
            lowers, solver_state, residuals = solver.step(
                solver_key, iterates.stack(state.policy, 1), solver_state, task
            )
            return iterates.first(lowers), solver_state, residuals[0], levels.hypergradient(lowers, radius)[1]

        def upper_loss_at(upper: Params, index: jax.Array) -> jax.Array:
            policy = iterates.stack(iterates.first(lowers), 1)
            return levels_at(upper, labels_at(index), frozen).hypergradient(policy, radius)[1].upper_loss

        lowers, solver_state, residuals, reports = every(solve)(*points, state.solver)
        gradient, coupling_fraction = two_point_gradient(
            direction, reports.upper_loss, every(upper_loss_at)(*points), radius
        )
        updates, upper_state = upper_optimizer.update(gradient, state.upper_optimizer, state.upper)
        report = iterates.first(reports)._replace(
            coupling_fraction=coupling_fraction,
            ess_fraction=jnp.min(reports.ess_fraction),
            labels=jnp.sum(reports.labels) if own_samples else reports.labels[0],
        )
        info = BilevelInfo(
            residual_over_sigma=jnp.max(residuals) / radius,
            hypergradient_norm=optax.tree.norm(gradient),
            **report._asdict(),
        )
        upper = optax.apply_updates(state.upper, updates)
        return BilevelState(state.step + 1, upper, lowers, upper_state, solver_state, state.inner_error), info

    return Algorithm(init, compose(propose, label, update), propose, update)


def two_point_gradient(
    direction: Params, followed: jax.Array, fixed: jax.Array, radius: jax.Array
) -> tuple[Params, jax.Array]:
    """Returns `direction sum_i c_i followed_i`, and the fraction of it that the best response's movement makes.

    Args:
        direction: u.
        followed: `[3]`, G at each point's reward and the policy solved for it.
        fixed: `[3]`, G at each point's reward and the policy of phi.
        radius: `[]`; c_i is the stencil's coefficient divided by it.
    """
    scale = jnp.asarray(CENTRAL.coefficients, followed.dtype) / radius
    # Each less the value at phi, which the coefficients cancel: smaller numbers, smaller rounding.
    derivative, uncoupled = scale @ (followed - followed[0]), scale @ (fixed - fixed[0])
    gradient = jax.tree.map(lambda along: derivative.astype(along.dtype) * along, direction)
    return gradient, fraction(jnp.abs(derivative - uncoupled), jnp.abs(uncoupled))


def _points(upper: Params, direction: Params, steps: jax.Array) -> Params:
    """Returns the reward parameters at all points, leaves `[3, ...]`."""
    return jax.vmap(
        lambda step: jax.tree.map(lambda leaf, along: leaf + step.astype(leaf.dtype) * along, upper, direction)
    )(steps)
