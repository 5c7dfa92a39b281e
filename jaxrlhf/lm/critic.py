"""A value model of prefixes: the expected return before each token, for `jaxrlhf.algorithms.actor_critic`."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxrlhf.base.problem import Sample
from jaxrlhf.base.types import Params
from jaxrlhf.lm.microbatch import in_microbatches
from jaxrlhf.lm.pairing import flatten_pairs
from jaxrlhf.lm.problem import LanguageFrozen
from jaxrlhf.lm.transformer.layers import wide
from jaxrlhf.lm.transformer.model import LanguageModel, pad_left


def token_critic(
    model: LanguageModel,
    *,
    microbatches: int = 1,
    params_of: Callable[[Params, LanguageFrozen], Params] = lambda critic, frozen: critic,
) -> Callable[[Any, Sample, LanguageFrozen], jax.Array]:
    """Returns `(critic, sample, frozen) -> [B, M, 2, L]`, `v_t = head . hidden(x, y_<t)`.

    For samples of a `language_problem` with per_token=True. Parameters are those of a `RewardModel`, `{"trunk", "head"}`:
    `reward_model(model).from_trunk(policy's)` is a good start, with value 0 everywhere.

    Args:
        model: the trunk.
        microbatches: as in `language_problem`.
        params_of: `(critic, frozen) -> ` parameters of the model; `lora.reward_on_reference` makes critics adapters.
    """

    def of_rows(params, rows, tokens, mask):
        prompts, prompt_mask = pad_left(*rows)
        prefixes = jnp.concatenate([prompts, tokens[:, :-1]], axis=1)
        prefix_mask = jnp.concatenate([prompt_mask, mask[:, :-1].astype(bool)], axis=1)
        hidden = model.hidden(params["trunk"], prefixes, prefix_mask)[:, prompts.shape[1] - 1 :]
        precise = wide(hidden.dtype)
        values = hidden.astype(precise) @ params["head"].astype(precise)
        return jnp.where(mask, values, 0.0)

    def value(critic, sample, frozen):
        rows, (tokens, mask) = flatten_pairs(sample.prompts, sample.responses)
        by_row = in_microbatches(of_rows, microbatches)(params_of(critic, frozen), rows, tokens, mask)
        return by_row.reshape(sample.responses.tokens.shape)

    return value
