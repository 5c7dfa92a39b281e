"""Rows computed some at a time, one part after the other: memory of one part, and the same values."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxrlhf.base.types import Params

TOKENS = 1024
"""Of a part on a CPU, in all of its cores; half as many where a core is a device and has microbatches of its own."""


def split(rows: Any, microbatches: int) -> Any:
    """Returns arrays `[N, ...]` as `[microbatches, N / microbatches, ...]`.

    Row r goes to part r mod microbatches: each part then has rows of every device that the rows are split over.

    Raises:
        ValueError: the microbatches do not divide the rows.
    """
    count = len(jax.tree.leaves(rows)[0])
    if microbatches < 1 or count % microbatches:
        raise ValueError(f"{count} rows do not divide into {microbatches} microbatches.")
    return jax.tree.map(
        lambda leaf: jnp.swapaxes(leaf.reshape(count // microbatches, microbatches, *leaf.shape[1:]), 0, 1), rows
    )


def joined(rows: Any) -> Any:
    """Returns what `split` took apart: `[N, ...]` from `[microbatches, N / microbatches, ...]`."""
    return jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1).reshape(-1, *leaf.shape[2:]), rows)


def default_microbatches(rows: int, length: int) -> int:
    """Returns the number of microbatches that rows of some length are read in where nobody says it.

    One; but on a CPU as many as leave about `TOKENS` tokens in each: what a layer computes for more leaves the
    processor's caches before the next layer reads it, at twice the time for a small model, and computing a part again
    in the backward pass costs less than that.
    """
    held = rows_of_a_cpu(rows)
    if held is None:
        return 1
    tokens = TOKENS if held == rows else TOKENS // 2
    return divided(held, most=max(1, tokens // length))


def rows_of_a_cpu(rows: int) -> int | None:
    """Returns how many of the rows each device will have that what is traced runs on; None where that is no CPU.

    A CPU may be several devices, a core or more each, with all weights and their share of the rows (`JAX_NUM_CPU_DEVICES`,
    the mesh axis `data`). None too where a mesh splits anything else: CPUs then stand for other devices.
    """
    mesh = jax.sharding.get_abstract_mesh()
    copies = mesh.shape.get("data", 1)
    if jax.default_backend() != "cpu" or mesh.size > copies:
        return None
    return rows // copies if rows % copies == 0 else rows


def divided(rows: int, *, most: int, least: int = 1) -> int:
    """Returns the smallest number of equal microbatches with at most so many rows each; 1 if that takes fewer than `least`."""
    sizes = range(min(most, rows), least - 1, -1)
    return next((rows // size for size in sizes if size and rows % size == 0), 1)


def in_microbatches(function: Callable[..., Any], microbatches: int) -> Callable[..., Any]:
    """Returns `(params, *rows) -> ` what `function` does, `[N, ...]` from rows `[N, ...]`, computed in microbatches.

    A backward pass computes each part again when its turn comes and adds up the gradients: it holds the activations of
    one part, for the price of one more forward pass.

    Args:
        function: `(params, *rows) -> `, row by row.
        microbatches: how many; 1 is the function itself.
    """
    if microbatches == 1:
        return function
    piece = jax.checkpoint(function)

    def run(params: Params, *rows: Any) -> Any:
        return joined(jax.lax.map(lambda part: piece(params, *part), split(rows, microbatches)))

    return run
