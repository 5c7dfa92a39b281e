"""Gradient descent on every iterate: the single loop with one step, the double loop with many."""

import jax
import optax

from jaxrlhf.bilevel.solvers.solver import LowerSolver, check_steps


def gradient(optimizer: optax.GradientTransformation, *, steps: int = 1) -> LowerSolver:
    """Returns a solver that takes `steps` optimiser steps from the warm start.

    One step is the single-loop method; many, the double loop. Inner steps reuse the outer step's sample through
    importance weights. The residuals are the gradient norms before the last step.

    Args:
        optimizer: acts on the whole stack, so that what it computes from all gradients (a clipping factor, the scale of
            `shared_adam`) is common to all tilts. An optimiser that rescales every tilt by its own history, such as
            `optax.adam`, makes errors that differ between tilts and can drive the upper level away.
        steps: inner steps.

    Raises:
        ValueError: steps < 1.
    """
    check_steps(steps)

    def step(key, lowers, solver_state, task):
        del key

        def inner_step(carry, _):
            lowers, solver_state = carry
            gradients = task.gradients(lowers)
            updates, solver_state = optimizer.update(gradients, solver_state, lowers)
            return (optax.apply_updates(lowers, updates), solver_state), jax.vmap(optax.tree.norm)(gradients)

        (lowers, solver_state), residuals = jax.lax.scan(inner_step, (lowers, solver_state), None, length=steps)
        return lowers, solver_state, residuals[-1]

    return LowerSolver(optimizer.init, step)
