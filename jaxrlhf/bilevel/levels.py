"""The two levels on one batch: what the inner problem minimises, and the hypergradient at the policies it reached."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxrlhf.bilevel import importance
from jaxrlhf.bilevel.hypergradient import Evidence, HypergradientRule
from jaxrlhf.bilevel.problem import BilevelProblem, Labelled
from jaxrlhf.types import Params


class Levels(NamedTuple):
    """Both levels at one reward phi and one batch; lives inside a trace.

    Attributes:
        tilted_loss: `(lower, tilt) -> []`, h(phi, lower; tilt) = tilt G - J.
        proximal_loss: `(lower, tilt) -> []`, tilt G + beta KL(lower || the policy that sampled), up to a constant; None
            where no policy sampled.
        hypergradient: `(lowers, sigma) -> (gradient, report)`, from iterates stacked `[S, ...]`, tilt 0 first; the report
            holds the fields of `BilevelInfo` that both levels determine.
    """

    tilted_loss: Callable[[Params, jax.Array], jax.Array]
    proximal_loss: Callable[[Params, jax.Array], jax.Array] | None
    hypergradient: Callable[[Params, jax.Array], tuple[Params, dict[str, jax.Array]]]


def over_tilts(function: Callable, *, in_axes: Any = 0) -> Callable:
    """Maps over the stacked iterates: the one place that knows how they are laid out."""
    return jax.vmap(function, in_axes=in_axes)


def sampled_levels(
    problem: BilevelProblem,
    rule: HypergradientRule,
    beta: float,
    upper: Params,
    labelled: Labelled,
    frozen: Params,
) -> Levels:
    """Returns the levels as importance-weighted means over a labelled sample.

    The reward model runs forward once and backward once, whatever the number of tilts and inner steps.
    """
    sample, kl_price = labelled.sample, problem.kl_price
    reward, pull_back = jax.vjp(lambda upper: problem.reward(upper, sample, frozen), upper)
    cost = problem.cost(upper, reward, labelled, frozen)

    # The reward that the sampling policy is optimal for: -J with it in place of R is beta KL(. || that policy).
    implied_reward = beta * (sample.behaviour_log_prob - sample.reference_log_prob)

    def values_of(log_prob, reward=reward):
        return importance.evaluate(log_prob, reward, cost, sample, beta=beta, kl_price=kl_price)

    def tilted_loss(lower, tilt):
        return importance.tilted_loss(values_of(problem.log_prob(lower, sample, frozen)), tilt)

    def proximal_loss(lower, tilt):
        return importance.tilted_loss(values_of(problem.log_prob(lower, sample, frozen), implied_reward), tilt)

    def weighted_cost(reward, upper, pair_weights):
        cost = problem.cost(upper, reward, labelled, frozen)
        return importance.expectation(pair_weights * cost.coupled + cost.uncoupled, sample)

    def hypergradient(lowers, sigma):
        log_probs = over_tilts(lambda lower: problem.log_prob(lower, sample, frozen))(lowers)
        log_weights = over_tilts(lambda log_prob: importance.step_log_weights(log_prob, sample))(log_probs)
        pair_log_weights = importance.pair_log_weights(log_weights)
        by_policy = sample.by_policy[None, None, :, None] > 0
        log_ratio = jnp.where(by_policy, log_probs[0] - sample.reference_log_prob, 0.0)
        weights = rule.weights(Evidence(sample, log_weights, log_ratio, cost.coupled, sigma, beta, kl_price))

        # The gradient at the reward model's outputs, with and without the policy's answer.
        through_cost, direct = jax.grad(weighted_cost, argnums=(0, 1))(reward, upper, weights.coupled)
        whole = through_cost + sample.measure[:, :, None, None] * sample.discount * weights.reward
        rest = jax.grad(weighted_cost)(reward, upper, jnp.exp(pair_log_weights[0]))
        gradient = jax.tree.map(jnp.add, pull_back(whole)[0], direct)

        values = over_tilts(values_of)(log_probs)
        report = {
            "upper_loss": values.upper[0] + importance.expectation(cost.uncoupled, sample),
            "value_gap": _smallest_gap(values.lower),
            "coupling_share": _share(jnp.linalg.norm(whole - rest), jnp.linalg.norm(rest)),
            "effective_sample_size": jnp.min(
                over_tilts(lambda logs: importance.effective_share(logs, sample))(pair_log_weights)
            ),
            "kl": values.kl[0],
            "entropy": importance.entropy(log_probs[0], sample),
            "collision_rate": importance.expectation(_coincide(sample.responses), sample),
            "labels": jnp.where(jnp.isfinite(sample.draws), labelled.labels.size, 0),
        }
        return gradient, report

    return Levels(tilted_loss, proximal_loss, hypergradient)


def loss_levels(
    upper_loss: Callable[[Params, Params, Any, Params], jax.Array],
    lower_loss: Callable[[Params, Params, Any, Params], jax.Array],
    rule: HypergradientRule,
    upper: Params,
    data: Any,
    frozen: Params,
) -> Levels:
    """Returns the levels of a problem without samples, given as `(upper, lower, data, frozen) -> []` losses.

    `lower_loss` is - J. Fields of the report that need a policy are nan; there is no sample to lose and no label.
    """
    coefficients, offsets = jnp.asarray(rule.stencil.coefficients), jnp.asarray(rule.stencil.offsets)

    def tilted_loss(lower, tilt):
        return tilt * upper_loss(upper, lower, data, frozen) + lower_loss(upper, lower, data, frozen)

    def hypergradient(lowers, sigma):
        def gradients(lower):
            return jax.grad(upper_loss)(upper, lower, data, frozen), jax.grad(lower_loss)(upper, lower, data, frozen)

        of_upper, of_lower = over_tilts(gradients)(lowers)
        whole = jax.tree.map(
            lambda upper, lower: (
                jnp.tensordot((coefficients * offsets).astype(upper.dtype), upper, axes=1)
                + jnp.tensordot(coefficients.astype(lower.dtype) / sigma, lower, axes=1)
            ),
            of_upper,
            of_lower,
        )
        rest = jax.tree.map(lambda leaf: leaf[0], of_upper)
        coupling = optax.tree.norm(jax.tree.map(jnp.subtract, whole, rest))
        values = -over_tilts(lambda lower: lower_loss(upper, lower, data, frozen))(lowers)
        unknown = jnp.full((), jnp.nan)
        report = {
            "upper_loss": upper_loss(upper, jax.tree.map(lambda leaf: leaf[0], lowers), data, frozen),
            "value_gap": _smallest_gap(values),
            "coupling_share": _share(coupling, optax.tree.norm(rest)),
            "effective_sample_size": jnp.ones(()),
            "kl": unknown,
            "entropy": unknown,
            "collision_rate": unknown,
            "labels": jnp.zeros((), jnp.int32),
        }
        return whole, report

    return Levels(tilted_loss, None, hypergradient)


def _smallest_gap(values: jax.Array) -> jax.Array:
    return jnp.min(values[0] - values[1:]) if values.shape[0] > 1 else jnp.zeros_like(values[0])


def _share(part: jax.Array, rest: jax.Array) -> jax.Array:
    return part / jnp.maximum(part + rest, jnp.finfo(part.dtype).tiny)


def _coincide(responses: Any) -> jax.Array:
    """Returns `[B, M]`, 1 where both responses of the pair are equal in every array."""

    def same(leaf):
        equal = leaf[:, :, 0] == leaf[:, :, 1]
        return jnp.all(equal.reshape(*equal.shape[:2], -1), axis=-1)

    return jnp.all(jnp.stack([same(leaf) for leaf in jax.tree.leaves(responses)]), axis=0).astype(float)
