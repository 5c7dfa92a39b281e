"""The lower iterates: one policy for each tilt s_i, stacked as one pytree with leaves `[S, ...]`.

The first has the tilt 0, and "tilt 0" is short for it: the policy that samples, is reported and is deployed.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxrlhf.base.types import Params


def stack(params: Params, count: int) -> Params:
    """Returns `count` copies of one policy, leaves `[S, ...]`."""
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (count, *leaf.shape)), params)


def first(stacked: Any) -> Any:
    """Returns the first entry of every leaf: the policy at tilt 0."""
    return jax.tree.map(lambda leaf: leaf[0], stacked)


def at(stacked: Any, index: int | jax.Array) -> Any:
    """Returns the entry `index` of every leaf."""
    return jax.tree.map(lambda leaf: leaf[index], stacked)


def map_iterates(function: Callable, *, sequential: bool = False) -> Callable:
    """Maps a function over stacked arguments: all iterates at once, or one after another in the memory of one."""
    return (lambda *stacked: jax.lax.map(lambda each: function(*each), stacked)) if sequential else jax.vmap(function)
