"""The penalty gradient over a finite-difference stencil: the method of arXiv 2410.15610, at any order."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxrlhf.base import importance
from jaxrlhf.base.problem import Sample
from jaxrlhf.base.types import Params
from jaxrlhf.bilevel.rules.rule import HypergradientRule, Losses, RuleInputs, Weights, centred
from jaxrlhf.bilevel.sampling import Sampling, check_sampling
from jaxrlhf.bilevel.schedules import Balanced, SigmaSchedule, as_schedule
from jaxrlhf.bilevel.stencil import CENTRAL, FIVE_POINT, FORWARD, Stencil


def penalty(
    stencil: Stencil, relative_sigma: float | SigmaSchedule | Balanced, *, sampling: Sampling = "shared"
) -> HypergradientRule:
    """Returns the penalty gradient over a stencil, `sum_i c_i grad_phi [s_i G - J](phi, lambda_i)`.

    For `FORWARD` it is grad G(lambda_sigma) + [grad J(lambda_0) - grad J(lambda_sigma)] / sigma of arXiv 2410.15610.
    Its error is O(sigma^order). With a shared sample, differences of weights are taken through expm1 of log-ratio
    differences, which stays exact where the weights themselves agree to the last digit, and the variance does not depend
    on sigma. With a sample per tilt, as in the paper, it grows like sigma^-2 (independent) or sigma^-1 (common).

    Args:
        stencil: the tilts and their coefficients.
        relative_sigma: sigma / beta, or a schedule of it, or `Balanced`; positive. It is a Taylor step in the tilt, so
            its useful range does not depend on beta: for costs of order 1 the relative error is about 0.1 relative_sigma
            forward, 0.03 relative_sigma^2 central.
        sampling: who draws the pairs, see `jaxrlhf.bilevel.sampling`. Departure from the paper: shared by default.

    Raises:
        ValueError: relative_sigma is not positive, or the sampling is unknown.
    """
    check_sampling(sampling)
    return HypergradientRule(
        name="a stencil",
        stencil=stencil,
        relative_sigma=as_schedule(relative_sigma),
        weights=lambda inputs: stencil_weights(stencil, inputs),
        surrogate=lambda losses, lowers, sigma: penalty_loss(stencil, losses, lowers, sigma),
        sampling=sampling,
    )


def forward(
    relative_sigma: float | SigmaSchedule | Balanced = 0.05, *, sampling: Sampling = "shared"
) -> HypergradientRule:
    """Returns the paper's rule: two policies, error O(sigma). See `penalty`."""
    return penalty(FORWARD, relative_sigma, sampling=sampling)


def central(
    relative_sigma: float | SigmaSchedule | Balanced = 0.2, *, sampling: Sampling = "shared"
) -> HypergradientRule:
    """Returns the default rule: three policies, error O(sigma^2). See `penalty`.

    Examples:
        >>> from jaxrlhf import bilevel
        >>> bilevel.central(relative_sigma=0.2).stencil.offsets  # the policies: deployed, and tilted by +sigma and -sigma
        (0.0, 1.0, -1.0)
    """
    return penalty(CENTRAL, relative_sigma, sampling=sampling)


def five_point(
    relative_sigma: float | SigmaSchedule | Balanced = 0.4, *, sampling: Sampling = "shared"
) -> HypergradientRule:
    """Returns the fourth-order rule: five policies, error O(sigma^4). See `penalty`."""
    return penalty(FIVE_POINT, relative_sigma, sampling=sampling)


def stencil_weights(stencil: Stencil, inputs: RuleInputs) -> Weights:
    """Returns the weights on a shared sample.

    `sum_i c_i s_i w_i(y0) w_i(y1)` `[B, M]` for the cost; `- p_k sum_i c_i w_i` `[B, M, 2, T]`, centred, for the reward,
    with p_k the slot weight.
    """
    log_weights = inputs.log_weights
    pair_weights = jnp.exp(importance.pair_log_weights(log_weights))
    products, scale = _coefficients(stencil, pair_weights.dtype, inputs.sigma)
    coupled = jnp.tensordot(products, pair_weights, axes=1)
    # The coefficients sum to 0, so sum_i c_i w_i = w_0 sum_i c_i (w_i / w_0 - 1).
    excess = jnp.expm1(log_weights - log_weights[:1])
    reward = -jnp.exp(log_weights[0]) * jnp.tensordot(scale, excess, axes=1)
    return Weights(coupled, centred(reward, inputs.sample))


def term_weights(
    stencil: Stencil, index: jax.Array, log_weights: jax.Array, sample: Sample, sigma: jax.Array
) -> Weights:
    """Returns the weights of one tilt's term on that tilt's own sample: `c_i s_i w_i(y0) w_i(y1)` and `- p_k c_i w_i`.

    The other terms come from other samples, so there is nothing to subtract from the reward's weights.

    Args:
        stencil: the stencil.
        index: `[]`, the tilt's place in it.
        log_weights: `[B, M, 2, T]`, of this tilt's iterate.
        sample: its sample.
        sigma: `[]`.
    """
    pair_weights = jnp.exp(importance.pair_log_weights(log_weights))
    products, scale = _coefficients(stencil, pair_weights.dtype, sigma)
    reward = -scale[index] * jnp.exp(log_weights)
    return Weights(products[index] * pair_weights, importance.policy_slot_weights(sample) * reward)


def penalty_loss(stencil: Stencil, losses: Losses, lowers: Params, sigma: jax.Array) -> Callable[[Params], jax.Array]:
    """Returns `upper -> sum_i c_i [s_i G - J](upper, lambda_i)`, whose gradient is the penalty gradient of two losses."""

    def loss(upper: Params) -> jax.Array:
        upper_losses = jax.vmap(lambda lower: losses.upper_loss(upper, lower))(lowers)
        lower_losses = jax.vmap(lambda lower: losses.lower_loss(upper, lower))(lowers)
        products, _ = _coefficients(stencil, upper_losses.dtype, sigma)
        _, scale = _coefficients(stencil, lower_losses.dtype, sigma)
        return products @ upper_losses + scale @ lower_losses

    return loss


def _coefficients(stencil: Stencil, dtype: jnp.dtype, sigma: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns `c_i s_i` `[S]`, in which sigma cancels, and `c_i` `[S]`."""
    offsets, coefficients = jnp.asarray(stencil.offsets), jnp.asarray(stencil.coefficients)
    return (coefficients * offsets).astype(dtype), coefficients.astype(dtype) / sigma.astype(dtype)
