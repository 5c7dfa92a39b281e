"""Pairs of responses to prompts: their arrays, where the second response comes from, and one row a response for models.

Shapes: B prompts, P prompt columns, M pairs a prompt, K responses a pair, L completion columns.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

Against = Literal["reference", "policy", "self"]
"""Where the second response of a pair comes from: the reference policy; the policy again, trained on both responses; or
the policy again as a fixed opponent (self-play: updates see every pair from both sides, `preferences.from_both_sides`)."""


class Prompts(NamedTuple):
    """The `data` of a step.

    Attributes:
        tokens: `[B, P]` int32, padded on either side.
        mask: `[B, P]`, True on real tokens.
    """

    tokens: jax.Array
    mask: jax.Array


class Responses(NamedTuple):
    """The `responses` of a sample: tokens `[B, M, 2, L]` and their mask, stop token included."""

    tokens: jax.Array
    mask: jax.Array


def from_policy(against: Against, dtype: Any) -> jax.Array:
    """Returns `Sample.from_policy`, `[2]`: 1 where the policy fills a slot, 0 where the reference does."""
    return jnp.array([1.0, 0.0 if against == "reference" else 1.0], dtype)


def flatten_pairs(prompts: Prompts, responses: Responses) -> tuple[Prompts, Responses]:
    """Returns one row a response: prompts `[B * M * K, P]` and responses `[B * M * K, L]` from `[B, M, K, L]`."""
    count = responses.tokens.shape[1] * responses.tokens.shape[2]
    rows = Prompts(*(jnp.repeat(leaf, count, axis=0) for leaf in prompts))
    return rows, Responses(*(leaf.reshape(-1, leaf.shape[-1]) for leaf in responses))


def beside_prompts(prompts: Prompts, responses: Responses, together: int) -> tuple[Prompts, Responses]:
    """Returns rows of a prompt and `together` of its responses, C.

    Args:
        prompts: `[B, P]`.
        responses: `[B * K, L]`, K of each prompt in a row.
        together: C, a divisor of K.

    Returns:
        Prompts `[B K / C, P]` and responses `[B K / C, C, L]`.
    """
    count = len(responses.tokens) // len(prompts.tokens) // together
    rows = Prompts(*(jnp.repeat(leaf, count, axis=0) if count > 1 else leaf for leaf in prompts))
    return rows, Responses(*(leaf.reshape(-1, together, leaf.shape[-1]) for leaf in responses))


def both_sides(first: jax.Array) -> jax.Array:
    """Returns values of both slots `[B, 2M, 2, ...]` from those of the first `[B, 2M, ...]`, in self-play.

    `preferences.from_both_sides` appends each pair with its responses swapped, so the second response of a pair is the
    first response M places on.
    """
    return jnp.stack([first, jnp.roll(first, first.shape[1] // 2, axis=1)], axis=2)
