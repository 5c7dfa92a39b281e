"""Schedules for sigma: as functions of the outer step, by the theorem, or by the measured inner error.

Any `step -> value` works, optax schedules included; these are the ones that the theory asks for. All values are
`relative_sigma = sigma / beta`; the useful sizes that are named here are for costs of order 1.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

SigmaSchedule = Callable[[jax.Array], jax.Array]

SMALLEST = 1e-8
"""The least value of a schedule: the stencil divides by sigma."""


class Balanced(NamedTuple):
    """Chooses relative_sigma from the inner error measured at the previous step.

    A stencil's relative error is about `bias rho^order` from the finite difference and `inner_error / rho` from tilted
    policies that are not solved, with `rho = sigma / beta`. Their sum is least at

        rho = (inner_error / (order bias))^(1 / (order + 1)),   inner_error = max_i |residual_i| / (beta |grad_lambda G|).

    The residual is a gradient norm in the policy's parameters; where some directions are much flatter than others, it
    understates the inner error.

    Attributes:
        order: the stencil's.
        bias: the constant before rho^order: about 0.1 for `forward`, 0.03 for `central`, 0.005 for `five_point`.
        smallest, largest: bounds of what is returned; the largest is used at the first step.
    """

    order: int = 2
    bias: float = 0.03
    smallest: float = 1e-3
    largest: float = 0.5

    def best(self, inner_error: jax.Array) -> jax.Array:
        """Returns relative_sigma for a measured inner error, `[]`."""
        inner_error = jnp.nan_to_num(inner_error, nan=jnp.inf, posinf=jnp.inf)
        balanced = (inner_error / (self.order * self.bias)) ** (1.0 / (self.order + 1))
        return jnp.clip(balanced, self.smallest, self.largest)


class TheoremSchedule(NamedTuple):
    """Outer steps T, inner steps K, pairs a step B, sigma / beta, and the reward's learning rate."""

    outer_steps: int
    inner_steps: int
    batch: int
    relative_sigma: float
    learning_rate: float


def theorem(
    epsilon: float,
    *,
    outer_steps: float = 1.0,
    inner_steps: float = 1.0,
    batch: float = 1.0,
    relative_sigma: float = 1.0,
    learning_rate: float = 1.0,
) -> TheoremSchedule:
    """Returns the settings behind the eps^(-7/2) sample complexity of arXiv 2410.15610, to reach |grad Phi|^2 <= epsilon.

        sigma = c_s eps^(1/2),   T = c_T eps^(-3/2),   B = c_B eps^(-2),   K = c_K log(1 / eps),   rate = c_r eps^(1/2)

    so that T B = O(eps^(-7/2)): sigma pays for the bias of the forward stencil, the penalty's smoothness 1 / sigma sets
    the rate and T, and B holds down the variance 1 / (sigma^2 B) of independent samples. This is a reading of the
    result with the squared-norm criterion, not a quotation: the constants, the arguments here, are the problem's.

    Raises:
        ValueError: epsilon is not in (0, 1).
    """
    if not 0 < epsilon < 1:
        raise ValueError(f"theorem needs epsilon in (0, 1), got {epsilon:g}.")
    return TheoremSchedule(
        outer_steps=math.ceil(outer_steps * epsilon**-1.5),
        inner_steps=math.ceil(max(1.0, inner_steps * math.log(1.0 / epsilon))),
        batch=math.ceil(batch * epsilon**-2),
        relative_sigma=relative_sigma * epsilon**0.5,
        learning_rate=learning_rate * epsilon**0.5,
    )


def as_schedule(relative_sigma: float | SigmaSchedule | Balanced) -> SigmaSchedule | Balanced:
    """Returns a schedule; a number becomes a constant one, and no value falls below `SMALLEST`.

    Raises:
        ValueError: a number, or the schedule's first value, is not positive.
    """
    if isinstance(relative_sigma, Balanced):
        if not 0 < relative_sigma.smallest <= relative_sigma.largest:
            raise ValueError("relative_sigma must be positive: Balanced needs 0 < smallest <= largest.")
        return relative_sigma
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

    Examples:
        >>> from jaxrlhf import bilevel
        >>> schedule = bilevel.polynomial_decay(0.2, power=0.5, floor=0.05)
        >>> [round(float(schedule(step)), 3) for step in (0, 3, 99)]
        [0.2, 0.1, 0.05]
        >>> rule = bilevel.central(schedule)
    """
    if power < 0 or not offset > 0:
        raise ValueError(f"polynomial_decay needs power >= 0 and offset > 0, got {power:g} and {offset:g}.")

    def schedule(step):
        return jnp.maximum(floor, initial * (1.0 + step / offset) ** (-power))

    return schedule
