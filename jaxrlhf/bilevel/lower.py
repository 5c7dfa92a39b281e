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
import numpy as np
import optax

from jaxrlhf.base.types import Key, Params
from jaxrlhf.bilevel.stencil import Index, Stencil


class LowerTask(NamedTuple):
    """The lower problems of one outer step, one an iterate, named by its index; given to a solver inside a trace.

    Attributes:
        loss: `(lower, index) -> []`, h(phi, lower; tilt) = tilt G - J of that problem.
        proximal_loss: `(lower, index) -> []`, tilt G + beta KL(lower || mu), mu the policy that sampled; None where no
            single policy did.
        upper_of: `index -> ` the reward parameters of that problem; they differ under `zero_order` only.
        tilt_of: `index -> []`, the tilt of that problem, `offset * sigma`; 0 under `zero_order`.
        stencil: the tilts' offsets and coefficients, static.
        sigma: `[]`, the perturbation, in the units of beta.
        labelled: the step's labelled sample (leaves `[S, ...]` where every tilt has its own), or its data.
        frozen: what no gradient touches.
        over: maps a function over problems, as `jax.vmap` does: all at once, or one after another.
    """

    loss: Callable[[Params, Index], jax.Array]
    proximal_loss: Callable[[Params, Index], jax.Array] | None
    upper_of: Callable[[Index], Params]
    tilt_of: Callable[[Index], jax.Array]
    stencil: Stencil
    sigma: jax.Array
    labelled: Any
    frozen: Params
    over: Callable[[Callable], Callable] = jax.vmap

    @property
    def indices(self) -> jax.Array:
        """`[S]`, the problems' names."""
        return jnp.arange(len(self.stencil.offsets))

    def gradients(self, lowers: Params) -> Params:
        """Returns each iterate's gradient of its tilted loss, leaves `[S, ...]`."""
        return self.over(jax.grad(self.loss))(lowers, self.indices)


class LowerSolver(NamedTuple):
    """A pair of pure functions on the stacked iterates, leaves `[S, ...]`, tilt 0 first.

    Attributes:
        init: `(lowers) -> solver_state`.
        step: `(key, lowers, solver_state, task) -> (lowers, solver_state, residuals)`, where the residuals `[S]` are the
            norms of the gradients that the solver drives to 0, before its last step. Consumes the key.
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


class PolicyGradientEstimator(NamedTuple):
    """A way to estimate the gradient of -J at the policy, with a state of its own (a critic, say).

    Attributes:
        init: `() -> state`.
        step: `(policy, state, task) -> (gradient, state)`.
    """

    init: Callable[[], Any]
    step: Callable[[Params, Any, LowerTask], tuple[Params, Any]]


def loss_gradient() -> PolicyGradientEstimator:
    """Returns the gradient of the task's own loss at tilt 0: score functions with leave-one-out baselines."""
    return PolicyGradientEstimator(lambda: (), lambda policy, state, task: (jax.grad(task.loss)(policy, 0), state))


class TangentState(NamedTuple):
    """States of the policy's and the tangent's optimisers and of the slope, and the tangent itself, d lambda / ds."""

    policy_optimizer: Any
    tangent_optimizer: Any
    slope: Any
    tangent: Params


def tangent(
    policy_optimizer: optax.GradientTransformation,
    tangent_optimizer: optax.GradientTransformation,
    *,
    steps: int = 1,
    slope: PolicyGradientEstimator | None = None,
) -> LowerSolver:
    """Returns the solver for neural policies: iterates `lambda_i = lambda_0 + tilt_i * tangent`.

    Tilt 0 descends -J. The tangent, a set of parameters like the policy's, descends

        sum_i c_i grad [s_i G + beta KL(. || mu)] at mu + s_i tangent,      c_i, s_i the stencil's,

    whose zero is the policy's answer d lambda / ds to the stencil's order. Where tilt 0 is optimal this proximal problem
    has the same minimiser as s G - J, because then J(lambda_0) - J(lambda) = beta KL(lambda || lambda_0). Where it is
    not yet, the tilts share its error instead of each adding its own, divided by sigma. To leading order the tangent's
    equation is linear and free of sigma, so sigma may be small, and the tangent averages label noise over steps: it
    wants a smaller rate than the policy. The iterates lie on a line, so `five_point` gains accuracy here but not its full
    order.

    Departure from arXiv 2410.15610, which trains a second policy of its own; `gradient` does that.

    Args:
        policy_optimizer: moves tilt 0.
        tangent_optimizer: moves the tangent; weight decay damps the answer.
        steps: inner steps.
        slope: where tilt 0's gradient comes from, `loss_gradient` by default; on long episodes a critic's
            (`jaxrlhf.algorithms.actor_critic`) is less noisy. The tangent's always comes from the loss.

    Raises:
        ValueError: steps < 1; or at trace time, where no single policy sampled for all tilts: a problem given as two
            losses, a rule with samples of their own, `zero_order`.
    """
    if steps < 1:
        raise ValueError(f"The lower solver needs at least 1 step, got {steps}.")
    slope = loss_gradient() if slope is None else slope

    def init(lowers):
        policy = jax.tree.map(lambda leaf: leaf[0], lowers)
        zero = jax.tree.map(jnp.zeros_like, policy)
        return TangentState(policy_optimizer.init(policy), tangent_optimizer.init(zero), slope.init(), zero)

    def step(key, lowers, solver_state, task):
        del key
        proximal_loss = task.proximal_loss
        # Tilts of coefficient 0 say nothing about the tangent: tilt 0 of a central stencil, or of a one-policy rule.
        used = [index for index, coefficient in enumerate(task.stencil.coefficients) if coefficient]
        scale = jnp.asarray([task.stencil.coefficients[index] for index in used]) / task.sigma
        if proximal_loss is None:
            raise ValueError(
                "tangent needs policies, a stencil in the tilt and one shared sample; use gradient for the others."
            )
        tilts = jax.vmap(task.tilt_of)(task.indices)
        sampler = jax.tree.map(lambda leaf: leaf[0], lowers)

        def along(tangent, tilt):
            return jax.tree.map(lambda leaf, change: leaf + tilt.astype(leaf.dtype) * change, sampler, tangent)

        def one(carry, _):
            policy, state = carry
            gradient, slope_state = slope.step(policy, state.slope, task)
            answers = task.over(lambda index: jax.grad(proximal_loss)(along(state.tangent, tilts[index]), index))(
                np.array(used, int)
            )
            turning = jax.tree.map(lambda leaf: jnp.tensordot(scale.astype(leaf.dtype), leaf, axes=1), answers)
            move, policy_state = policy_optimizer.update(gradient, state.policy_optimizer, policy)
            turn, tangent_state = tangent_optimizer.update(turning, state.tangent_optimizer, state.tangent)
            state = TangentState(policy_state, tangent_state, slope_state, optax.apply_updates(state.tangent, turn))
            residuals = jnp.zeros_like(tilts).at[np.array(used, int)].set(jax.vmap(optax.tree.norm)(answers))
            return (optax.apply_updates(policy, move), state), residuals.at[0].set(optax.tree.norm(gradient))

        (policy, solver_state), residuals = jax.lax.scan(one, (sampler, solver_state), None, length=steps)
        lowers = jax.vmap(
            lambda tilt: jax.tree.map(
                lambda leaf, change: leaf + tilt.astype(leaf.dtype) * change, policy, solver_state.tangent
            )
        )(tilts)
        return lowers, solver_state, residuals[-1]

    return LowerSolver(init, step)


def closed_form(solution: Callable[[LowerTask, Index], Params]) -> LowerSolver:
    """Returns a solver that jumps to `solution(task, index)`; the residuals are measured there, not assumed to be 0."""

    def step(key, lowers, solver_state, task):
        del key, lowers
        solved = jax.vmap(lambda index: solution(task, index))(task.indices)
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

    def init(params):
        return SharedAdamState(
            count=jnp.zeros((), jnp.int32),
            first=jax.tree.map(jnp.zeros_like, params),
            second=jax.tree.map(lambda leaf: jnp.zeros_like(leaf[0]), params),
        )

    def update(updates, state, params=None):
        del params
        count = jnp.asarray(optax.safe_increment(state.count))
        first = jax.tree.map(lambda old, new: b1 * old + (1 - b1) * new, state.first, updates)
        second = jax.tree.map(
            lambda old, new: b2 * old + (1 - b2) * jnp.mean(jnp.square(new), axis=0), state.second, updates
        )
        rate = jnp.asarray(learning_rate(state.count)) if callable(learning_rate) else learning_rate

        def move(first, second):
            scale = jnp.sqrt(second / (1 - b2**count)) + eps
            return -rate * first / (1 - b1**count) / scale[None]

        return jax.tree.map(move, first, second), SharedAdamState(count, first, second)

    return optax.GradientTransformation(init, update)
