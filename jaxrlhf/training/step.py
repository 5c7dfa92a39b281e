"""Compilation in one place: shardings and donation for any `BilevelAlgorithm`, and for the steps of `lm.learning`.

Where older code wrote `pmap` or `pjit`, this is `jax.jit` with explicit `NamedSharding`: parameters are replicated, the
prompts of a step are split over the mesh's `data` axis, and the compiler inserts the reductions.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxrlhf.bilevel.descent import BilevelAlgorithm, BilevelInfo, BilevelState
from jaxrlhf.bilevel.problem import Labelled, Sample
from jaxrlhf.types import Batch, Key, Params


class CompiledAlgorithm(NamedTuple):
    """As `BilevelAlgorithm`, compiled. `step` and `update` donate the state: the one given is gone afterwards."""

    step: Callable[[Key, BilevelState, Batch, Params], tuple[BilevelState, BilevelInfo]]
    propose: Callable[[Key, BilevelState, Batch, Params], Sample]
    update: Callable[[Key, BilevelState, Labelled, Params], tuple[BilevelState, BilevelInfo]]


def data_mesh(devices: Sequence[Any] | None = None) -> Mesh:
    """Returns a one-axis mesh `data` over the given devices, all by default."""
    return Mesh(np.asarray(jax.devices() if devices is None else devices), ("data",))


def check_batch(batch: int, mesh: Mesh) -> None:
    """Raises ValueError unless `batch` prompts divide over the mesh's data axis."""
    devices = mesh.shape["data"]
    if batch < 1 or batch % devices:
        raise ValueError(
            f"A batch of {batch} prompts does not divide over {devices} devices; use a positive multiple of {devices}."
        )


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Returns the arrays of `tree` with a copy on every device of the mesh."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def compile_algorithm(algorithm: BilevelAlgorithm, mesh: Mesh) -> CompiledAlgorithm:
    """Returns the algorithm's step and its two halves, jitted over the mesh.

    Args:
        algorithm: any; its `data` has leaves `[B, ...]`.
        mesh: with an axis `data`.
    """
    everywhere, split = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))
    inputs: Any = (everywhere, everywhere, split, everywhere)
    # A sample mixes leaves with and without a batch axis, so its placement is left to the compiler.
    labelled: Any = (everywhere, everywhere, None, everywhere)
    outputs: Any = (everywhere, everywhere)
    return CompiledAlgorithm(
        step=jax.jit(algorithm.step, in_shardings=inputs, out_shardings=outputs, donate_argnums=1),
        propose=jax.jit(algorithm.propose, in_shardings=inputs),
        update=jax.jit(algorithm.update, in_shardings=labelled, out_shardings=outputs, donate_argnums=1),
    )


def compile_update(update: Callable, mesh: Mesh) -> Callable:
    """Returns an `(state, batch, frozen) -> (state, info)`, jitted over the mesh; rows are split, the state is donated."""
    everywhere, split = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))
    return jax.jit(
        update,
        in_shardings=(everywhere, split, everywhere),
        out_shardings=(everywhere, everywhere),
        donate_argnums=0,
    )


def outer_step(
    compiled: CompiledAlgorithm, annotate: Callable[[Key, Sample], Any] | None = None
) -> Callable[[Key, BilevelState, Batch, Params], tuple[BilevelState, BilevelInfo]]:
    """Returns one outer step, with labels from the traced annotator or from a host's.

    Args:
        compiled: the compiled algorithm.
        annotate: `(key, sample) -> labels [B, M, L]`, plain Python; None uses the algorithm's own.
    """
    if annotate is None:
        return compiled.step

    def step(key: Key, state: BilevelState, data: Batch, frozen: Params):
        sample_key, label_key, update_key = jax.random.split(key, 3)
        sample = compiled.propose(sample_key, state, data, frozen)
        return compiled.update(update_key, state, Labelled(sample, annotate(label_key, sample)), frozen)

    return step
