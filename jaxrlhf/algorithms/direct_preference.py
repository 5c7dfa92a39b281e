"""Direct preference learning: the policy's own log-ratio is the reward, and labels train the policy directly.

With `h = log(policy / reference)(y0) - log(policy / reference)(y1)` and labels z (1: response 0 preferred), a pair
costs

| loss | cost of a pair | its optimum, with labels of P(y0 preferred) on pairs of any full support |
|---|---|---|
| `dpo` | -z log s(beta h) - (1 - z) log s(-beta h) | reference * exp(gold / beta), if P = s(gold0 - gold1) |
| `ipo` | z (h - 1/(2 beta))^2 + (1 - z) (h + 1/(2 beta))^2 | reference * exp(P(y beats a reference response) / beta) |
| `simpo` | as dpo with `h` of log-probabilities a step, no reference, and a margin | no closed form |

(arXiv 2305.18290, 2310.12036, 2405.14734; ipo's optimum is for pairs from the reference). Pairs from the reference make
the methods offline, pairs from the policy make them online (arXiv 2402.04792), and `coupling` adds the gradient that the
online methods leave out: how the distribution of the pairs depends on the policy (SAIL, arXiv 2406.15567).
"""

from collections.abc import Callable

import jax
import jax.core
import jax.numpy as jnp
import optax

from jaxrlhf.algorithms.policy_gradient import policy_algorithm
from jaxrlhf.base import importance
from jaxrlhf.base.algorithm import Algorithm, Annotator
from jaxrlhf.base.problem import BilevelProblem, Labelled, Sample
from jaxrlhf.base.types import Params

PairLoss = Callable[[jax.Array, Labelled], jax.Array]
"""`(log_prob [B, M, 2, T] of the policy, labelled) -> ` the cost of each pair `[B, M]`, as if none had been skipped."""


def dpo(*, beta: float | jax.Array, label_smoothing: float = 0.0, unbiased: bool = False) -> PairLoss:
    """Returns direct preference optimisation's loss, in nats; log 2 at the reference.

    Args:
        beta: weight of the KL, in units of the reward a nat.
        label_smoothing: fraction e in [0, 1/2) of labels assumed to be wrong; a label z counts as (1 - e) z + e (1 - z).
        unbiased: with smoothing, counts it as (z - e) / (1 - 2 e) in place, so that the expected loss under labels of
            which e are flipped is that of the true ones (arXiv 2403.00409, TRL's "robust").

    Raises:
        ValueError: beta is not positive, or the smoothing is out of range.
    """
    _check_positive("beta", beta)
    _check_smoothing(label_smoothing)

    def loss(log_prob, labelled):
        difference = beta * log_ratio_difference(log_prob, labelled.sample)
        label = _mean_label(labelled)
        if unbiased:
            label = (label - label_smoothing) / (1.0 - 2.0 * label_smoothing)
        else:
            label = _smoothed(label, 1.0 - label, label_smoothing)
        return jax.nn.softplus(difference) - label * difference

    return loss


def ipo(*, beta: float | jax.Array, average: bool = False) -> PairLoss:
    """Returns identity preference optimisation's loss, which keeps `h` finite where a pair's labels always agree.

    Args:
        beta: sets the target 1/(2 beta) of h.
        average: divides a response's log-ratio by its number of steps, as TRL does; by default it is summed, as published.

    Raises:
        ValueError: beta is not positive.
    """
    _check_positive("beta", beta)

    def loss(log_prob, labelled):
        sample, target = labelled.sample, 0.5 / beta
        ratio = jnp.sum(log_prob - sample.reference_log_prob, axis=-1)
        ratio = ratio / _steps_taken(sample) if average else ratio
        difference = ratio[..., 0] - ratio[..., 1]
        label = _mean_label(labelled)
        return label * jnp.square(difference - target) + (1.0 - label) * jnp.square(difference + target)

    return loss


def simpo(
    *,
    beta: float | jax.Array,
    margin: float = 0.5,
    lengths: Callable[[Sample], jax.Array] | None = None,
    label_smoothing: float = 0.0,
) -> PairLoss:
    """Returns SimPO's loss, `-log s(beta (a_w - a_l) - beta margin)`, a the mean log-probability of a step, w preferred.

    It has no reference: nothing keeps the policy near one.

    Args:
        beta: scale; published ones are 2 to 10.
        margin: in units of the log-probability a step (published: gamma / beta, 0.3 to 1.6).
        lengths: `sample -> [B, M, 2]`, steps of each response; those with a discount by default.
        label_smoothing: as in `dpo`.

    Raises:
        ValueError: beta is not positive, or the smoothing is out of range.
    """
    _check_positive("beta", beta)
    _check_smoothing(label_smoothing)

    def loss(log_prob, labelled):
        mean = jnp.sum(log_prob, axis=-1) / jnp.maximum((lengths or _steps_taken)(labelled.sample), 1)
        difference = mean[..., 0] - mean[..., 1]
        label = _mean_label(labelled)
        # The margin stays on the preferred side where a label is smoothed.
        first, second = (
            _smoothed(jax.nn.softplus(-beta * excess), jax.nn.softplus(beta * excess), label_smoothing)
            for excess in (difference - margin, -difference - margin)
        )
        return label * first + (1.0 - label) * second

    return loss


def direct_preference(
    problem: BilevelProblem,
    loss: PairLoss,
    optimizer: optax.GradientTransformation,
    *,
    coupling: float = 0.0,
    annotate: Annotator | None = None,
    sampler: Callable[[Params, Params], Params] = lambda policy, frozen: policy,
    steps: int = 1,
) -> Algorithm:
    """Returns the algorithm that descends a pair loss on labelled pairs.

        E[loss] + coupling E[(w - 1) (loss - others' mean)],    w = exp(log pi(y0) pi(y1) - log of whoever gave them)

    where the loss in the second part is held fixed: on policy its gradient is `coupling E[loss grad log pi(y0) pi(y1)]`.

    Args:
        problem: with `log_prob` of both responses of a pair (policy-policy pairs, as from `language_problem` with
            against_reference=False); its reward and cost are not used.
        loss: `dpo`, `ipo`, `simpo`, or your own.
        optimizer: of the policy.
        coupling: weight of the gradient through the pairs' distribution; 1 is the full gradient.
        annotate: as in `bilevel_descent`.
        sampler: as in `policy_algorithm`; `lambda policy, frozen: frozen.reference` makes the method offline.
        steps: gradient steps on each labelled sample.

    Raises:
        ValueError: the coupling is negative, or steps < 1.
    """
    if not coupling >= 0:
        raise ValueError(f"coupling must not be negative, got {coupling:g}.")

    def total(log_prob, labelled, frozen):
        del frozen
        sample = labelled.sample
        labelled_pairs = jnp.all(labelled.labels >= 0, axis=-1)
        costs = jnp.where(labelled_pairs, loss(log_prob, labelled), 0.0)
        value = importance.expectation(costs, sample)
        if coupling:
            weight = jnp.exp(importance.pair_log_weights(importance.step_log_weights(log_prob, sample)))
            fixed = jax.lax.stop_gradient(costs - importance.others_mean(costs, sample))
            value = value + coupling * importance.expectation((weight - 1.0) * fixed, sample)
        return value

    return policy_algorithm(problem, total, optimizer, annotate=annotate, sampler=sampler, steps=steps)


def implicit_reward(problem: BilevelProblem, *, beta: float | jax.Array) -> BilevelProblem:
    """Returns the problem with `R_phi = beta log(pi_phi / reference)` for its reward: the upper parameters are a policy's.

    The best response is then `lambda*(phi) = phi` (arXiv 2305.18290), given by
    `closed_form(lambda task, index: task.upper)`, and bilevel descent with the rule `boltzmann()` on

    - the uncoupled likelihood is online DPO;
    - the coupled likelihood adds SAIL's term;
    - the uncoupled likelihood and the coupled utility are online DPO with the label's own policy gradient beside it.

    Args:
        problem: with `log_prob` of both responses of a pair.
        beta: as in `bilevel_descent`.
    """

    def reward(upper, sample, frozen):
        return beta * (problem.log_prob(upper, sample, frozen) - sample.reference_log_prob)

    return problem._replace(reward=reward)


def log_ratio_difference(log_prob: jax.Array, sample: Sample) -> jax.Array:
    """Returns `h` `[B, M]`, nats, from log-probabilities `[B, M, 2, T]`: the implicit reward's difference over beta."""
    total = jnp.sum(log_prob - sample.reference_log_prob, axis=-1)
    return total[..., 0] - total[..., 1]


def _mean_label(labelled: Labelled) -> jax.Array:
    return jnp.mean(jnp.maximum(labelled.labels, 0.0), axis=-1)


def _smoothed(value: jax.Array, flipped: jax.Array, smoothing: float) -> jax.Array:
    return (1.0 - smoothing) * value + smoothing * flipped


def _steps_taken(sample: Sample) -> jax.Array:
    return jnp.maximum(jnp.sum(sample.cumulative_discount > 0, axis=-1), 1)


def _check_smoothing(smoothing: float) -> None:
    if not 0 <= smoothing < 0.5:
        raise ValueError(f"label_smoothing must lie in [0, 1/2), got {smoothing:g}.")


def _check_positive(name: str, value: float | jax.Array) -> None:
    if not isinstance(value, jax.core.Tracer) and not value > 0:
        raise ValueError(f"{name} must be positive, got {value:g}.")
