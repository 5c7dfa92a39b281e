"""The arithmetic of a decoder's layer as pure functions: norms, positions, rotation, grouped-query attention.

Products, norms and softmax are computed in float32 at least, whatever the parameters' dtype.

Shapes: N rows, T query columns, S key columns, K key/value heads, G query heads a key/value head,
H head size.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxrlhf.lm.transformer.config import RopeScaling

# Finite, so that a query with no key to look at gives a finite (and unused) average instead of NaN, in
# gradients too.
MASKED_SCORE = -1e30


def wide(dtype: jnp.dtype) -> jnp.dtype:
    """The dtype that norms, softmax and logits are computed in: float32, or float64 for float64 inputs."""
    return jnp.promote_types(dtype, jnp.float32)


def rms_norm(x: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
    """`x / sqrt(mean(x^2) + epsilon) * scale` over the last axis, given back in x's dtype.

    Args:
        x: `[..., D]`.
        scale: `[D]`.
        epsilon: added to the mean square.

    Returns:
        `[..., D]` (Zhang and Sennrich, arXiv 1910.07467).
    """
    precise = x.astype(wide(x.dtype))
    precise = precise * jax.lax.rsqrt(jnp.mean(precise * precise, axis=-1, keepdims=True) + epsilon)
    return (jnp.reshape(scale, (1,) * (x.ndim - 1) + scale.shape) * precise.astype(x.dtype)).astype(x.dtype)


def rms_norm_from_one(x: jax.Array, offset: jax.Array, epsilon: float) -> jax.Array:
    """`x / sqrt(mean(x^2) + epsilon) * (1 + offset)`, multiplied before it is rounded to x's dtype, as Gemma does."""
    precise = x.astype(wide(x.dtype))
    precise = precise * jax.lax.rsqrt(jnp.mean(precise * precise, axis=-1, keepdims=True) + epsilon)
    scale = 1.0 + offset.astype(precise.dtype)
    return (jnp.reshape(scale, (1,) * (x.ndim - 1) + scale.shape) * precise).astype(x.dtype)


def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float) -> jax.Array:
    """`(x - mean(x)) / sqrt(var(x) + epsilon) * scale + bias` over the last axis, in x's dtype (arXiv 1607.06450)."""
    precise = x.astype(wide(x.dtype))
    precise = precise - jnp.mean(precise, axis=-1, keepdims=True)
    precise = precise * jax.lax.rsqrt(jnp.mean(precise * precise, axis=-1, keepdims=True) + epsilon)
    scale, bias = (jnp.reshape(part.astype(precise.dtype), (1,) * (x.ndim - 1) + part.shape) for part in (scale, bias))
    return (scale * precise + bias).astype(x.dtype)


def positions_of(mask: jax.Array) -> jax.Array:
    """Number of real tokens of the same text before each column: `[N, T]` int32, 0 on leading padding.

    Args:
        mask: `[N, T]`, True on real tokens; or numbers, 0 on padding and growing along the row from one text to the next.
    """
    if mask.dtype == jnp.bool_:
        return jnp.maximum(jnp.cumsum(mask.astype(jnp.int32), axis=1) - 1, 0)
    before = jnp.cumsum((mask > 0).astype(jnp.int32), axis=1) - 1
    largest = jax.lax.cummax(mask, axis=1)
    begins = largest > jnp.pad(largest[:, :-1], ((0, 0), (1, 0)))
    return jnp.maximum(before - jax.lax.cummax(jnp.where(begins, before, 0), axis=1), 0)


def frequencies(head_size: int, base: float, scaling: RopeScaling | None = None) -> jax.Array:
    """Radians a position of every feature pair, `base^(-2 i / H)` unless stretched.

    Args:
        head_size: H, even.
        base: the slowest pair turns once in about `2 pi base` positions.
        scaling: how long contexts were reached.

    Returns:
        float32 `[H / 2]` (RoFormer, arXiv 2104.09864, section 3.2.2; the stretching of Llama 3 as its weights need it).
    """
    frequency = base ** (-jnp.arange(0, head_size, 2, dtype=jnp.float32) / head_size)
    if scaling is None:
        return frequency
    if scaling.low is None or scaling.high is None or scaling.original_length is None:
        return frequency / scaling.factor
    turns = scaling.original_length * frequency / (2 * math.pi)
    kept = jnp.clip((turns - scaling.low) / (scaling.high - scaling.low), 0.0, 1.0)
    return frequency * (kept + (1.0 - kept) / scaling.factor)


def rotary(positions: jax.Array, frequency: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of `position * frequency`.

    Args:
        positions: `[...]` int32.
        frequency: `[H / 2]`, of `frequencies`.

    Returns:
        Two float32 arrays `[..., H / 2]`.
    """
    angle = positions[..., None].astype(jnp.float32) * jnp.reshape(frequency, (1,) * positions.ndim + (-1,))
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x: jax.Array, rotation: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Turns the feature pairs (i, i + H / 2) of every head by the same angles.

    Args:
        x: `[..., heads, H]`.
        rotation: cosines and sines, `[..., H / 2]` each.

    Returns:
        `[..., heads, H]` in x's dtype.
    """
    cosine, sine = (part[..., None, :] for part in rotation)
    first, second = jnp.split(x.astype(wide(x.dtype)), 2, axis=-1)
    turned = (first * cosine - second * sine, second * cosine + first * sine)
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def capped(x: jax.Array, cap: float | None) -> jax.Array:
    """`cap tanh(x / cap)`, or x where there is no cap (Gemma 2, arXiv 2408.00118, section 2)."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def attend(
    query: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    allowed: jax.Array,
    *,
    scale: float | None = None,
    cap: float | None = None,
) -> jax.Array:
    """`softmax(q k scale) v` with grouped queries.

    Args:
        query: `[N, T, K, G, H]`.
        keys: `[N, K, H, S]`: so a cache of them is read in order.
        values: `[N, K, S, H]`.
        allowed: `[N, T, S]`, True where a query may look.
        scale: of the scores; None is `H^-1/2`.
        cap: of the scores; see `capped`.

    Returns:
        `[N, T, K * G * H]` in the values' dtype (grouped queries: arXiv 2305.13245).
    """
    rows, length, heads, group, size = query.shape
    query = query * (size**-0.5 if scale is None else scale)
    # The queries of a group share their keys: as rows of one matrix they make one product a key/value head.
    query = jnp.transpose(query, (0, 2, 3, 1, 4)).reshape(rows, heads, group * length, size)
    scores = jnp.einsum("nkth,nkhs->nkts", query, keys, preferred_element_type=wide(keys.dtype))
    scores = capped(scores.reshape(rows, heads, group, length, -1), cap)
    scores = jnp.where(allowed[:, None, None], scores, MASKED_SCORE)
    weights = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
    # Divided after the product with the values: H numbers a query instead of S.
    total = jnp.sum(weights, axis=-1).reshape(rows, heads, group * length, 1)
    weights = weights.reshape(rows, heads, group * length, -1).astype(values.dtype)
    out = jnp.einsum("nkts,nksh->nkth", weights, values, preferred_element_type=wide(values.dtype)) / total
    out = jnp.transpose(out.reshape(rows, heads, group, length, size), (0, 3, 1, 2, 4))
    return out.reshape(rows, length, -1).astype(values.dtype)


def attend_causally(
    query: jax.Array, keys: jax.Array, values: jax.Array, allowed: jax.Array, **settings: Any
) -> jax.Array:
    """`attend` of a whole row to itself (S = T), where no query looks at a key of a later column.

    Queries go in `pieces`, each without the keys behind its last column: of the square of scores, two pieces compute 3/4,
    four 5/8.
    """
    parts = [
        attend(query[:, begin:end], keys[..., :end], values[:, :, :end], allowed[:, begin:end, :end], **settings)
        for begin, end in pieces(query.shape[1])
    ]
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)


def pieces(columns: int) -> list[tuple[int, int]]:
    """Returns where pieces of a row begin and end: one of less than 32 columns, two of less than 512, else four."""
    size = -(-columns // (1 if columns < 32 else 2 if columns < 512 else 4))
    return [(begin, min(begin + size, columns)) for begin in range(0, columns, size)]


def split_rows(x: jax.Array) -> jax.Array:
    """Keeps the rows of `x [N, ...]` where the batch's are, on the axes `data` and `fsdp` of a mesh that is in use.

    Compilers would else leave weights where they are and move activations, which are larger.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = tuple(name for name in ("data", "fsdp") if name in mesh.axis_names and mesh.shape[name] > 1)
    if not axes or x.shape[0] % math.prod(mesh.shape[name] for name in axes):
        return x
    free = jax.sharding.PartitionSpec.UNCONSTRAINED
    return jax.lax.with_sharding_constraint(x, jax.sharding.PartitionSpec(axes, *[free] * (x.ndim - 1)))
