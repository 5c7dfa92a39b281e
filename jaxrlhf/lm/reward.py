"""Reward models: a language model's trunk with one number on top of the last token, or of their mean."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxrlhf.lm.microbatch import default_microbatches, in_microbatches
from jaxrlhf.lm.transformer.layers import wide
from jaxrlhf.lm.transformer.model import LanguageModel


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
    unused: tuple[str, ...] = ("output_head",),
) -> RewardModel:
    """Reward `head . hidden(x, y)[last real token]`, or of the mean over all real tokens.

    The head starts at zero, so that an untrained reward is 0 everywhere: a bilevel run starts from the reference
    policy, not from the noise of a random head (whose scale would also set the pace of the lower level).

    Args:
        model: whose `hidden` is the trunk.
        pooling: "last" is what `...ForSequenceClassification` has, and the one that is exported; "mean" learns from fewer
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
            return {name: part for name, part in params.items() if name not in unused}
        return params

    def one_state(key):
        one_token = jnp.zeros((1, 1), jnp.int32)
        return model.hidden(model.init(key), one_token, jnp.ones((1, 1), bool))

    width = jax.eval_shape(one_state, jax.random.key(0)).shape[-1]

    def init(key):
        return {"trunk": trunk_of(model.init(key)), "head": jnp.zeros(width, jnp.float32)}

    def score(params, tokens, mask):
        return in_microbatches(read, default_microbatches(*tokens.shape))(params, tokens, mask)

    def read(params, tokens, mask):
        hidden = model.hidden(params["trunk"], tokens, mask)
        precise = wide(hidden.dtype)
        if pooling == "mean":
            real = mask.astype(precise)[..., None]
            state = jnp.sum(hidden.astype(precise) * real, axis=1) / jnp.sum(real, axis=1)
        else:
            columns = jnp.arange(tokens.shape[1])[None, :]
            last = jnp.max(jnp.where(mask.astype(bool), columns, 0), axis=1)
            state = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
        return state.astype(precise) @ params["head"].astype(precise)

    def from_trunk(params):
        # Copies: a step that donates the policy's buffers must not take the reward's with them.
        trunk = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), trunk_of(params))
        return {"trunk": trunk, "head": jnp.zeros(width, jnp.float32)}

    return RewardModel(init, score, from_trunk)
