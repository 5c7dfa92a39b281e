"""A value model of prefixes: the expected return before each token, for `jaxrlhf.algorithms.actor_critic`."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxrlhf.base.problem import Sample
from jaxrlhf.lm.pairing import flatten_pairs
from jaxrlhf.lm.problem import LanguageFrozen
from jaxrlhf.lm.transformer.layers import wide
from jaxrlhf.lm.transformer.model import LanguageModel, pad_left


def token_critic(model: LanguageModel) -> Callable[[Any, Sample, LanguageFrozen], jax.Array]:
    """Returns `(critic, sample, frozen) -> [B, M, 2, L]`, `v_t = head . hidden(x, y_<t)`.

    For samples of a `language_problem` with per_token=True. Parameters are those of a `RewardModel`, `{"trunk", "head"}`:
    `reward_model(model).from_trunk(policy's)` is a good start, with value 0 everywhere.
    """

    def value(critic, sample, frozen):
        del frozen
        prompts, (tokens, mask) = flatten_pairs(sample.prompts, sample.responses)
        rows, row_mask = pad_left(*prompts)
        prefixes = jnp.concatenate([rows, tokens[:, :-1]], axis=1)
        prefix_mask = jnp.concatenate([row_mask, mask[:, :-1].astype(bool)], axis=1)
        hidden = model.hidden(critic["trunk"], prefixes, prefix_mask)[:, prompts.tokens.shape[1] - 1 :]
        precise = wide(hidden.dtype)
        values = hidden.astype(precise) @ critic["head"].astype(precise)
        return jnp.where(mask, values, 0.0).reshape(sample.responses.tokens.shape)

    return value
