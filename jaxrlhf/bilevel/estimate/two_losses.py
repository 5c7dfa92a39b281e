"""The hypergradient of a problem without samples, given as two losses."""

import jax
import jax.numpy as jnp
import optax

from jaxrlhf.base.types import Params
from jaxrlhf.bilevel.estimate.interface import Levels
from jaxrlhf.bilevel.estimate.report import Report, fraction, smallest_gap
from jaxrlhf.bilevel.iterates import first, map_iterates
from jaxrlhf.bilevel.rules.rule import HypergradientRule, Losses


def on_two_losses(losses: Losses, rule: HypergradientRule, upper: Params, tilts: jax.Array) -> Levels:
    """Returns both levels of two losses."""
    return Levels(
        tilted_loss=lambda lower, index: (
            tilts[index] * losses.upper_loss(upper, lower) + losses.lower_loss(upper, lower)
        ),
        shared=None,
        hypergradient=lambda lowers, sigma: _hypergradient(losses, rule, upper, lowers, sigma),
    )


def _hypergradient(
    losses: Losses, rule: HypergradientRule, upper: Params, lowers: Params, sigma: jax.Array
) -> tuple[Params, Report]:
    policy = first(lowers)
    gradient = jax.grad(rule.surrogate(losses, lowers, sigma))(upper)
    fixed_policy = jax.grad(losses.upper_loss)(upper, policy)
    coupling = optax.tree.norm(optax.tree.sub(gradient, fixed_policy))
    report = losses_report(
        losses.upper_loss(upper, policy),
        value_gap=smallest_gap(-map_iterates(lambda lower: losses.lower_loss(upper, lower))(lowers)),
        coupling_fraction=fraction(coupling, optax.tree.norm(fixed_policy)),
    )
    return gradient, report


def losses_report(upper_loss: jax.Array, *, value_gap: jax.Array, coupling_fraction: jax.Array) -> Report:
    """Returns the report of two losses: fields that need a policy are NaN; there is no sample to lose and no label."""
    unknown = jnp.full((), jnp.nan)
    return Report(
        upper_loss=upper_loss,
        value_gap=value_gap,
        coupling_fraction=coupling_fraction,
        ess_fraction=jnp.ones(()),
        kl=unknown,
        entropy=unknown,
        collision_rate=unknown,
        labels=jnp.zeros((), jnp.int32),
        coupled_slope=unknown,
        kl_slope=unknown,
    )
