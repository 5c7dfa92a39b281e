"""The diagnostics that both levels determine, whatever the sample; `BilevelInfo` adds the solver's and the optimiser's."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxrlhf.base import importance
from jaxrlhf.bilevel.estimate.objectives import SampledObjectives


class Report(NamedTuple):
    """See `BilevelInfo` for the fields; all scalars."""

    upper_loss: jax.Array
    value_gap: jax.Array
    coupling_fraction: jax.Array
    ess_fraction: jax.Array
    kl: jax.Array
    entropy: jax.Array
    collision_rate: jax.Array
    labels: jax.Array
    coupled_slope: jax.Array
    kl_slope: jax.Array


def sampled_report(
    objectives: SampledObjectives,
    labelled: Any,
    log_prob: jax.Array,
    values: importance.Values,
    *,
    value_gap: jax.Array,
    coupling_fraction: jax.Array,
    ess_fractions: jax.Array,
) -> Report:
    """Returns the report of a problem with samples.

    Args:
        objectives: of tilt 0's sample.
        labelled: all labelled samples of the step, whose labels are counted.
        log_prob: `[B, M, 2, T]`, of the policy at tilt 0.
        values: at tilt 0.
        value_gap, coupling_fraction: `[]`.
        ess_fractions: `[S]`, of the iterates.
    """
    sample = objectives.labelled.sample
    slopes = objectives.tempering_slopes(log_prob)
    return Report(
        upper_loss=values.upper + importance.expectation(objectives.cost.uncoupled, sample),
        value_gap=value_gap,
        coupling_fraction=coupling_fraction,
        ess_fraction=jnp.min(ess_fractions),
        kl=values.kl,
        entropy=importance.entropy(log_prob, sample),
        collision_rate=importance.expectation(_coincide(sample.responses), sample),
        labels=importance.count_labels(labelled),
        coupled_slope=slopes.coupled,
        kl_slope=slopes.kl,
    )


def smallest_gap(values: jax.Array) -> jax.Array:
    """Returns the smallest J(lambda_0) - J(lambda_i) of `values` `[S]`; 0 where there is one iterate."""
    return jnp.min(values[0] - values[1:]) if values.shape[0] > 1 else jnp.zeros_like(values[0])


def fraction(part: jax.Array, remainder: jax.Array) -> jax.Array:
    """Returns `part / (part + remainder)` of two norms, 0 where both vanish."""
    return part / jnp.maximum(part + remainder, jnp.finfo(part.dtype).tiny)


def _coincide(responses: Any) -> jax.Array:
    """Returns `[B, M]`, 1 where both responses of the pair are equal in every array."""

    def same(leaf):
        equal = leaf[:, :, 0] == leaf[:, :, 1]
        return jnp.all(equal.reshape(*equal.shape[:2], -1), axis=-1)

    return jnp.all(jnp.stack([same(leaf) for leaf in jax.tree.leaves(responses)]), axis=0).astype(float)
