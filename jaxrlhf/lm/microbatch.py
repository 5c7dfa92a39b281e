"""Microbatches: rows computed a few at a time, for the memory of one microbatch and the same values."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxrlhf.base.types import Params

CPU_TOKENS = 1024
"""Tokens a microbatch on a CPU that is one device; half as many where each core is a device of its own."""


def split(rows: Any, microbatches: int) -> Any:
    """Returns arrays `[N, ...]` as `[microbatches, N / microbatches, ...]`.

    Row r goes to microbatch r mod microbatches: each then has rows of every device that the rows are sharded over.

    Raises:
        ValueError: the microbatches do not divide the rows.
    """
    count = len(jax.tree.leaves(rows)[0])
    if microbatches < 1 or count % microbatches:
        raise ValueError(f"{count} rows do not divide into {microbatches} microbatches.")
    return jax.tree.map(
        lambda leaf: jnp.swapaxes(leaf.reshape(count // microbatches, microbatches, *leaf.shape[1:]), 0, 1), rows
    )


def join(rows: Any) -> Any:
    """Inverts `split`: `[N, ...]` from `[microbatches, N / microbatches, ...]`."""
    return jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1).reshape(-1, *leaf.shape[2:]), rows)


def default_microbatches(rows: int, length: int) -> int:
    """Returns the number of microbatches for rows of this length where the caller gives none.

    1 on accelerators. On a CPU, as many as leave about `CPU_TOKENS` tokens in each: the activations of more fall out of
    the processor's caches from one layer to the next, which doubles the time of a small model. Recomputing each microbatch
    in the backward pass costs less than that.
    """
    per_device = rows_per_cpu_device(rows)
    if per_device is None:
        return 1
    tokens = CPU_TOKENS if per_device == rows else CPU_TOKENS // 2
    return fewest_microbatches(per_device, max_rows=max(1, tokens // length))


def completions_together(count: int, *, prompts: int, microbatches: int) -> int:
    """Returns how many of each prompt's `count` completions a row can hold so that the microbatches divide the rows."""
    together = (size for size in range(count, 0, -1) if count % size == 0)
    return next((size for size in together if prompts * count // size % microbatches == 0), 1)


def rows_per_cpu_device(rows: int) -> int | None:
    """Returns the rows per CPU device in the current trace; None elsewhere.

    A CPU may be several devices, of a core or more each, that replicate the weights and share the rows
    (`JAX_NUM_CPU_DEVICES`, the mesh axis `data`). A mesh with any other axis gives None too: CPUs then stand in for
    accelerators.
    """
    mesh = jax.sharding.get_abstract_mesh()
    replicas = mesh.shape.get("data", 1)
    if jax.default_backend() != "cpu" or mesh.size > replicas:
        return None
    return rows // replicas if rows % replicas == 0 else rows


def fewest_microbatches(rows: int, *, max_rows: int, min_rows: int = 1) -> int:
    """Returns the smallest number of equal microbatches of at most `max_rows` rows; 1 if fewer than `min_rows`."""
    sizes = range(min(max_rows, rows), min_rows - 1, -1)
    return next((rows // size for size in sizes if size and rows % size == 0), 1)


def in_microbatches(function: Callable[..., Any], microbatches: int) -> Callable[..., Any]:
    """Returns `(params, *rows) -> [N, ...]`, the given function computed in microbatches.

    The backward pass recomputes each microbatch in turn and accumulates the gradients: it holds the activations of one
    microbatch, for the price of one more forward pass.

    Args:
        function: `(params, *rows [N, ...]) -> [N, ...]`, independent from row to row.
        microbatches: how many; 1 returns the function unchanged.
    """
    if microbatches == 1:
        return function
    rematerialised = jax.checkpoint(function)

    def run(params: Params, *rows: Any) -> Any:
        return join(jax.lax.map(lambda microbatch: rematerialised(params, *microbatch), split(rows, microbatches)))

    return run
