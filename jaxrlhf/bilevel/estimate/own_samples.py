"""The penalty gradient from a sample for each tilt, drawn from its own iterate, as arXiv 2410.15610 has it.

Each sample gives the stencil's term of its own tilt. The reward model runs forward and backward once for each tilt.
"""

import jax
import jax.numpy as jnp
import optax

from jaxrlhf.base import importance
from jaxrlhf.base.problem import Labelled
from jaxrlhf.base.types import Params
from jaxrlhf.bilevel.estimate.interface import Levels, Setting
from jaxrlhf.bilevel.estimate.objectives import SampledObjectives, output_cotangent, policy_weights
from jaxrlhf.bilevel.estimate.report import Report, fraction, sampled_report, smallest_gap
from jaxrlhf.bilevel.iterates import at, first, map_iterates
from jaxrlhf.bilevel.rules.penalty import term_weights


def on_own_samples(setting: Setting, upper: Params, tilts: jax.Array, labelled: Labelled, frozen: Params) -> Levels:
    """Returns both levels, each iterate's on its own labelled sample; `labelled` has leaves `[S, ...]`."""
    objectives = all_objectives(setting, upper, labelled, frozen)
    return Levels(
        tilted_loss=lambda lower, index: objectives_at(objectives, index).tilted_loss(lower, tilts[index]),
        shared=None,
        hypergradient=lambda lowers, sigma: _hypergradient(setting, objectives, upper, lowers, sigma),
    )


def all_objectives(setting: Setting, upper: Params, labelled: Labelled, frozen: Params) -> SampledObjectives:
    """Returns the objectives on all samples: `labelled`, `reward` and `cost` have leaves `[S, ...]`."""
    problem = setting.problem

    def rewards_and_costs(index):
        own = at(labelled, index)
        reward = problem.reward(upper, own.sample, frozen)
        return reward, problem.cost(upper, reward, own, frozen)

    indices = jnp.arange(len(setting.rule.stencil.offsets))
    reward, cost = map_iterates(rewards_and_costs, sequential=setting.sequential)(indices)
    return SampledObjectives(problem, setting.beta, setting.max_importance_weight, labelled, frozen, reward, cost)


def objectives_at(objectives: SampledObjectives, index: int | jax.Array) -> SampledObjectives:
    """Returns the objectives on one tilt's sample."""
    return objectives._replace(
        labelled=at(objectives.labelled, index), reward=objectives.reward[index], cost=at(objectives.cost, index)
    )


def _hypergradient(
    setting: Setting, objectives: SampledObjectives, upper: Params, lowers: Params, sigma: jax.Array
) -> tuple[Params, Report]:
    """Returns grad Phi as the sum of the stencil's terms, each from its own sample, and the report."""
    stencil = setting.rule.stencil
    indices = jnp.arange(len(stencil.offsets))

    def log_prob_of(lower, index):
        return objectives_at(objectives, index).log_prob(lower)

    log_probs = map_iterates(log_prob_of, sequential=setting.sequential)(lowers, indices)
    log_weights = map_iterates(lambda log_prob, index: objectives_at(objectives, index).log_weights(log_prob))(
        log_probs, indices
    )

    def term(index, log_weights):
        own = objectives_at(objectives, index)
        weights = term_weights(stencil, index, log_weights, own.labelled.sample, sigma)
        # The uncoupled cost is fitted on tilt 0's pairs, as with a shared sample.
        return _pulled_back(own, upper, weights.coupled, weights.reward, jnp.where(index == 0, 1.0, 0.0))

    all_terms = map_iterates(term, sequential=setting.sequential)(indices, log_weights)
    gradient = jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), all_terms)
    fixed_policy = _pulled_back(objectives_at(objectives, 0), upper, policy_weights(log_weights))

    values = map_iterates(lambda log_prob, index: objectives_at(objectives, index).values(log_prob))(log_probs, indices)
    report = sampled_report(
        objectives_at(objectives, 0),
        objectives.labelled,
        log_probs[0],
        first(values),
        value_gap=smallest_gap(values.lower),
        coupling_fraction=fraction(
            optax.tree.norm(optax.tree.sub(gradient, fixed_policy)), optax.tree.norm(fixed_policy)
        ),
        ess_fractions=map_iterates(_ess_fraction)(log_weights, objectives.labelled),
    )
    return gradient, report


def _pulled_back(
    objectives: SampledObjectives,
    upper: Params,
    pair_weights: jax.Array,
    reward_weights: jax.Array | float = 0.0,
    uncoupled_weight: jax.Array | float = 1.0,
) -> Params:
    """Returns the weighted objective's gradient in the reward parameters; the weights are those of `output_cotangent`."""
    cotangent, direct = output_cotangent(objectives, upper, pair_weights, reward_weights, uncoupled_weight)
    # The output cotangent is known; only a parameter VJP is needed.
    _, reward_vjp = jax.vjp(
        lambda upper: objectives.problem.reward(upper, objectives.labelled.sample, objectives.frozen), upper
    )
    return jax.tree.map(jnp.add, reward_vjp(cotangent)[0], direct)


def _ess_fraction(log_weights: jax.Array, labelled: Labelled) -> jax.Array:
    return importance.ess_fraction(importance.pair_log_weights(log_weights), labelled.sample)
