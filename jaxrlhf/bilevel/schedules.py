"""Schedules for sigma, as functions of the outer step.

Any `step -> value` works, optax schedules included; these are the shapes that the theory asks for. All values are
`relative_sigma = sigma / beta`, without unit.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

SigmaSchedule = Callable[[jax.Array], jax.Array]

SMALLEST = 1e-8
"""A schedule that reaches 0 stops here: the stencil divides by sigma."""


def as_schedule(relative_sigma: float | SigmaSchedule) -> SigmaSchedule:
    """Returns a schedule; a number becomes a constant one, and no value falls below `SMALLEST`.

    Raises:
        ValueError: a number, or the schedule's first value, is not positive.
    """
    schedule = relative_sigma if callable(relative_sigma) else optax.constant_schedule(float(relative_sigma))
    with jax.ensure_compile_time_eval():
        first = jnp.asarray(schedule(jnp.zeros((), jnp.int32))).item()
    if not first > 0:
        raise ValueError(f"relative_sigma must be positive, got {first:g}: it is the size of the perturbation.")
    return lambda step: jnp.maximum(schedule(step), SMALLEST)


def polynomial_decay(initial: float, *, power: float, offset: float = 1.0, floor: float = 0.0) -> SigmaSchedule:
    """Returns `max(floor, initial (1 + step / offset)^(-power))`.

    The decreasing perturbation of single-loop analyses (arXiv 2309.01753). A floor keeps sigma above
    the level at which inner error dominates; see `BilevelInfo.residual_over_sigma`.

    Raises:
        ValueError: power is negative or offset is not positive.
    """
    if power < 0 or not offset > 0:
        raise ValueError(f"polynomial_decay needs power >= 0 and offset > 0, got {power:g} and {offset:g}.")

    def schedule(step):
        return jnp.maximum(floor, initial * (1.0 + step / offset) ** (-power))

    return schedule
