"""What a user brings: a bilevel problem as four pure functions.

Shape legend, used through the whole package: `B` prompts (or initial states), `M` pairs a prompt, 2 responses a
pair, `T` steps a response (a language model's completion is one step), `L` labels a pair.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxrlhf.base.types import Batch, Key, Params


class Sample(NamedTuple):
    """Pairs of responses and the measure they stand for.

    Expectations are weighted sums, `E f = sum_bm measure[b, m] f[b, m]`. Drawn samples carry equal weights; a problem
    small enough to enumerate lists every pair and carries its probability instead, and everything downstream is then
    exact.

    Attributes:
        prompts: pytree, leaves `[B, ...]`.
        responses: pytree, leaves `[B, M, 2, ...]`; padding must be canonical, so that equal responses are equal arrays.
        behaviour_log_prob: `[B, M, 2, T]`, log-probability in nats of each step under the policy that gave it.
        reference_log_prob: `[B, M, 2, T]`, the same under the reference policy.
        cumulative_discount: `[B, M, 2, T]`, gamma^t on the steps taken, 0 after the end.
        measure: `[B, M]`, non-negative, sums to 1.
        from_policy: `[2]`, 1 where a slot is filled by the policy, 0 where by the reference. Slot 0 is the policy's.
        num_draws: `[]`, independent pairs behind each prompt's measure: M when drawn, infinity when enumerated. It sets the
            leave-one-out correction of `importance.centre`.
    """

    prompts: Batch
    responses: Batch
    behaviour_log_prob: jax.Array
    reference_log_prob: jax.Array
    cumulative_discount: jax.Array
    measure: jax.Array
    from_policy: jax.Array
    num_draws: jax.Array


SKIPPED = -1.0
"""The label of a pair that the annotator would not judge."""


class Labelled(NamedTuple):
    """A sample with the annotator's answers.

    Attributes:
        sample: the pairs.
        labels: `[B, M, L]` in [0, 1]; 1 says that response 0 was preferred, 1/2 that neither was. A negative label,
            `SKIPPED`, is no answer. An enumerated problem may put the probability of the answer 1 in place of a drawn one.
    """

    sample: Sample
    labels: jax.Array


class PairCost(NamedTuple):
    """The upper objective, a cost per pair, split by whether the policy is held responsible for it.

    Attributes:
        coupled: `[B, M]`, its expectation is followed through the lower level.
        uncoupled: `[B, M]`, fitted on the pairs as they came, the policy held fixed.
    """

    coupled: jax.Array
    uncoupled: jax.Array


class BilevelProblem(NamedTuple):
    """Upper level: minimise E[cost]; lower level: maximise E[discounted reward] - beta KL(policy || reference).

    `frozen` is whatever no gradient touches (reference policy, base weights, environment tensors). It is an argument
    of every function and never a closure: captured arrays become constants of the compiled program.

    Attributes:
        sample: `(key, lower, data, frozen) -> Sample`. Consumes the key.
        log_prob: `(lower, sample, frozen) -> [B, M, 2, T]`, differentiable in `lower`, 0 on steps not taken. Slots
            that the reference filled may hold anything.
        reward: `(upper, sample, frozen) -> [B, M, 2, T]`, differentiable in `upper`.
        cost: `(upper, reward, labelled, frozen) -> PairCost`, where `reward` is what `reward` returned for this
            `upper`, so that no model runs twice.
        kl_price: kappa >= 0; adds `kappa KL(policy || reference)` to the coupled upper objective.
    """

    sample: Callable[[Key, Params, Batch, Params], Sample]
    log_prob: Callable[[Params, Sample, Params], jax.Array]
    reward: Callable[[Params, Sample, Params], jax.Array]
    cost: Callable[[Params, jax.Array, Labelled, Params], PairCost]
    kl_price: float | jax.Array = 0.0


def uniform_measure(batch: int, pairs: int, *, dtype: Any = None) -> tuple[jax.Array, jax.Array]:
    """Returns the `measure` `[B, M]` and the `draws` `[]` of a sample of independent pairs with equal weights."""
    dtype = jnp.result_type(float) if dtype is None else dtype
    return jnp.full((batch, pairs), 1.0 / (batch * pairs), dtype), jnp.asarray(pairs, dtype)
