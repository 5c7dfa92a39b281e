"""The two levels on one batch: what the inner problem minimises, and the hypergradient at the policies it reached.

Each lower iterate has a problem of its own, named by its index in the stencil: a tilt, and for rules that ask for it
its own sample (`sampling`) or its own reward parameters (`zero_order`).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxrlhf.base import importance
from jaxrlhf.base.problem import BilevelProblem, Labelled, PairCost, Sample
from jaxrlhf.base.types import Params
from jaxrlhf.bilevel.hypergradient import HypergradientRule, Losses, RuleInputs, in_reward
from jaxrlhf.bilevel.stencil import Index


class Levels(NamedTuple):
    """Both levels at one reward phi and one batch; lives inside a trace.

    Attributes:
        tilted_loss: `(lower, index) -> []`, h(phi, lower; tilt) = tilt G - J of that iterate's problem.
        proximal_loss: `(lower, index) -> []`, tilt G + beta KL(lower || the policy that sampled), up to a constant; None
            where no single policy sampled.
        hypergradient: `(lowers, sigma) -> (gradient, report)`, from iterates stacked `[S, ...]`, tilt 0 first; the report
            holds the fields of `BilevelInfo` that both levels determine.
    """

    tilted_loss: Callable[[Params, Index], jax.Array]
    proximal_loss: Callable[[Params, Index], jax.Array] | None
    hypergradient: Callable[[Params, jax.Array], tuple[Params, dict[str, jax.Array]]]


class Points(NamedTuple):
    """Where the iterates' problems lie.

    Attributes:
        upper: the reward parameters phi.
        tilts: `[S]`, 0 first.
        direction: parameters like `upper` for `zero_order`, whose tilts move phi along it instead; else None.
    """

    upper: Params
    tilts: jax.Array
    direction: Params | None

    def upper_of(self, index: Index) -> Params:
        """Returns the reward parameters of an iterate's problem."""
        if self.direction is None:
            return self.upper
        step = self.tilts[index]
        return jax.tree.map(lambda leaf, along: leaf + step.astype(leaf.dtype) * along, self.upper, self.direction)

    def tilt_of(self, index: Index) -> jax.Array:
        """Returns the tilt of an iterate's problem."""
        return self.tilts[index] if self.direction is None else jnp.zeros_like(self.tilts[0])


class View(NamedTuple):
    """What one iterate's problem looks like: its sample, rewards `[B, M, 2, T]` and costs."""

    sample: Sample
    reward: jax.Array
    cost: PairCost


def over_tilts(function: Callable, *, sequential: bool = False) -> Callable:
    """Maps over the stacked iterates, all at once or one after another: the one place that knows how they are laid out."""
    return (lambda *stacked: jax.lax.map(lambda each: function(*each), stacked)) if sequential else jax.vmap(function)


def sampled_levels(
    problem: BilevelProblem,
    rule: HypergradientRule,
    beta: float | jax.Array,
    points: Points,
    labelled: Labelled,
    frozen: Params,
    *,
    max_importance_weight: float | None = None,
    sequential: bool = False,
) -> Levels:
    """Returns the levels as importance-weighted means over a labelled sample, or over one a tilt (leaves `[S, ...]`).

    With a shared sample the reward model runs forward once and backward once, whatever the number of tilts and inner
    steps.
    """
    kl_price, upper = problem.kl_price, points.upper
    indices = jnp.arange(len(rule.stencil.offsets))
    separate = rule.sampling != "shared"

    def every(function):
        return over_tilts(function, sequential=sequential)

    def labelled_of(index):
        return jax.tree.map(lambda leaf: leaf[index], labelled) if separate else labelled

    def seen(upper, labelled):
        reward = problem.reward(upper, labelled.sample, frozen)
        return reward, problem.cost(upper, reward, labelled, frozen)

    if separate or in_reward(rule):
        rewards, costs = every(lambda index: seen(points.upper_of(index), labelled_of(index)))(indices)

        def look(index):
            return View(labelled_of(index).sample, rewards[index], jax.tree.map(lambda leaf: leaf[index], costs))

    else:
        rewards, pull_back = jax.vjp(lambda upper: problem.reward(upper, labelled.sample, frozen), upper)
        shared = View(labelled.sample, rewards, problem.cost(upper, rewards, labelled, frozen))

        def look(index):
            return shared

    def log_weights_at(log_prob, view):
        return importance.step_log_weights(log_prob, view.sample, largest=max_importance_weight)

    def values_at(log_prob, view):
        return importance.evaluate(
            log_prob, view.reward, view.cost, view.sample, beta=beta, kl_price=kl_price, largest=max_importance_weight
        )

    def values_of(lower, view):
        return values_at(problem.log_prob(lower, view.sample, frozen), view)

    def tilted_loss(lower, index):
        return importance.tilted_loss(values_of(lower, look(index)), points.tilt_of(index))

    def proximal_loss(lower, index):
        view = look(index)
        # The reward that the sampling policy is optimal for: -J with it in place of R is beta KL(. || that policy).
        implied = beta * (view.sample.behaviour_log_prob - view.sample.reference_log_prob)
        return importance.tilted_loss(values_of(lower, view._replace(reward=implied)), points.tilt_of(index))

    def weights_on(view, lower, log_prob, log_weights, sigma, tilt=None):
        assert rule.weights is not None  # checked when the algorithm was made
        ratio = log_prob - view.sample.reference_log_prob
        return rule.weights(
            RuleInputs(
                sample=view.sample,
                log_weights=log_weights,
                log_ratio=jnp.where(view.sample.from_policy[None, None, :, None] > 0, ratio, 0.0),
                coupled_cost=view.cost.coupled,
                sigma=sigma,
                beta=beta,
                kl_price=kl_price,
                tilt=tilt,
                lower=lower,
                levels=lambda lower: values_of(lower, view),
                log_weights_of=lambda lower: log_weights_at(problem.log_prob(lower, view.sample, frozen), view),
            )
        )

    def weighted_cost(reward, upper, pair_weights, labelled, share: jax.Array | float = 1.0):
        cost = problem.cost(upper, reward, labelled, frozen)
        return importance.expectation(pair_weights * cost.coupled + share * cost.uncoupled, labelled.sample)

    def at_reward(
        view, labelled, pair_weights, reward_weights: jax.Array | float = 0.0, share: jax.Array | float = 1.0
    ):
        """The gradient at the reward model's outputs on a view, and the part that does not go through them."""
        through, direct = jax.grad(weighted_cost, argnums=(0, 1))(view.reward, upper, pair_weights, labelled, share)
        return through + view.sample.measure[
            :, :, None, None
        ] * view.sample.cumulative_discount * reward_weights, direct

    def at_hand(log_weights):
        return jnp.exp(importance.pair_log_weights(log_weights[0]))

    def from_shared_sample(lowers, log_probs, log_weights, sigma):
        weights = weights_on(shared, _first(lowers), log_probs[0], log_weights, sigma)
        # With and without the policy's answer.
        whole, direct = at_reward(shared, labelled, *weights)
        rest, _ = at_reward(shared, labelled, at_hand(log_weights))
        gradient = jax.tree.map(jnp.add, pull_back(whole)[0], direct)
        return gradient, _share(jnp.linalg.norm(whole - rest), jnp.linalg.norm(rest))

    def from_own_samples(lowers, log_probs, log_weights, sigma):
        def pulled_back(index, *settings):
            own = labelled_of(index)
            outputs, direct = at_reward(look(index), own, *settings)
            # What the reward is at is known: its parameters' gradient alone is computed.
            _, pull_back = jax.vjp(lambda upper: problem.reward(upper, own.sample, frozen), upper)
            return jax.tree.map(jnp.add, pull_back(outputs)[0], direct)

        def term(index, lower, log_prob, log_weights):
            weights = weights_on(look(index), lower, log_prob, log_weights[None], sigma, tilt=index)
            # The uncoupled part is fitted on tilt 0's pairs, as with a shared sample.
            return pulled_back(index, *weights, jnp.where(index == 0, 1.0, 0.0))

        terms = every(term)(indices, lowers, log_probs, log_weights)
        gradient = jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), terms)
        rest = pulled_back(0, at_hand(log_weights))
        return gradient, _share(optax.tree.norm(optax.tree.sub(gradient, rest)), optax.tree.norm(rest))

    def from_two_points(lowers, sigma):
        def value(lower, index):
            view = look(index)
            return values_of(lower, view).upper + importance.expectation(view.cost.uncoupled, view.sample)

        return two_point_gradient(value, rule, points.direction, lowers, sigma)

    def hypergradient(lowers, sigma):
        # The only forward pass of each iterate: everything below reads these.
        log_probs = every(lambda lower, index: problem.log_prob(lower, look(index).sample, frozen))(lowers, indices)
        log_weights = over_tilts(lambda log_prob, index: log_weights_at(log_prob, look(index)))(log_probs, indices)
        if in_reward(rule):
            gradient, coupling_share = from_two_points(lowers, sigma)
        else:
            estimate = from_own_samples if separate else from_shared_sample
            gradient, coupling_share = estimate(lowers, log_probs, log_weights, sigma)

        values = over_tilts(lambda log_prob, index: values_at(log_prob, look(index)))(log_probs, indices)
        effective = over_tilts(
            lambda logs, index: importance.ess_fraction(importance.pair_log_weights(logs), look(index).sample)
        )
        view = look(0)
        report = {
            "upper_loss": values.upper[0] + importance.expectation(view.cost.uncoupled, view.sample),
            "value_gap": jnp.zeros_like(values.lower[0]) if in_reward(rule) else _smallest_gap(values.lower),
            "coupling_share": coupling_share,
            "ess_fraction": jnp.min(effective(log_weights, indices)),
            "kl": values.kl[0],
            "entropy": importance.entropy(log_probs[0], view.sample),
            "collision_rate": importance.expectation(_coincide(view.sample.responses), view.sample),
            "labels": importance.count_labels(labelled),
        }
        return gradient, report

    simple = not separate and not in_reward(rule)
    return Levels(tilted_loss, proximal_loss if simple else None, hypergradient)


def loss_levels(
    upper_loss: Callable[[Params, Params, Any, Params], jax.Array],
    lower_loss: Callable[[Params, Params, Any, Params], jax.Array],
    rule: HypergradientRule,
    points: Points,
    data: Any,
    frozen: Params,
) -> Levels:
    """Returns the levels of a problem without samples, given as `(upper, lower, data, frozen) -> []` losses.

    `lower_loss` is - J. Fields of the report that need a policy are nan; there is no sample to lose and no label.
    """
    losses = Losses(
        upper=lambda upper, lower: upper_loss(upper, lower, data, frozen),
        lower=lambda upper, lower: lower_loss(upper, lower, data, frozen),
        data=data,
        frozen=frozen,
    )

    def tilted_loss(lower, index):
        upper = points.upper_of(index)
        return points.tilt_of(index) * losses.upper(upper, lower) + losses.lower(upper, lower)

    def hypergradient(lowers, sigma):
        policy = _first(lowers)
        if in_reward(rule):
            gradient, coupling_share = two_point_gradient(
                lambda lower, index: losses.upper(points.upper_of(index), lower), rule, points.direction, lowers, sigma
            )
        else:
            assert rule.surrogate is not None  # checked when the algorithm was made
            gradient = jax.grad(rule.surrogate(losses, lowers, sigma))(points.upper)
            rest = jax.grad(losses.upper)(points.upper, policy)
            coupling_share = _share(optax.tree.norm(optax.tree.sub(gradient, rest)), optax.tree.norm(rest))
        values = -over_tilts(lambda lower: losses.lower(points.upper, lower))(lowers)
        unknown = jnp.full((), jnp.nan)
        report = {
            "upper_loss": losses.upper(points.upper, policy),
            "value_gap": jnp.zeros_like(values[0]) if in_reward(rule) else _smallest_gap(values),
            "coupling_share": coupling_share,
            "ess_fraction": jnp.ones(()),
            "kl": unknown,
            "entropy": unknown,
            "collision_rate": unknown,
            "labels": jnp.zeros((), jnp.int32),
        }
        return gradient, report

    return Levels(tilted_loss, None, hypergradient)


def two_point_gradient(
    value: Callable[[Params, Index], jax.Array],
    rule: HypergradientRule,
    direction: Params,
    lowers: Params,
    sigma: jax.Array,
) -> tuple[Params, jax.Array]:
    """Returns `direction sum_i c_i value(lambda_i, i)`, c_i the stencil's over sigma, and the coupling's share.

    `value(lower, index)` is G with that index's reward parameters; the share compares it with G at the policy of phi.
    """
    indices = jnp.arange(len(rule.stencil.offsets))
    followed = over_tilts(value)(lowers, indices)
    fixed = over_tilts(lambda index: value(_first(lowers), index))(indices)
    scale = jnp.asarray(rule.stencil.coefficients, followed.dtype) / sigma
    # Each less the value at phi, which the coefficients cancel: smaller numbers, smaller rounding.
    slope, at_hand = scale @ (followed - followed[0]), scale @ (fixed - fixed[0])
    gradient = jax.tree.map(lambda along: slope.astype(along.dtype) * along, direction)
    return gradient, _share(jnp.abs(slope - at_hand), jnp.abs(at_hand))


def _first(lowers: Params) -> Params:
    return jax.tree.map(lambda leaf: leaf[0], lowers)


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
