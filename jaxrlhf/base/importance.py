"""Importance weights: the one primitive through which policies enter every estimate.

A response y drawn from a behaviour policy mu stands for the policy lambda through its density ratio
`w = exp(log lambda(y) - log mu(y))`. As a function of lambda this form has the right first and mixed second
derivatives; a surrogate `stop_gradient(reward) * log_prob` has a cross derivative of zero and would make the coupling
between the levels silently inert.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxrlhf.base.problem import Labelled, PairCost, Sample


def expectation(values: jax.Array, sample: Sample) -> jax.Array:
    """Returns `sum_bm measure[b, m] values[b, m]` for `values` `[B, M]`."""
    return jnp.sum(sample.measure * values)


def policy_slot_weights(sample: Sample) -> jax.Array:
    """Returns `[1, 1, 2, 1]`, the weights that average over the policy's responses of a pair: 1/2 each, or (1, 0)."""
    return (sample.from_policy / jnp.sum(sample.from_policy))[None, None, :, None]


def step_log_weights(log_prob: jax.Array, sample: Sample, *, largest: float | None = None) -> jax.Array:
    """Returns `log w_t = sum_{t' <= t} (log_prob - behaviour_log_prob)`, `[B, M, 2, T]`.

    The log density ratio of the response up to and including step t. It is 0 in slots that the reference filled, which do
    not depend on the policy, and for listed pairs of measure 0, whose weight might overflow. With `largest`, a
    response's weights are truncated to `min(w, largest)` and carry no gradient beyond it: less variance, and a bias.
    """
    is_weighted = (sample.from_policy[None, None, :, None] > 0) & (sample.measure[:, :, None, None] > 0)
    difference = jnp.where(is_weighted, log_prob - sample.behaviour_log_prob, 0.0)
    log_weights = jnp.cumsum(difference, axis=-1)
    if largest is None:
        return log_weights
    bound = jnp.log(jnp.asarray(largest, log_weights.dtype))
    return jnp.where(log_weights > bound, bound, log_weights)


def pair_log_weights(step_log_weights: jax.Array) -> jax.Array:
    """Returns `log w(y0) + log w(y1)`, `[..., M]`, from step weights `[..., M, 2, T]`."""
    return jnp.sum(step_log_weights[..., -1], axis=-1)


def others_mean(values: jax.Array, sample: Sample) -> jax.Array:
    """Returns for each value `[B, M]` the mean of the *other* values of the same prompt: an independent baseline.

    Computed as `value - (value - mean) / (1 - 1 / num_draws)`; with an enumerated measure the mean itself is exact and is
    returned. A prompt with a single drawn pair has no others; its baseline is 0.
    """
    mean = jnp.sum(_within_prompt(sample) * values, axis=-1, keepdims=True)
    return _leave_one_out(values, mean, sample.num_draws)


def others_mean_responses(values: jax.Array, sample: Sample) -> jax.Array:
    """As `others_mean`, for `values` `[B, M, 2, T]` over the policy's responses to the same prompt, step by step."""
    weights = _within_prompt(sample)[:, :, None, None] * policy_slot_weights(sample)
    mean = jnp.sum(weights * values, axis=(1, 2), keepdims=True)
    return _leave_one_out(values, mean, sample.num_draws * jnp.sum(sample.from_policy))


def _leave_one_out(values: jax.Array, mean: jax.Array, num_draws: jax.Array) -> jax.Array:
    without = values - (values - mean) / (1.0 - 1.0 / jnp.maximum(num_draws, 2.0))
    return jnp.where(num_draws > 1, without, 0.0)


def _within_prompt(sample: Sample) -> jax.Array:
    return sample.measure / jnp.sum(sample.measure, axis=-1, keepdims=True)


class Values(NamedTuple):
    """The two levels at one policy, estimated from one sample; scalars.

    Attributes:
        upper: G = E[coupled cost] + kappa KL.
        lower: J = E[discounted reward] - beta KL.
        kl: KL(policy || reference) in nats, discounted over steps.
    """

    upper: jax.Array
    lower: jax.Array
    kl: jax.Array


def evaluate(
    log_prob: jax.Array,
    reward: jax.Array,
    cost: PairCost,
    sample: Sample,
    *,
    beta: float | jax.Array,
    kl_price: float | jax.Array = 0.0,
    largest: float | None = None,
) -> Values:
    """Estimates what depends on the policy of G, and J, differentiable in `log_prob`: the one place that defines them.

        G = E[coupled cost] + kappa KL(policy || reference)        (the uncoupled cost is added where G is reported)
        J = E[sum_t discount_t reward_t] - beta KL(policy || reference)

    With w the density ratio to the behaviour policy, the values are plain importance-weighted means and their
    gradients are score-function gradients with leave-one-out baselines: each mean carries a control variate
    `-(w - 1) b` whose expectation is 0. The KL is estimated by k1 of `kl`, in losses and reports alike.

    Args:
        log_prob: `[B, M, 2, T]`, of the policy to evaluate.
        reward: `[B, M, 2, T]`.
        cost: costs `[B, M]`; only the coupled part depends on the policy.
        sample: the pairs.
        beta: weight of the lower level's KL.
        kl_price: weight of the upper level's KL.
        largest: bound of the weights, see `step_log_weights`.

    Returns:
        The values. `tilted_loss` combines them.
    """
    log_weights = step_log_weights(log_prob, sample, largest=largest)
    weights = jnp.exp(log_weights)
    joint = jnp.exp(pair_log_weights(log_weights))
    # The discount belongs to the values: E[w_t - 1] = 0 over all trajectories, not over those still alive at t.
    discounted = sample.cumulative_discount * reward
    controlled = _controlled(weights, discounted, others_mean_responses(discounted, sample))
    returned = expectation(jnp.sum(policy_slot_weights(sample) * controlled, axis=(-2, -1)), sample)
    divergence = kl(log_prob, sample, largest=largest)
    coupled = expectation(_controlled(joint, cost.coupled, others_mean(cost.coupled, sample)), sample)
    return Values(upper=coupled + kl_price * divergence, lower=returned - beta * divergence, kl=divergence)


def kl(
    log_prob: jax.Array,
    sample: Sample,
    *,
    estimator: Literal["k1", "k2", "k3"] = "k1",
    largest: float | None = None,
) -> jax.Array:
    """Estimates KL(policy || reference) in nats, discounted over steps, with its gradient; `[]`.

    With `l = log(policy / reference)` of a step and w the density ratio to the policy that sampled it, a step contributes

        k1 = w l - (w_t - w_{t-1})        k2 = w l^2 / 2        k3 = w (l + exp(-l) - 1).

    k1 and k3 are unbiased, k2 is right to second order in l; k3 is never negative and has the least variance near the
    reference (J. Schulman, "Approximating KL divergence", 2020). The gradient is that of k1 for all three, which is the
    KL's own. Departure: systems that differentiate an estimate as it stands, without w, get 0 in expectation from k1
    and the gradient of KL(reference || policy) from k3; only k2's is right that way, and for one step only.

    Args:
        log_prob: `[B, M, 2, T]`, of the policy; slots that the reference filled are ignored.
        sample: the pairs.
        estimator: which value.
        largest: bound of the weights, see `step_log_weights`.

    Raises:
        ValueError: the estimator is unknown.
    """
    if estimator not in ("k1", "k2", "k3"):
        raise ValueError(f"A KL is estimated by k1, k2 or k3, got {estimator!r}.")
    weights = jnp.exp(step_log_weights(log_prob, sample, largest=largest))
    previous = jnp.concatenate([jnp.ones_like(weights[..., :1]), weights[..., :-1]], axis=-1)
    log_ratio = policy_log_ratio(log_prob, sample)
    divergence = sample.cumulative_discount * log_ratio
    # E[w_t - w_{t-1}] = 0 given the past: taking it off leaves the KL's value and removes its gradient's noise.
    steps = _controlled(weights, divergence, others_mean_responses(divergence, sample)) - sample.cumulative_discount * (
        weights - previous
    )
    first = expectation(jnp.sum(policy_slot_weights(sample) * steps, axis=(-2, -1)), sample)
    if estimator == "k1":
        return first
    size = 0.5 * jnp.square(log_ratio) if estimator == "k2" else log_ratio + jnp.expm1(-log_ratio)
    estimate = expectation(
        jnp.sum(policy_slot_weights(sample) * sample.cumulative_discount * weights * size, axis=(-2, -1)), sample
    )
    return first + jax.lax.stop_gradient(estimate - first)


class Slopes(NamedTuple):
    """Derivatives of the coupled objective's parts as a policy moves on along its own way from the reference; scalars.

    Attributes:
        coupled: d E[coupled cost] / d alpha.
        kl: d KL(policy || reference) / d alpha, in nats.
    """

    coupled: jax.Array
    kl: jax.Array


def tempering_slopes(log_prob: jax.Array, cost: PairCost, sample: Sample, *, largest: float | None = None) -> Slopes:
    """Estimates how the coupled cost and the KL change along pi proportional to reference * (pi / reference)^exp(alpha).

        Cov_pi(dE[cost]/dpi, l)      and      Cov_pi(l_pi, l),      l = log(mu / reference),    at alpha = 0

    within each prompt, with mu the policy that drew the sample; 0 where a prompt has a single pair. At a best response
    mu = pi, l is the reward over beta up to a constant, and this is the derivative in the log of the reward's scale, where
    transitions are deterministic (one step, tokens); where they are random it is close to it.

    Args:
        log_prob: `[B, M, 2, T]`, of the policy.
        cost: costs `[B, M]`, of which the coupled part is read.
        sample: the pairs.
        largest: bound of the weights, see `step_log_weights`.
    """
    log_weights = step_log_weights(log_prob, sample, largest=largest)
    joint, single = jnp.exp(pair_log_weights(log_weights)), jnp.exp(log_weights[..., -1])
    through_cost = joint * (cost.coupled - others_mean(joint * cost.coupled, sample))
    ratio = jnp.sum(sample.cumulative_discount * policy_log_ratio(log_prob, sample), axis=-1)
    weighted = (single * ratio)[..., None]
    through_kl = single * (ratio - others_mean_responses(weighted, sample)[..., 0])
    along = jnp.sum(sample.cumulative_discount * policy_log_ratio(sample.behaviour_log_prob, sample), axis=-1)
    slopes = Slopes(
        coupled=expectation(through_cost * jnp.sum(along, axis=-1), sample),
        kl=expectation(jnp.sum(policy_slot_weights(sample)[..., 0] * through_kl * along, axis=-1), sample),
    )
    return jax.tree.map(lambda slope: jnp.where(sample.num_draws > 1, slope, 0.0), slopes)


def policy_log_ratio(log_prob: jax.Array, sample: Sample) -> jax.Array:
    """Returns `log_prob - reference_log_prob` `[B, M, 2, T]`, 0 in slots that the reference filled."""
    return jnp.where(sample.from_policy[None, None, :, None] > 0, log_prob - sample.reference_log_prob, 0.0)


def _controlled(ratio: jax.Array, values: jax.Array, baseline: jax.Array) -> jax.Array:
    return ratio * values - (ratio - 1.0) * jax.lax.stop_gradient(baseline)


def tilted_loss(values: Values, tilt: jax.Array) -> jax.Array:
    """Returns h = tilt G - J, what the lower iterate at this tilt minimises."""
    return tilt * values.upper - values.lower


def ess_fraction(log_weights: jax.Array, sample: Sample) -> jax.Array:
    """Returns the effective sample size `(sum m w)^2 / sum m w^2` of pair log-weights `[B, M]`, a fraction in (0, 1]."""
    weights = jnp.exp(log_weights - jnp.max(log_weights))
    return jnp.square(expectation(weights, sample)) / expectation(jnp.square(weights), sample)


def count_labels(labelled: Labelled) -> jax.Array:
    """Returns the number of labels, skipped ones left out; an enumerated expectation has none.

    A listed pair that stands for n draws has n labels. Samples for each tilt (leaves `[S, ...]`) add up.
    """
    measure, num_draws = labelled.sample.measure, labelled.sample.num_draws[..., None, None]
    draws = jnp.where(
        jnp.isfinite(num_draws),
        jnp.round(measure * measure.shape[-2] * jnp.where(jnp.isfinite(num_draws), num_draws, 0)),
        0,
    )
    return jnp.sum(draws[..., None] * (labelled.labels >= 0)).astype(jnp.int32)


def entropy(log_prob: jax.Array, sample: Sample) -> jax.Array:
    """Returns `- E sum_t discount_t log pi(step t)` in nats, from `log_prob` `[B, M, 2, T]` of the policy."""
    weights = jnp.exp(step_log_weights(log_prob, sample))
    masked = jnp.where(sample.from_policy[None, None, :, None] > 0, log_prob, 0.0)
    return -expectation(
        jnp.sum(policy_slot_weights(sample) * sample.cumulative_discount * weights * masked, axis=(-2, -1)), sample
    )
