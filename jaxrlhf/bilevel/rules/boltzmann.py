"""The closed form for a KL-regularised lower level: no second policy and no sigma."""

import jax.numpy as jnp

from jaxrlhf.base import importance
from jaxrlhf.bilevel.rules.rule import HypergradientRule, RuleInputs, Weights
from jaxrlhf.bilevel.schedules import as_schedule
from jaxrlhf.bilevel.stencil import ALONE


def boltzmann() -> HypergradientRule:
    """Returns the rule for a lower level solved by pi proportional to reference * exp(R / beta).

    Then d pi(y) / d phi = pi(y) (grad R(y) - E grad R) / beta and

        grad Phi = E[grad_phi cost] + (1 / beta) Cov_pi(dG/dpi, grad_phi R).

    A pair contributes its cost to dG/dpi at each of its policy responses, which is right for costs that are not
    symmetric too (an annotator that favours a position); a KL price contributes kappa log(pi / reference). Exact at
    the optimal policy, biased in proportion to the inner error otherwise. On a Markov decision process with per-step
    weights the same formula holds with the return from a step onwards in place of the cost; this rule is the one-step
    form and refuses T > 1.

    Raises:
        ValueError: at trace time, when responses have more than one step, or when prompts have a single pair (nothing
            to compare its cost with; where draws are counted, a single draw gives no coupling).
    """
    return HypergradientRule("boltzmann", ALONE, as_schedule(1.0), _weights, applies_to=("policies",))


def _weights(inputs: RuleInputs) -> Weights:
    sample, cost = inputs.sample, inputs.coupled_cost
    if inputs.log_weights.shape[-1] != 1:
        raise ValueError("boltzmann needs one-step responses (T = 1); use a stencil on longer trajectories.")
    if cost.shape[1] < 2:
        raise ValueError("boltzmann needs at least 2 pairs a prompt, to compare a pair's cost with its prompt's.")
    joint = jnp.exp(importance.pair_log_weights(inputs.log_weights[0]))
    single = jnp.exp(inputs.log_weights[0])
    through_cost = joint * (cost - importance.others_mean(joint * cost, sample))
    log_ratio = inputs.log_ratio
    through_price = single * (log_ratio - importance.others_mean_responses(single * log_ratio, sample))
    reward = (
        sample.from_policy[None, None, :, None] * through_cost[:, :, None, None]
        + inputs.kl_price * importance.policy_slot_weights(sample) * through_price
    )
    # Here the baseline is part of the formula: a single draw has none, and no covariance can be estimated from it.
    return Weights(joint, jnp.where(sample.num_draws > 1, reward, 0.0) / inputs.beta)
