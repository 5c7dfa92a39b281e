"""A target for the KL in place of a weight: a controller that adapts beta, for any algorithm that has one.

    make = lambda beta: bilevel_descent(problem, central(0.2), solver, optax.adam(1e-3), beta=beta)
    algorithm = target_kl(make, target=ramp(5.0, steps=50), beta=0.3)

Every update is followed by a proportional-integral step in logarithms,

    error <- clip(log(KL / target), -1, 1)
    integral <- integral + gain error,        log beta <- integral + proportional error

(Ziegler et al., arXiv 1909.08593, have the integral alone, which oscillates where the policy takes many steps to
respond). A learning rate that decays to 0 freezes the policy, whatever beta does: let it end at a tenth.

Any function from beta to an algorithm can be controlled, provided that it accepts a traced beta.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import optax

from jaxrlhf.base.algorithm import Algorithm
from jaxrlhf.base.types import Key, Params


class ControlledState(NamedTuple):
    """What is carried.

    Attributes:
        inner: the algorithm's state.
        integral: `[]`, the controller's.
        log_beta: `[]`, the logarithm of the beta of the next step.
        scale: `[]`, multiplies the target; 1 at first. Runs in parallel (`vmap`) may each have their own.
    """

    inner: Any
    integral: jax.Array
    log_beta: jax.Array
    scale: jax.Array

    @property
    def step(self) -> jax.Array:
        """Steps taken."""
        return self.inner.step

    @property
    def policy(self) -> Params:
        """The policy that is deployed."""
        return self.inner.policy

    @property
    def upper(self) -> Params:
        """The reward's parameters, where the algorithm learns one."""
        return self.inner.upper


def ramp(target: float | jax.Array, *, steps: int, begin: int = 0, start: float = 0.1) -> optax.Schedule:
    """Returns the schedule that rises linearly from `start * target` at step `begin` to the target at `steps`.

    A policy that has just begun is far below any target; asking for all of it at once would only wind beta down. Before
    `begin` it is NaN, which leaves beta alone: for policies that wait until their reward has seen some labels.

    Examples:
        >>> from jaxrlhf.algorithms.target_kl import ramp
        >>> [round(float(ramp(5.0, steps=10)(step)), 2) for step in (0, 5, 10, 20)]
        [0.5, 2.75, 5.0, 5.0]
    """

    def at(step):
        progress = jnp.clip((step - begin) / max(1, steps - begin), 0.0, 1.0)
        return jnp.where(step < begin, jnp.nan, target * (start + (1.0 - start) * progress))

    return at


def target_kl(
    make: Callable[[Any], Algorithm],
    *,
    target: float | optax.Schedule,
    beta: float | jax.Array,
    gain: float = 0.05,
    proportional: float = 1.0,
    measure: Callable[[Key, Any, Any, Params], jax.Array] | None = None,
) -> Algorithm:
    """Returns the algorithm with beta adapted towards a target KL; with `ControlledState` and the inner info.

    Args:
        make: `beta [] -> Algorithm`, with a `step` in its state and a `kl` in its info.
        target: KL to the reference in nats, positive, or a schedule of it; NaN leaves beta as it is.
        beta: its first value.
        gain: of the integral: its largest change a step.
        proportional: how beta reacts at once: 1 makes it twice as large at twice the target.
        measure: `(key, state, labelled, frozen) -> KL []`, in place of the info's, from the inner state after the update;
            for methods whose samples come from another policy, so that importance weights make the info's useless.

    Raises:
        ValueError: a number is not positive (`proportional` may be 0).
    """
    schedule = target if callable(target) else lambda step: jnp.asarray(target)
    for name, value in {"target": target, "beta": beta, "gain": gain}.items():
        if not callable(value) and not isinstance(value, jax.core.Tracer) and not value > 0:
            raise ValueError(f"{name} must be positive, got {value:g}.")
    if not proportional >= 0:
        raise ValueError(f"proportional must not be negative, got {proportional:g}.")

    def algorithm_at(state):
        return make(jnp.exp(state.log_beta))

    def init(key, upper, lower):
        # Strip weak types so that step compiles once.
        log_beta = jnp.log(jnp.asarray(beta, jnp.result_type(float)))
        inner = make(beta).init(key, upper, lower)
        # Two buffers, so that the state may be donated.
        return ControlledState(inner, log_beta, jnp.array(log_beta, copy=True), jnp.ones_like(log_beta))

    def control(key, state, inner, labelled, frozen, info):
        divergence = info.kl if measure is None else measure(key, inner, labelled, frozen)
        # An estimate of a small KL may be negative; that is far below any target.
        goal = state.scale * schedule(inner.step)
        error = jnp.clip(jnp.log(jnp.maximum(divergence, 1e-6) / goal), -1.0, 1.0)
        error = jnp.where(jnp.isnan(goal), 0.0, error).astype(state.integral.dtype)
        integral = state.integral + gain * error
        return ControlledState(inner, integral, integral + proportional * error, state.scale)

    def propose(key, state, data, frozen):
        return algorithm_at(state).propose(key, state.inner, data, frozen)

    def update(key, state, labelled, frozen):
        update_key, measure_key = jax.random.split(key)
        inner, info = algorithm_at(state).update(update_key, state.inner, labelled, frozen)
        return control(measure_key, state, inner, labelled, frozen, info), info

    def step(key, state, data, frozen):
        step_key, measure_key = jax.random.split(key)
        if measure is not None:
            raise ValueError("A KL that is measured apart needs propose and update.")
        inner, info = algorithm_at(state).step(step_key, state.inner, data, frozen)
        return control(measure_key, state, inner, None, frozen, info), info

    return Algorithm(init, step, propose, update)
