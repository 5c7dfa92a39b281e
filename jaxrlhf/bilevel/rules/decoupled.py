"""Iterated RLHF as a rule: the gradient with every policy held fixed."""

import jax
import jax.numpy as jnp

from jaxrlhf.base import importance
from jaxrlhf.base.types import Params
from jaxrlhf.bilevel.iterates import first
from jaxrlhf.bilevel.rules.rule import HypergradientRule, Losses, RuleInputs, Weights
from jaxrlhf.bilevel.schedules import as_schedule
from jaxrlhf.bilevel.stencil import ALONE


def decoupled() -> HypergradientRule:
    """Returns the rule of iterated RLHF: grad_phi G with the policy held fixed, the coupling ignored."""
    return HypergradientRule("decoupled", ALONE, as_schedule(1.0), _weights, _surrogate)


def _weights(inputs: RuleInputs) -> Weights:
    coupled = jnp.exp(importance.pair_log_weights(inputs.log_weights[0]))
    return Weights(coupled, jnp.zeros_like(inputs.log_weights[0]))


def _surrogate(losses: Losses, lowers: Params, sigma: jax.Array):
    del sigma
    return lambda upper: losses.upper_loss(upper, first(lowers))
