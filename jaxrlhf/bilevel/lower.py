"""Lower solvers: what moves the policies towards the minimisers of their tilted losses.

A solver is a pair of pure functions with a state of its own (optimiser moments, a critic), so that nothing leaks into
the policies' parameters. It moves the whole stack of iterates, on the same sample and with the same key, because what
the upper level reads is their differences: an error that all tilts share cancels in a stencil, one that differs is
divided by sigma.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxrlhf.types import Key, Params


class LowerTask(NamedTuple):
    """The lower problems of one outer step, given to a solver inside a trace.

    Attributes:
        loss: `(lower, tilt) -> []`, h(phi, lower; tilt) = tilt G - J on the step's labelled sample.
        tilts: `[S]`, in the units of beta, 0 first.
        upper: the reward parameters.
        labelled: the step's labelled sample, or its data.
        frozen: what no gradient touches.
    """

    loss: Callable[[Params, jax.Array], jax.Array]
    tilts: jax.Array
    upper: Params
    labelled: Any
    frozen: Params

    def gradients(self, lowers: Params) -> Params:
        """Returns each iterate's gradient of its tilted loss, leaves `[S, ...]`."""
        return jax.vmap(jax.grad(self.loss))(lowers, self.tilts)


class LowerSolver(NamedTuple):
    """A pair of pure functions on the stacked iterates, leaves `[S, ...]`, tilt 0 first.

    Attributes:
        init: `(lowers) -> solver_state`.
        step: `(key, lowers, solver_state, task) -> (lowers, solver_state, residuals)`, where the residuals `[S]` are the
            norms of the tilted losses' gradients. Consumes the key.
    """

    init: Callable[[Params], Any]
    step: Callable[[Key, Params, Any, LowerTask], tuple[Params, Any, jax.Array]]


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
    if steps < 1:
        raise ValueError(f"The lower solver needs at least 1 step, got {steps}.")

    def step(key, lowers, solver_state, task):
        del key

        def one(carry, _):
            lowers, solver_state = carry
            gradients = task.gradients(lowers)
            updates, solver_state = optimizer.update(gradients, solver_state, lowers)
            return (optax.apply_updates(lowers, updates), solver_state), jax.vmap(optax.tree.norm)(gradients)

        (lowers, solver_state), residuals = jax.lax.scan(one, (lowers, solver_state), None, length=steps)
        return lowers, solver_state, residuals[-1]

    return LowerSolver(optimizer.init, step)


def closed_form(solution: Callable[[LowerTask, jax.Array], Params]) -> LowerSolver:
    """Returns a solver that jumps to `solution(task, tilt)`; the residuals are measured there, not assumed to be 0."""

    def step(key, lowers, solver_state, task):
        del key, lowers
        solved = jax.vmap(lambda tilt: solution(task, tilt))(task.tilts)
        return solved, solver_state, jax.vmap(optax.tree.norm)(task.gradients(solved))

    return LowerSolver(lambda lowers: (), step)


class SharedAdamState(NamedTuple):
    """Steps taken, the first moment of every tilt `[S, ...]`, and the second moment that they share `[...]`."""

    count: jax.Array
    first: Params
    second: Params


def shared_adam(
    learning_rate: float | optax.Schedule, *, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8
) -> optax.GradientTransformation:
    """Returns Adam with one second moment for all tilts, the mean of their squared gradients.

    Each tilt keeps its own first moment, and all are divided by the same scale: the stack moves by one linear map, so
    differences between tilts obey the same preconditioned descent as the policies themselves. With a second moment a
    tilt, Adam turns a difference of gradients of order sigma into one of order 1 near the solution, and the single-loop
    method diverges (`tests/bilevel/descent_test.py` holds both). On one tilt it is Adam (arXiv 1412.6980).
    """

    def init(lowers):
        return SharedAdamState(
            count=jnp.zeros((), jnp.int32),
            first=jax.tree.map(jnp.zeros_like, lowers),
            second=jax.tree.map(lambda leaf: jnp.zeros_like(leaf[0]), lowers),
        )

    def update(gradients, state, lowers=None):
        del lowers
        count = optax.safe_increment(state.count)
        first = jax.tree.map(lambda old, new: b1 * old + (1 - b1) * new, state.first, gradients)
        second = jax.tree.map(
            lambda old, new: b2 * old + (1 - b2) * jnp.mean(jnp.square(new), axis=0), state.second, gradients
        )
        rate = learning_rate(state.count) if callable(learning_rate) else learning_rate

        def move(first, second):
            scale = jnp.sqrt(second / (1 - b2**count)) + eps
            return -rate * first / (1 - b1**count) / scale[None]

        return jax.tree.map(move, first, second), SharedAdamState(count, first, second)

    return optax.GradientTransformation(init, update)
