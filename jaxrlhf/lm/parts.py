"""Rows computed some at a time, one part after the other: memory of one part, and the same values."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxrlhf.types import Params


def split(rows: Any, parts: int) -> Any:
    """Returns arrays `[N, ...]` as `[parts, N / parts, ...]`.

    Row r goes to part r mod parts: each part then has rows of every device that the rows are split over.

    Raises:
        ValueError: the parts do not divide the rows.
    """
    count = len(jax.tree.leaves(rows)[0])
    if parts < 1 or count % parts:
        raise ValueError(f"{count} rows do not divide into {parts} parts.")
    return jax.tree.map(lambda leaf: jnp.swapaxes(leaf.reshape(count // parts, parts, *leaf.shape[1:]), 0, 1), rows)


def joined(rows: Any) -> Any:
    """Returns what `split` took apart: `[N, ...]` from `[parts, N / parts, ...]`."""
    return jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1).reshape(-1, *leaf.shape[2:]), rows)


def in_parts(function: Callable[..., Any], parts: int) -> Callable[..., Any]:
    """Returns `(params, *rows) -> ` what `function` does, `[N, ...]` from rows `[N, ...]`, computed in parts.

    A backward pass computes each part again when its turn comes and adds up the gradients: it holds the activations of
    one part, for the price of one more forward pass.

    Args:
        function: `(params, *rows) -> `, row by row.
        parts: how many; 1 is the function itself.
    """
    if parts == 1:
        return function
    piece = jax.checkpoint(function)

    def run(params: Params, *rows: Any) -> Any:
        return joined(jax.lax.map(lambda part: piece(params, *part), split(rows, parts)))

    return run
