"""The keys and values of a decoder's prompts and completions so far.

Shapes: N rows, C cache columns, L layers, K key/value heads, H head size.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Cache(NamedTuple):
    """Keys and values so far, so that a decoding step writes each in place.

    Attributes:
        layers: parameters of each layer where layers are unrolled, so that no step slices the stack again; else None.
        keys: rotated, `[L, N, K, H, C]`; where layers are unrolled a tuple of L arrays, which need no slicing. With a
            single row these have no axis N: compilers would drop it in products, and copy the cache between the shapes.
        values: likewise, `[L, N, K, C, H]`.
        valid: `[N, C]`, True where a real token has been written.
        positions: `[N]` int32, position of the next token.
        column: scalar int32, column of the next token, in every row.
    """

    layers: Any
    keys: Any
    values: Any
    valid: jax.Array
    positions: jax.Array
    column: jax.Array


def append(kept: Any, new: jax.Array, index: Any, column: jax.Array, *, axis: int) -> tuple[Any, jax.Array]:
    """Returns keys or values of all layers with one more column in layer `index`, and those of that layer."""
    if isinstance(kept, tuple):
        update = new.reshape(new.shape[-kept[index].ndim :])
        layer = jax.lax.dynamic_update_slice_in_dim(kept[index], update, column, axis=axis)
        return (*kept[:index], layer, *kept[index + 1 :]), layer.reshape(-1, *layer.shape[-3:])
    start = [jnp.zeros((), jnp.int32)] * kept.ndim
    start[0], start[axis] = index, column
    kept = jax.lax.dynamic_update_slice(kept, new[None], start)
    return kept, jax.lax.dynamic_index_in_dim(kept, index, keepdims=False)


def repeated(cache: Cache, count: int) -> Cache:
    """Returns the cache with each of its rows `count` times in a row."""
    unrolled = isinstance(cache.keys, tuple)

    def rows(leaf: jax.Array) -> jax.Array:
        # A single row of unrolled layers has no axis of rows.
        leaf = leaf[None] if unrolled and leaf.ndim == 3 else leaf
        return jnp.repeat(leaf, count, axis=0 if unrolled else 1)

    keys, values = jax.tree.map(rows, (cache.keys, cache.values))
    valid, positions = (jnp.repeat(leaf, count, axis=0) for leaf in (cache.valid, cache.positions))
    return cache._replace(keys=keys, values=values, valid=valid, positions=positions)
