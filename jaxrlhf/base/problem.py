"""What a user brings: a bilevel problem as four pure functions.

Shape legend of the whole package: `B` prompts (or initial states), `M` pairs per prompt, 2 responses per pair, `T` steps
per response (a language model's completion is one step), `L` labels per pair, `S` lower iterates (tilts).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxrlhf.base.types import Batch, Key, Params


class Sample(NamedTuple):
    """Pairs of responses, with the measure that turns sums over them into expectations.

    `E f = sum_bm measure[b, m] f[b, m]`. Drawn samples carry equal weights; a problem small enough to enumerate lists
    every pair with its probability instead, and everything downstream is then exact.

    Attributes:
        prompts: pytree, leaves `[B, ...]`.
        responses: pytree, leaves `[B, M, 2, ...]`; padded in one way only, so that equal responses are equal arrays.
        behaviour_log_prob: `[B, M, 2, T]`, log-probability in nats of each step under the policy that sampled it.
        reference_log_prob: `[B, M, 2, T]`, the same under the reference policy.
        cumulative_discount: `[B, M, 2, T]`, gamma^t on the steps taken, 0 after the end.
        measure: `[B, M]`, non-negative, sums to 1.
        from_policy: `[2]`, 1 where a slot is filled by the policy, 0 where by the reference. Slot 0 is the policy's.
        num_draws: `[]`, number of independent pairs behind each prompt's measure: M when drawn, infinity when
            enumerated. It sets the leave-one-out correction of `importance.others_mean`.
        reference_responses: pytree, leaves `[B, K, ...]`: responses of the reference to the same prompts that belong to no
            pair, for costs that compare with them (`preferences.self_play`); or ().
    """

    prompts: Batch
    responses: Batch
    behaviour_log_prob: jax.Array
    reference_log_prob: jax.Array
    cumulative_discount: jax.Array
    measure: jax.Array
    from_policy: jax.Array
    num_draws: jax.Array
    reference_responses: Batch = ()


SKIPPED = -1.0
"""The label of a pair that the annotator skipped."""


class Labelled(NamedTuple):
    """A sample with the annotator's labels.

    Attributes:
        sample: the pairs.
        labels: `[B, M, L]` in [0, 1]; 1 says that response 0 was preferred, 1/2 that neither was. A negative label,
            `SKIPPED`, is none. An enumerated problem may carry the probability of the label 1 in place of a drawn label.
    """

    sample: Sample
    labels: jax.Array


class PairCost(NamedTuple):
    """The upper objective as costs per pair, split by whether their expectation depends on the policy.

    Attributes:
        coupled: `[B, M]`; its expectation is differentiated through the best response.
        uncoupled: `[B, M]`; its expectation is over the pairs at hand, the policy held fixed.
    """

    coupled: jax.Array
    uncoupled: jax.Array


class BilevelProblem(NamedTuple):
    """Upper level: minimise E[cost]; lower level: maximise E[discounted reward] - beta KL(policy || reference).

    G and J as estimated from a sample are in `importance.evaluate`. `frozen` is whatever no gradient touches (reference
    policy, base weights, environment tensors). It is an argument of every function and never a closure: captured arrays
    become constants of the compiled program.

    Attributes:
        sample: `(key, lower, data, frozen) -> Sample`. Consumes the key.
        log_prob: `(lower, sample, frozen) -> [B, M, 2, T]`, differentiable in `lower`, 0 on steps not taken. Slots
            that the reference filled are ignored.
        reward: `(upper, sample, frozen) -> [B, M, 2, T]`, differentiable in `upper`.
        cost: `(upper, reward, labelled, frozen) -> PairCost`, where `reward` is the output of the function `reward` for
            this `upper`, so that no model runs twice.
        kl_price: kappa >= 0; adds `kappa KL(policy || reference)` to the coupled upper objective.
        reference_returns: `(upper, sample, frozen) -> [B, K]`, returns of the sample's `reference_responses`, or None.
    """

    sample: Callable[[Key, Params, Batch, Params], Sample]
    log_prob: Callable[[Params, Sample, Params], jax.Array]
    reward: Callable[[Params, Sample, Params], jax.Array]
    cost: Callable[[Params, jax.Array, Labelled, Params], PairCost]
    kl_price: float | jax.Array = 0.0
    reference_returns: Callable[[Params, Sample, Params], jax.Array] | None = None


def uniform_measure(batch: int, pairs: int, *, dtype: Any = None) -> tuple[jax.Array, jax.Array]:
    """Returns the `measure` `[B, M]` and the `num_draws` `[]` of independent pairs with equal weights."""
    dtype = jnp.result_type(float) if dtype is None else dtype
    return jnp.full((batch, pairs), 1.0 / (batch * pairs), dtype), jnp.asarray(pairs, dtype)
