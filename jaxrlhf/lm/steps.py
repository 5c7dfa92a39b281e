"""What counts as a step of a response: every token (T = L), or the whole completion (T = 1).

The two describe the same problem. Shapes: `[..., L]` by token, `[..., T]` by step.
"""

from typing import Any

import jax
import jax.numpy as jnp


def step_log_probs(token_log_probs: jax.Array, *, per_token: bool) -> jax.Array:
    """Returns log-probabilities `[..., T]` from those of tokens `[..., L]`, 0 on padding; a completion's is their sum."""
    return token_log_probs if per_token else jnp.sum(token_log_probs, axis=-1, keepdims=True)


def cumulative_discount(mask: jax.Array, dtype: Any, *, per_token: bool) -> jax.Array:
    """Returns `Sample.cumulative_discount` `[..., T]`, undiscounted: 1 on the steps taken, from a mask `[..., L]`."""
    return mask.astype(dtype) if per_token else jnp.ones((*mask.shape[:-1], 1), dtype)


def step_rewards(rewards: jax.Array, mask: jax.Array, *, per_token: bool) -> jax.Array:
    """Returns rewards `[..., T]` from those of whole responses `[...]`: all of it on the last token of `mask [..., L]`."""
    rewards = rewards[..., None]
    if not per_token:
        return rewards
    mask = mask.astype(rewards.dtype)
    following = jnp.concatenate([mask[..., 1:], jnp.zeros_like(mask[..., :1])], axis=-1)
    return rewards * (mask - following)
