"""Preferences that exist already, as labelled pairs: what a buffer can begin with."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxrlhf.base.problem import Labelled, Sample, uniform_measure
from jaxrlhf.base.types import Params
from jaxrlhf.lm.log_probs import completion_log_probs
from jaxrlhf.lm.problem import LanguageFrozen, Prompts, Responses, flat
from jaxrlhf.lm.transformer.model import LanguageModel


def offline_pairs(
    policy: LanguageModel,
    prompts: Prompts,
    responses: Responses,
    labels: jax.Array,
    frozen: LanguageFrozen,
    *,
    temperature: float = 1.0,
    from_policy: tuple[float, float] = (1.0, 1.0),
    per_token: bool = False,
    reference_params: Callable[[LanguageFrozen], Params] = lambda frozen: frozen.reference,
) -> Labelled:
    """Returns a preference set as a labelled sample, as though the reference had written its responses.

    Who wrote published responses, and how probable they found them, is not known. The reference stands in: that is exact
    where it did write them, and where it did not, only what needs no weights (the uncoupled likelihood, `dpo`) is sound.

    Args:
        policy: the model.
        prompts: `[B, P]`.
        responses: `[B, M, 2, L]`.
        labels: `[B, M]` or `[B, M, L]`; 1 where response 0 was preferred.
        frozen: with the reference.
        temperature: of the problem that the pairs are for.
        from_policy: of that problem's samples: (1, 0) where it pairs the policy's responses with the reference's.
        per_token: as in that problem.
        reference_params: where the reference's parameters are.

    Raises:
        ValueError: shapes do not go together.
    """
    batch, pairs = responses.tokens.shape[:2]
    if labels.shape[:2] != (batch, pairs):
        raise ValueError(f"There are {batch} x {pairs} pairs and labels of shape {labels.shape}.")
    rows, (tokens, mask) = flat(prompts, responses)
    found = completion_log_probs(policy, reference_params(frozen), *rows, tokens, mask, temperature=temperature)
    by_step = found if per_token else jnp.sum(found, axis=-1, keepdims=True)
    by_step = by_step.reshape(*responses.tokens.shape[:3], -1)
    measure, num_draws = uniform_measure(batch, pairs, dtype=by_step.dtype)
    sample = Sample(
        prompts=prompts,
        responses=responses,
        behaviour_log_prob=by_step,
        reference_log_prob=by_step,
        cumulative_discount=responses.mask.astype(by_step.dtype) if per_token else jnp.ones_like(by_step),
        measure=measure,
        from_policy=jnp.asarray(from_policy, by_step.dtype),
        num_draws=num_draws,
    )
    return Labelled(sample, labels.reshape(batch, pairs, -1).astype(by_step.dtype))
