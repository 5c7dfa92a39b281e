"""Reward models: a language model's trunk with a linear head on the last token's state, or on the mean of all."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxrlhf.base.types import Params
from jaxrlhf.lm.microbatch import default_microbatches, in_microbatches
from jaxrlhf.lm.pairing import Prompts, Responses, flatten_pairs
from jaxrlhf.lm.transformer.layers import wide
from jaxrlhf.lm.transformer.model import LanguageModel

NOT_IN_TRUNK = ("output_head",)
"""Top-level parameters of a language model that its hidden states do not depend on; a reward model leaves them out."""


class RewardModel(NamedTuple):
    """Pure functions; parameters are `{"trunk": the language model's, "head": [D]}`.

    Attributes:
        init: `(key) -> params`, random trunk, zero head; the key is consumed.
        score: `(params, tokens [N, T], mask [N, T]) -> [N]` float32, higher is better; padding on either side,
            at least one real token a row.
        from_trunk: `(language model's params) -> params`, a copy of a policy's weights under a zero head.
    """

    init: Callable[[jax.Array], Any]
    score: Callable[[Any, jax.Array, jax.Array], jax.Array]
    from_trunk: Callable[[Any], Any]


def reward_model(
    model: LanguageModel,
    *,
    pooling: Literal["last", "mean"] = "last",
    unused: tuple[str, ...] = NOT_IN_TRUNK,
) -> RewardModel:
    """Reward `head . hidden(x, y)[last real token]`, or of the mean over all real tokens.

    The last token of a judged text is the one that stops the sampler, in data as in samples (`data.turns`).

    The head starts at zero, so that an untrained reward is 0 everywhere: a bilevel run starts from the reference
    policy, not from the noise of a random head (whose scale would also set the pace of the lower level).

    Args:
        model: its `hidden` is the trunk.
        pooling: "last" is what `...ForSequenceClassification` computes, and the one that is exported; "mean" needs fewer
            labels where a small model must count what a text contains.
        unused: top-level names among the model's parameters that `hidden` does not read; the reward leaves them
            out.

    Returns:
        The `RewardModel`.

    Raises:
        ValueError: the pooling is unknown.
    """
    if pooling not in ("last", "mean"):
        raise ValueError(f"A reward pools its tokens by last or mean, got {pooling!r}.")

    def trunk_of(params):
        if isinstance(params, dict):
            return {name: leaf for name, leaf in params.items() if name not in unused}
        return params

    def hidden_of_one_token(key):
        return model.hidden(model.init(key), jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), bool))

    width = jax.eval_shape(hidden_of_one_token, jax.random.key(0)).shape[-1]

    def init(key):
        return {"trunk": trunk_of(model.init(key)), "head": jnp.zeros(width, jnp.float32)}

    def score(params, tokens, mask):
        return in_microbatches(score_microbatch, default_microbatches(*tokens.shape))(params, tokens, mask)

    def score_microbatch(params, tokens, mask):
        hidden = model.hidden(params["trunk"], tokens, mask)
        precise = wide(hidden.dtype)
        return pool(hidden, mask, pooling).astype(precise) @ params["head"].astype(precise)

    def from_trunk(params):
        # Copies: a step that donates the policy's buffers must not take the reward's with them.
        trunk = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), trunk_of(params))
        return {"trunk": trunk, "head": jnp.zeros(width, jnp.float32)}

    return RewardModel(init, score, from_trunk)


def pool(hidden: jax.Array, mask: jax.Array, pooling: Literal["last", "mean"]) -> jax.Array:
    """Returns one state a row, `[N, D]` from `[N, T, D]`: that of the last real token, or the mean of all in float32."""
    if pooling == "mean":
        precise = wide(hidden.dtype)
        real = mask.astype(precise)[..., None]
        return jnp.sum(hidden.astype(precise) * real, axis=1) / jnp.sum(real, axis=1)
    columns = jnp.arange(mask.shape[1])[None, :]
    last = jnp.max(jnp.where(mask.astype(bool), columns, 0), axis=1)
    return jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]


def score_responses(
    reward: RewardModel, params: Params, prompts: Prompts, responses: Responses, *, microbatches: int = 1
) -> jax.Array:
    """Returns the reward model's score of each response with its prompt, `[B, M, K]`, computed in microbatches."""
    rows, (tokens, mask) = flatten_pairs(prompts, responses)
    tokens, mask = jnp.concatenate([rows.tokens, tokens], axis=1), jnp.concatenate([rows.mask, mask], axis=1)
    return in_microbatches(reward.score, microbatches)(params, tokens, mask).reshape(responses.tokens.shape[:3])
