"""Existing preference data as labelled pairs: for offline methods, or to fill a buffer before the first step."""

from collections.abc import Callable

import jax

from jaxrlhf.base.problem import Labelled, Sample, uniform_measure
from jaxrlhf.base.types import Params
from jaxrlhf.lm.log_probs import completion_log_probs
from jaxrlhf.lm.pairing import Against, Prompts, Responses, flatten_pairs, from_policy
from jaxrlhf.lm.problem import LanguageFrozen
from jaxrlhf.lm.steps import cumulative_discount, step_log_probs
from jaxrlhf.lm.transformer.model import LanguageModel


def offline_pairs(
    policy: LanguageModel,
    prompts: Prompts,
    responses: Responses,
    labels: jax.Array,
    frozen: LanguageFrozen,
    *,
    temperature: float = 1.0,
    against: Against = "policy",
    per_token: bool = False,
    reference_params: Callable[[LanguageFrozen], Params] = lambda frozen: frozen.reference,
) -> Labelled:
    """Returns a preference set as a labelled sample, as though the reference had written its responses.

    Who wrote published responses, and with what probability, is unknown. The reference stands in as behaviour policy: that
    is exact where it did write them; where it did not, only what uses no importance weights (the uncoupled likelihood,
    `dpo`) is sound.

    Args:
        policy: the model.
        prompts: `[B, P]`.
        responses: `[B, M, 2, L]`.
        labels: `[B, M]` or `[B, M, L]`; 1 where response 0 was preferred.
        frozen: with the reference.
        temperature: of the problem that the pairs are for.
        against: as in that problem.
        per_token: as in that problem.
        reference_params: `(frozen) -> the reference's parameters`.

    Raises:
        ValueError: the numbers of pairs and labels differ.
    """
    batch, pairs = responses.tokens.shape[:2]
    if labels.shape[:2] != (batch, pairs):
        raise ValueError(f"There are {batch} x {pairs} pairs and labels of shape {labels.shape}.")
    rows, flat = flatten_pairs(prompts, responses)
    by_token = completion_log_probs(policy, reference_params(frozen), *rows, *flat, temperature=temperature)
    log_prob = step_log_probs(by_token, per_token=per_token).reshape(*responses.tokens.shape[:3], -1)
    measure, num_draws = uniform_measure(batch, pairs, dtype=log_prob.dtype)
    sample = Sample(
        prompts=prompts,
        responses=responses,
        behaviour_log_prob=log_prob,
        reference_log_prob=log_prob,
        cumulative_discount=cumulative_discount(responses.mask, log_prob.dtype, per_token=per_token),
        measure=measure,
        from_policy=from_policy(against, log_prob.dtype),
        num_draws=num_draws,
    )
    return Labelled(sample, labels.reshape(batch, pairs, -1).astype(log_prob.dtype))
