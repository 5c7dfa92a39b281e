"""Positions of tokens as pure functions: the mask's, and rotary embeddings with their scalings.

Shapes: N rows, T columns, H head size, R rotated features.
"""

import math

import jax
import jax.numpy as jnp

from jaxrlhf.lm.transformer.config import LongScaling, RopeScaling, YarnScaling
from jaxrlhf.lm.transformer.layers import wide


def positions_of(mask: jax.Array) -> jax.Array:
    """Returns the number of real tokens of the same text before each column: `[N, T]` int32, 0 on leading padding.

    Args:
        mask: `[N, T]`, True on real tokens; or segment ids, 0 on padding and increasing along the row from text to text.
    """
    if mask.dtype == jnp.bool_:
        return jnp.maximum(jnp.cumsum(mask.astype(jnp.int32), axis=1) - 1, 0)
    before = jnp.cumsum((mask > 0).astype(jnp.int32), axis=1) - 1
    largest = jax.lax.cummax(mask, axis=1)
    begins = largest > jnp.pad(largest[:, :-1], ((0, 0), (1, 0)))
    return jnp.maximum(before - jax.lax.cummax(jnp.where(begins, before, 0), axis=1), 0)


def frequencies(
    head_size: int, base: float, scaling: RopeScaling | YarnScaling | LongScaling | None = None
) -> jax.Array:
    """Returns the rotary frequency of every feature pair in radians a position, `base^(-2 i / H)` unless scaled.

    Args:
        head_size: H, even.
        base: the slowest pair rotates once in about `2 pi base` positions.
        scaling: of an extended context.

    Returns:
        float32 `[H / 2]` (RoFormer, arXiv 2104.09864, section 3.2.2; scaled as the scaling's class says).
    """
    frequency = base ** (-jnp.arange(0, head_size, 2, dtype=jnp.float32) / head_size)
    if scaling is None:
        return frequency
    if isinstance(scaling, LongScaling):
        return frequency / jnp.asarray(scaling.short, jnp.float32)
    if isinstance(scaling, YarnScaling):
        kept = _kept_by_yarn(head_size, base, scaling)
        return frequency * (kept + (1.0 - kept) / scaling.factor)
    if scaling.low is None or scaling.high is None or scaling.original_length is None:
        return frequency / scaling.factor
    rotations = scaling.original_length * frequency / (2 * math.pi)
    kept = jnp.clip((rotations - scaling.low) / (scaling.high - scaling.low), 0.0, 1.0)
    return frequency * (kept + (1.0 - kept) / scaling.factor)


def _kept_by_yarn(head_size: int, base: float, scaling: YarnScaling) -> jax.Array:
    """Returns how much of each frequency YaRN keeps, `[H / 2]`: 1 for fast ones, 0 for slow ones."""

    def index_of(rotations: float) -> float:
        # base^(-2 i / H) original_length / (2 pi) = rotations, solved for i.
        return head_size * math.log(scaling.original_length / (2 * math.pi * rotations)) / (2 * math.log(base))

    first, last = index_of(scaling.high), index_of(scaling.low)
    if scaling.whole:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_size - 1)
    ramp = (jnp.arange(head_size // 2, dtype=jnp.float32) - first) / (last - first if last != first else 1e-3)
    return 1.0 - jnp.clip(ramp, 0.0, 1.0)


def rotary(positions: jax.Array, frequency: jax.Array, factor: float = 1.0) -> tuple[jax.Array, jax.Array]:
    """Returns cosines and sines of `position * frequency`, times a factor.

    Args:
        positions: `[...]` int32.
        frequency: `[H / 2]`, from `frequencies`.
        factor: lengthens what is rotated.

    Returns:
        Two float32 arrays `[..., H / 2]`.
    """
    angle = positions[..., None].astype(jnp.float32) * jnp.reshape(frequency, (1,) * positions.ndim + (-1,))
    cosine, sine = jnp.cos(angle), jnp.sin(angle)
    return (cosine, sine) if factor == 1.0 else (factor * cosine, factor * sine)


def rotate(x: jax.Array, rotation: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates the feature pairs (i, i + R / 2) of every head by the same angles; features after the first R are kept.

    Args:
        x: `[..., heads, H]`.
        rotation: cosines and sines, `[..., R / 2]` each.

    Returns:
        `[..., heads, H]` in x's dtype.
    """
    cosine, sine = (leaf[..., None, :] for leaf in rotation)
    size = cosine.shape[-1]
    precise = x.astype(wide(x.dtype))
    first, second, kept = precise[..., :size], precise[..., size : 2 * size], precise[..., 2 * size :]
    rotated = [first * cosine - second * sine, second * cosine + first * sine]
    return jnp.concatenate([*rotated, kept] if kept.shape[-1] else rotated, axis=-1).astype(x.dtype)
