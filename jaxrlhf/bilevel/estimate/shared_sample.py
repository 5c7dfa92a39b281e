"""The hypergradient from one sample that tilt 0 drew and every iterate shares, through importance weights.

Whatever the number of tilts and inner steps, the reward model runs forward once and backward once. Each iterate runs
forward once here, for its importance weights; a rule that differentiates the policy (`implicit`) runs it again.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxrlhf.base import importance
from jaxrlhf.base.problem import Labelled
from jaxrlhf.base.types import Params
from jaxrlhf.bilevel.estimate.interface import Levels, Setting
from jaxrlhf.bilevel.estimate.objectives import SampledObjectives, output_cotangent, policy_weights
from jaxrlhf.bilevel.estimate.report import Report, fraction, sampled_report, smallest_gap
from jaxrlhf.bilevel.iterates import first, map_iterates
from jaxrlhf.bilevel.rules.rule import PolicyFunctions, RuleInputs, Weights


def on_shared_sample(setting: Setting, upper: Params, tilts: jax.Array, labelled: Labelled, frozen: Params) -> Levels:
    """Returns both levels as importance-weighted means over one labelled sample."""
    problem = setting.problem
    reward, reward_vjp = jax.vjp(lambda upper: problem.reward(upper, labelled.sample, frozen), upper)
    cost = problem.cost(upper, reward, labelled, frozen)
    objectives = SampledObjectives(problem, setting.beta, setting.max_importance_weight, labelled, frozen, reward, cost)
    return Levels(
        tilted_loss=lambda lower, index: objectives.tilted_loss(lower, tilts[index]),
        shared=objectives,
        hypergradient=lambda lowers, sigma: _hypergradient(setting, objectives, reward_vjp, upper, lowers, sigma),
    )


def _hypergradient(
    setting: Setting,
    objectives: SampledObjectives,
    reward_vjp: Callable,
    upper: Params,
    lowers: Params,
    sigma: jax.Array,
) -> tuple[Params, Report]:
    """Returns grad Phi from the iterates that the solver reached, and the report.

    log pi_i -> importance weights `[S, B, M, 2, T]` -> the rule's weights -> cotangent of the reward outputs
    `[B, M, 2, T]` -> one VJP.
    """
    sample = objectives.labelled.sample
    log_probs = map_iterates(objectives.log_prob, sequential=setting.sequential)(lowers)
    log_weights = map_iterates(objectives.log_weights)(log_probs)
    weights = rule_weights(setting, objectives, first(lowers), log_probs[0], log_weights, sigma)

    cotangent, direct = output_cotangent(objectives, upper, weights.coupled, weights.reward)
    fixed_policy, _ = output_cotangent(objectives, upper, policy_weights(log_weights))
    gradient = jax.tree.map(jnp.add, reward_vjp(cotangent)[0], direct)

    values = map_iterates(objectives.values)(log_probs)
    ess = map_iterates(lambda logs: importance.ess_fraction(importance.pair_log_weights(logs), sample))(log_weights)
    report = sampled_report(
        objectives,
        objectives.labelled,
        log_probs[0],
        first(values),
        value_gap=smallest_gap(values.lower),
        coupling_fraction=fraction(jnp.linalg.norm(cotangent - fixed_policy), jnp.linalg.norm(fixed_policy)),
        ess_fractions=ess,
    )
    return gradient, report


def rule_weights(
    setting: Setting,
    objectives: SampledObjectives,
    policy: Params,
    log_prob: jax.Array,
    log_weights: jax.Array,
    sigma: jax.Array,
) -> Weights:
    """Returns the rule's weights of a shared sample.

    Args:
        setting: of the rule.
        objectives: of the sample.
        policy: parameters of the policy at tilt 0.
        log_prob: `[B, M, 2, T]`, its log-probabilities.
        log_weights: `[S, B, M, 2, T]`, of all iterates.
        sigma: `[]`.
    """
    rule, sample = setting.rule, objectives.labelled.sample
    inputs = RuleInputs(
        sample=sample,
        log_weights=log_weights,
        log_ratio=importance.policy_log_ratio(log_prob, sample),
        coupled_cost=objectives.cost.coupled,
        sigma=sigma,
        beta=setting.beta,
        kl_price=setting.problem.kl_price,
    )
    if not rule.differentiates_policy:
        return rule.weights(inputs)
    functions = PolicyFunctions(
        policy,
        values=lambda lower: objectives.values(objectives.log_prob(lower)),
        log_weights=lambda lower: objectives.log_weights(objectives.log_prob(lower)),
    )
    return rule.weights(inputs, functions)
