"""A target for the KL in place of a weight: a controller that moves beta, for any algorithm that has one.

    make = lambda beta: bilevel_descent(problem, central(0.2), solver, optax.adam(1e-3), beta=beta)
    algorithm = target_kl(make, target=ramp(5.0, steps=50), beta=0.3)

Every update is followed by a proportional-integral step in logarithms,

    error <- clip(log(KL / target), -1, 1)
    integral <- integral + gain error,        log beta <- integral + proportional error

(Ziegler et al., arXiv 1909.08593, have the integral alone, which swings where the policy takes many steps to answer).
A learning rate that falls to 0 leaves the policy where it is, whatever beta does: let it end at a tenth.

An algorithm is a function of beta, so there is nothing that a method must do to be controlled but to accept a traced
one.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import optax

from jaxrlhf.base.types import Batch, Key, Params


class ControlledState(NamedTuple):
    """What is carried.

    Attributes:
        inner: the algorithm's state.
        integral: `[]`, the controller's.
        log_beta: `[]`, the logarithm of the beta of the next step.
        scale: `[]`, multiplies the target; 1 at first. Runs side by side (`vmap`) may each have their own.
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


class ControlledAlgorithm(NamedTuple):
    """As the algorithm that is controlled; infos are the inner algorithm's."""

    init: Callable[[Key, Params, Params], ControlledState]
    step: Callable[[Key, ControlledState, Batch, Params], tuple[ControlledState, Any]]
    propose: Callable[[Key, ControlledState, Batch, Params], Any]
    update: Callable[[Key, ControlledState, Any, Params], tuple[ControlledState, Any]]


def ramp(target: float | jax.Array, *, steps: int, begin: int = 0, start: float = 0.1) -> optax.Schedule:
    """Returns the schedule that rises from `start * target` at step `begin` to the target at `steps`, in a straight line.

    A policy that has just begun is far below any target; asking for the whole of it at once would only wind beta down.
    Before `begin` it is NaN, which leaves beta alone: for policies that wait until their reward has seen some labels.
    """

    def at(step):
        share = jnp.clip((step - begin) / max(1, steps - begin), 0.0, 1.0)
        return jnp.where(step < begin, jnp.nan, target * (start + (1.0 - start) * share))

    return at


def target_kl(
    make: Callable[[Any], Any],
    *,
    target: float | optax.Schedule,
    beta: float | jax.Array,
    gain: float = 0.05,
    proportional: float = 1.0,
    measure: Callable[[Key, Any, Any, Params], jax.Array] | None = None,
) -> ControlledAlgorithm:
    """Returns the algorithm with beta moved towards a KL.

    Args:
        make: `beta [] -> ` an algorithm: `BilevelAlgorithm`, `PolicyAlgorithm`, or one's own with a `step` in its state
            and a `kl` in its info.
        target: KL to the reference in nats, positive, or a schedule of it; NaN leaves beta as it is.
        beta: the first.
        gain: of the integral: its largest change a step.
        proportional: how beta answers at once: 1 makes it twice as large at twice the target.
        measure: `(key, state, labelled, frozen) -> KL []`, in place of the info's, from the inner state after the update;
            for methods whose samples are not the policy's, which their weights make useless.

    Raises:
        ValueError: a number is not positive (`proportional` may be 0).
    """
    schedule = target if callable(target) else lambda step: jnp.asarray(target)
    for name, value in {"target": target, "beta": beta, "gain": gain}.items():
        if not callable(value) and not isinstance(value, jax.core.Tracer) and not value > 0:
            raise ValueError(f"{name} must be positive, got {value:g}.")
    if not proportional >= 0:
        raise ValueError(f"proportional must not be negative, got {proportional:g}.")

    def at(state):
        return make(jnp.exp(state.log_beta))

    def init(key, upper, lower):
        # As strong float32 as everything else, so that the step is traced once.
        log_beta = jnp.log(jnp.asarray(beta, jnp.result_type(float)))
        # Two buffers, so that the state may be donated.
        inner = make(beta).init(key, upper, lower)
        return ControlledState(inner, log_beta, jnp.array(log_beta, copy=True), jnp.ones_like(log_beta))

    def follow(key, state, inner, labelled, frozen, info):
        divergence = info.kl if measure is None else measure(key, inner, labelled, frozen)
        # An estimate of a small KL may be negative; that is far below any target.
        wanted = state.scale * schedule(inner.step)
        error = jnp.clip(jnp.log(jnp.maximum(divergence, 1e-6) / wanted), -1.0, 1.0)
        error = jnp.where(jnp.isnan(wanted), 0.0, error).astype(state.integral.dtype)
        integral = state.integral + gain * error
        return ControlledState(inner, integral, integral + proportional * error, state.scale)

    def propose(key, state, data, frozen):
        return at(state).propose(key, state.inner, data, frozen)

    def update(key, state, labelled, frozen):
        update_key, measure_key = jax.random.split(key)
        inner, info = at(state).update(update_key, state.inner, labelled, frozen)
        return follow(measure_key, state, inner, labelled, frozen, info), info

    def step(key, state, data, frozen):
        step_key, measure_key = jax.random.split(key)
        if measure is not None:
            raise ValueError("A KL that is measured apart needs propose and update.")
        inner, info = at(state).step(step_key, state.inner, data, frozen)
        return follow(measure_key, state, inner, None, frozen, info), info

    return ControlledAlgorithm(init, step, propose, update)
