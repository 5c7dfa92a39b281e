"""Compilation in one place: shardings and donation for any `BilevelAlgorithm`, and for the steps of `lm.learning`.

Where older code wrote `pmap` or `pjit`, this is `jax.jit` with explicit `NamedSharding`: the prompts of a step are
split over the mesh's axes `data` and `fsdp`, the state lies as `sharding.shardings` says (by default a copy on every
device), and the compiler inserts the communication. Proposing and updating share the weights where they lie.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from jaxrlhf.base.problem import Labelled, Sample
from jaxrlhf.base.types import Batch, Key, Params
from jaxrlhf.bilevel.descent import BilevelAlgorithm, BilevelInfo, BilevelState
from jaxrlhf.training.processes import gathered
from jaxrlhf.training.sharding import RULES, make_mesh


class CompiledAlgorithm(NamedTuple):
    """As `BilevelAlgorithm`, compiled. `step` and `update` donate the state: the one given is gone afterwards."""

    step: Callable[[Key, BilevelState, Batch, Params], tuple[BilevelState, BilevelInfo]]
    propose: Callable[[Key, BilevelState, Batch, Params], Sample]
    update: Callable[[Key, BilevelState, Labelled, Params], tuple[BilevelState, BilevelInfo]]


def data_mesh(devices: Sequence[Any] | None = None) -> Mesh:
    """Returns the mesh whose axis `data` has the given devices, all by default."""
    return make_mesh({"data": -1}, devices=devices)


def check_batch(batch: int, mesh: Mesh) -> None:
    """Raises ValueError unless `batch` prompts divide over the mesh's axes that split a batch."""
    devices = math.prod(mesh.shape[axis] for axis in RULES["batch"])
    if batch < 1 or batch % devices:
        raise ValueError(
            f"A batch of {batch} prompts does not divide over {devices} devices; use a positive multiple of {devices}."
        )


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Returns the arrays of `tree` with a copy on every device of the mesh."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def place(tree: Any, where: Any) -> Any:
    """Returns the arrays of `tree` as `where` says, one sharding or one for each; each device receives its own part only.

    In several processes all of them must hold the same arrays.
    """
    if isinstance(where, Sharding):
        return jax.tree.map(lambda leaf: _placed(leaf, where), tree)
    return jax.tree.map(_placed, tree, where)


def _placed(leaf: Any, where: Sharding) -> jax.Array:
    if where.is_fully_addressable or (isinstance(leaf, jax.Array) and not leaf.is_fully_addressable):
        return jax.device_put(leaf, where)
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(_placed(jax.random.key_data(leaf), where), impl=jax.random.key_impl(leaf))
    host = np.asarray(leaf)
    return jax.make_array_from_callback(host.shape, where, lambda index: host[index])


def split_by_batch(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of arrays `[B, ...]`."""
    return NamedSharding(mesh, PartitionSpec(RULES["batch"]))


def create(init: Callable[..., Any], *arguments: Any, where: Any) -> Any:
    """Returns a first state, made where it will live: no device ever holds more than its part.

    Args:
        init: of an algorithm, with its arguments, as they lie on the host or are placed.
        arguments: consumed.
        where: shardings of the state: `shardings(jax.eval_shape(init, *arguments), mesh, names_of)`.
    """
    return jax.jit(init, out_shardings=where)(*arguments)


def compile_algorithm(
    algorithm: BilevelAlgorithm, mesh: Mesh, *, state: Any = None, frozen: Any = None
) -> CompiledAlgorithm:
    """Returns the algorithm's step and its two halves, jitted over the mesh.

    Args:
        algorithm: any; its `data` has leaves `[B, ...]`.
        mesh: of `sharding.make_mesh`.
        state: shardings of the state; a copy on every device by default.
        frozen: shardings of the frozen argument, likewise.
    """
    everywhere, split = NamedSharding(mesh, PartitionSpec()), split_by_batch(mesh)
    state = everywhere if state is None else state
    frozen = everywhere if frozen is None else frozen
    inputs: Any = (everywhere, state, split, frozen)
    sample = where_labelled(mesh)
    labelled: Any = (everywhere, state, sample, frozen)
    outputs: Any = (state, everywhere)

    def spread(function: Any, place_data: Callable[[Any], Any]) -> Any:
        """What lies on the hosts of several processes is put where the function wants it; one process does that itself."""
        if jax.process_count() == 1:
            return function
        return lambda key, state, data, frozen: function(place(key, everywhere), state, place_data(data), frozen)

    def by_rows(data):
        return place(data, split)

    def labels_by_rows(labelled):
        return labelled._replace(labels=place(labelled.labels, split))

    return CompiledAlgorithm(
        step=spread(
            jax.jit(within(mesh, algorithm.step), in_shardings=inputs, out_shardings=outputs, donate_argnums=1), by_rows
        ),
        propose=spread(
            jax.jit(within(mesh, algorithm.propose), in_shardings=inputs, out_shardings=sample.sample), by_rows
        ),
        update=spread(
            jax.jit(within(mesh, algorithm.update), in_shardings=labelled, out_shardings=outputs, donate_argnums=1),
            labels_by_rows,
        ),
    )


def within(mesh: Mesh, function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the function as it is traced where a mesh is in use, so that it can say where rows belong."""

    def run(*arguments):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*arguments)

    return run


def where_labelled(mesh: Mesh) -> Labelled:
    """Returns the shardings of a labelled sample: responses stay with the prompts that they answer."""
    split: Any = split_by_batch(mesh)
    whole: Any = dict.fromkeys(("from_policy", "draws"), NamedSharding(mesh, PartitionSpec()))
    return Labelled(Sample(**{name: whole.get(name, split) for name in Sample._fields}), split)


def compile_update(update: Callable, mesh: Mesh, *, state: Any = None, frozen: Any = None) -> Callable:
    """Returns an `(state, batch, frozen) -> (state, info)`, jitted over the mesh; rows are split, the state is donated.

    Args:
        update: such a function.
        mesh: of `sharding.make_mesh`.
        state, frozen: shardings, as in `compile_algorithm`.
    """
    everywhere, split = NamedSharding(mesh, PartitionSpec()), split_by_batch(mesh)
    state = everywhere if state is None else state
    inputs: Any = (state, split, everywhere if frozen is None else frozen)
    compiled = jax.jit(within(mesh, update), in_shardings=inputs, out_shardings=(state, everywhere), donate_argnums=0)
    if jax.process_count() == 1:
        return compiled
    return lambda state, batch, frozen: compiled(state, place(batch, split), frozen)


def outer_step(
    compiled: CompiledAlgorithm, annotate: Callable[[Key, Sample], Any] | None = None
) -> Callable[[Key, BilevelState, Batch, Params], tuple[BilevelState, BilevelInfo]]:
    """Returns one outer step, with labels from the traced annotator or from a host's.

    Args:
        compiled: the compiled algorithm.
        annotate: `(key, sample) -> labels [B, M, L]`, plain Python, called with prompts and responses on the host, in
            every process alike; None uses the algorithm's own.
    """
    if annotate is None:
        return compiled.step

    def step(key: Key, state: BilevelState, data: Batch, frozen: Params):
        sample_key, label_key, update_key = jax.random.split(key, 3)
        sample = compiled.propose(sample_key, state, data, frozen)
        seen = sample._replace(prompts=gathered(sample.prompts), responses=gathered(sample.responses))
        return compiled.update(update_key, state, Labelled(sample, annotate(label_key, seen)), frozen)

    return step
