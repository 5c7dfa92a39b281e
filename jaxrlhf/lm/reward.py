"""Reward models: a language model's trunk with a linear head on the last token's state, or on the mean of all."""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxrlhf.base.types import Params
from jaxrlhf.lm.microbatch import completions_together, default_microbatches, in_microbatches
from jaxrlhf.lm.pairing import Prompts, Responses, beside_prompts, flatten_pairs
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
        score_completions: `(params, prompts [N, P], mask, completions [N, C, L], mask) -> [N, C]`, `score` of each
            completion after its prompt, which is read once; None where only `score` is known. Replace both together.
    """

    init: Callable[[jax.Array], Any]
    score: Callable[[Any, jax.Array, jax.Array], jax.Array]
    from_trunk: Callable[[Any], Any]
    score_completions: Callable[[Any, jax.Array, jax.Array, jax.Array, jax.Array], jax.Array] | None = None


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

    def from_trunk(params):
        # Copies: a step that donates the policy's buffers must not take the reward's with them.
        trunk = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), trunk_of(params))
        return {"trunk": trunk, "head": jnp.zeros(width, jnp.float32)}

    score, score_completions = _scores(model, pooling)
    return RewardModel(init, score, from_trunk, score_completions)


def _scores(model: LanguageModel, pooling: Literal["last", "mean"]) -> tuple[Callable, Callable | None]:
    """Returns `RewardModel.score` and `score_completions`."""

    def of_state(params, state):
        precise = wide(state.dtype)
        return state.astype(precise) @ params["head"].astype(precise)

    def read(params, tokens, mask):
        return of_state(params, pool(model.hidden(params["trunk"], tokens, mask), mask, pooling))

    def score(params, tokens, mask):
        return in_microbatches(read, default_microbatches(*tokens.shape))(params, tokens, mask)

    if model.shared_prompts is None:
        return score, None
    hidden = model.shared_prompts.hidden

    def read_completions(params, prompts, prompt_mask, completions, mask):
        masks = prompt_mask.astype(bool), mask.astype(bool)
        states = hidden(params["trunk"], prompts, masks[0], completions, masks[1])
        return of_state(params, pool_completions(*states, *masks, pooling))

    def score_completions(params, *rows):
        length = rows[0].shape[1] + math.prod(rows[2].shape[1:])
        return in_microbatches(read_completions, default_microbatches(len(rows[0]), length))(params, *rows)

    return score, score_completions


def pool(hidden: jax.Array, mask: jax.Array, pooling: Literal["last", "mean"]) -> jax.Array:
    """Returns one state a row, `[N, D]` from `[N, T, D]`: that of the last real token, or the mean of all in float32."""
    if pooling == "mean":
        precise = wide(hidden.dtype)
        real = mask.astype(precise)[..., None]
        return jnp.sum(hidden.astype(precise) * real, axis=1) / jnp.sum(real, axis=1)
    columns = jnp.arange(mask.shape[1])[None, :]
    last = jnp.max(jnp.where(mask.astype(bool), columns, 0), axis=1)
    return jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]


def pool_completions(
    of_prompts: jax.Array,
    of_completions: jax.Array,
    prompt_mask: jax.Array,
    mask: jax.Array,
    pooling: Literal["last", "mean"],
) -> jax.Array:
    """Returns `pool` of each completion after its prompt, `[N, C, D]` from states `[N, P, D]` and `[N, C, L, D]`."""
    rows, count = of_completions.shape[:2]
    of_completions, flat = (
        of_completions.reshape(rows * count, *of_completions.shape[2:]),
        mask.reshape(rows * count, -1),
    )
    if pooling == "mean":
        states, masks = jnp.repeat(of_prompts, count, axis=0), jnp.repeat(prompt_mask, count, axis=0)
        whole = jnp.concatenate([states, of_completions], axis=1), jnp.concatenate([masks, flat], axis=1)
        return pool(*whole, pooling).reshape(rows, count, -1)
    # A completion without a real token ends with its prompt.
    of_prompt = jnp.repeat(pool(of_prompts, prompt_mask, pooling), count, axis=0)
    ended = jnp.any(flat, axis=1, keepdims=True)
    return jnp.where(ended, pool(of_completions, flat, pooling), of_prompt).reshape(rows, count, -1)


def score_responses(
    reward: RewardModel, params: Params, prompts: Prompts, responses: Responses, *, microbatches: int = 1
) -> jax.Array:
    """Returns the reward model's score of each response with its prompt, `[B, M, K]`, computed in microbatches."""
    shape = responses.tokens.shape[:3]
    count = shape[1] * shape[2]
    together = completions_together(count, prompts=shape[0], microbatches=microbatches)
    if reward.score_completions is not None and together > 1:
        flat = Responses(*(leaf.reshape(-1, leaf.shape[-1]) for leaf in responses))
        rows, grouped = beside_prompts(prompts, flat, together)
        return in_microbatches(reward.score_completions, microbatches)(params, *rows, *grouped).reshape(shape)
    rows, (tokens, mask) = flatten_pairs(prompts, responses)
    tokens, mask = jnp.concatenate([rows.tokens, tokens], axis=1), jnp.concatenate([rows.mask, mask], axis=1)
    return in_microbatches(reward.score, microbatches)(params, tokens, mask).reshape(shape)
