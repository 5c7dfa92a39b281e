"""What can be checked before the first step: each refusal names the value and the remedy."""

import jax
import jax.core
import jax.numpy as jnp

from jaxrlhf.base.problem import BilevelProblem
from jaxrlhf.base.types import Params
from jaxrlhf.bilevel.rules.rule import HypergradientRule
from jaxrlhf.bilevel.schedules import Balanced


def check_problem(problem: BilevelProblem, beta: float | jax.Array, max_importance_weight: float | None) -> None:
    """Checks what can be checked; traced values, a controller's, cannot.

    Raises:
        ValueError: beta is not positive, the KL price is negative, or max_importance_weight is below 1.
    """
    check_beta(beta)
    if not isinstance(problem.kl_price, jax.core.Tracer) and problem.kl_price < 0:
        raise ValueError(f"The KL price must not be negative, got {problem.kl_price:g}.")
    if max_importance_weight is not None and not max_importance_weight >= 1:
        raise ValueError(
            f"max_importance_weight must be at least 1, got {max_importance_weight:g}: 1 is the weight on policy."
        )


def check_beta(beta: float | jax.Array) -> None:
    """Raises ValueError unless beta is positive; a traced one cannot be checked."""
    if not isinstance(beta, jax.core.Tracer) and not beta > 0:
        raise ValueError(f"beta must be positive, got {beta:g}: it keeps the policy near the reference.")


def check_reach(kl_price: float | jax.Array, rule: HypergradientRule) -> None:
    """Raises ValueError where some tilted problem has no minimiser, -s kappa >= beta; schedules are checked at step 0."""
    if isinstance(kl_price, jax.core.Tracer):
        return
    schedule = rule.relative_sigma
    with jax.ensure_compile_time_eval():
        relative_sigma = float(
            schedule.largest if isinstance(schedule, Balanced) else schedule(jnp.zeros((), jnp.int32))
        )
    reach = max(-offset for offset in rule.stencil.offsets) * relative_sigma
    if reach * kl_price >= 1:
        raise ValueError(
            f"relative_sigma {relative_sigma:g} is too large for an objective with KL price {kl_price:g}: a tilted "
            f"policy would be paid for leaving the reference. Keep it below {relative_sigma / (reach * kl_price):g}."
        )


def check_precision(lower: Params) -> None:
    """Raises ValueError for policy parameters in half precision."""
    for leaf in jax.tree.leaves(lower):
        dtype = jnp.asarray(leaf).dtype
        if jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32:
            raise ValueError(
                f"The policy's parameters are {dtype}, in which a tilt rounds to nothing; keep them in float32 and cast "
                "inside log_prob."
            )
