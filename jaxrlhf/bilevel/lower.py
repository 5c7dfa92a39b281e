"""Lower solvers: what moves a policy towards the minimiser of its tilted loss.

A solver is a pair of pure functions with a state of its own (optimiser moments, a critic), so that nothing leaks into
the policy's parameters. It is written for one tilt; `bilevel_descent` maps it over the stacked iterates, with the same
sample and the same key for all of them: error that all tilts share cancels in a stencil, error that differs is divided
by sigma.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

from jaxrlhf.types import Key, Params


class LowerTask(NamedTuple):
    """One tilt's problem, given to a solver inside a trace.

    Attributes:
      loss: `lower -> []`, h(phi, lower; s) = s G - J on the step's labelled sample.
      upper: the reward parameters.
      tilt: `[]`, s, in the units of beta.
      labelled: the step's labelled sample, or its data.
      frozen: what no gradient touches.
    """

    loss: Callable[[Params], jax.Array]
    upper: Params
    tilt: jax.Array
    labelled: Any
    frozen: Params


class LowerSolver(NamedTuple):
    """A pair of pure functions.

    Attributes:
      init: `(lower) -> solver_state`.
      step: `(key, lower, solver_state, task) -> (lower, solver_state, residual)`, where the residual `[]` is the norm
        of the tilted loss's gradient. Consumes the key.
    """

    init: Callable[[Params], Any]
    step: Callable[[Key, Params, Any, LowerTask], tuple[Params, Any, jax.Array]]


def gradient(optimizer: optax.GradientTransformation, *, steps: int = 1) -> LowerSolver:
    """Returns a solver that takes `steps` optimiser steps from the warm start.

    One step is the single-loop method; many, the double loop. Inner steps reuse the outer step's sample through
    importance weights. The residual is the gradient norm before the last step.

    Raises:
      ValueError: steps < 1.
    """
    if steps < 1:
        raise ValueError(f"The lower solver needs at least 1 step, got {steps}.")

    def step(key, lower, solver_state, task):
        del key

        def one(carry, _):
            lower, solver_state = carry
            gradients = jax.grad(task.loss)(lower)
            updates, solver_state = optimizer.update(gradients, solver_state, lower)
            return (optax.apply_updates(lower, updates), solver_state), optax.tree.norm(gradients)

        (lower, solver_state), residuals = jax.lax.scan(one, (lower, solver_state), None, length=steps)
        return lower, solver_state, residuals[-1]

    return LowerSolver(optimizer.init, step)


def closed_form(solution: Callable[[LowerTask], Params]) -> LowerSolver:
    """Returns a solver that jumps to `solution(task)`; the residual is measured there, not assumed to be 0."""

    def step(key, lower, solver_state, task):
        del key, lower
        solved = solution(task)
        return solved, solver_state, optax.tree.norm(jax.grad(task.loss)(solved))

    return LowerSolver(lambda lower: (), step)
