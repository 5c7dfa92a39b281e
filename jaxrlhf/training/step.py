"""Compilation in one place: shardings and donation for any `Algorithm`, and for the steps of `lm.learning`.

This is `jax.jit` with explicit `NamedSharding`, where older code used `pmap` or `pjit`: the prompts of a step are split
over the mesh axes `data` and `fsdp`, the state is laid out by `sharding.shardings` (replicated by default), and the
compiler inserts the communication. `propose` and `update` share the weights in place.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from jaxrlhf.base.algorithm import Algorithm, Info, State
from jaxrlhf.base.problem import Labelled, Sample
from jaxrlhf.base.types import Batch, Key, Params
from jaxrlhf.preferences.mixture import attach_scores
from jaxrlhf.training.processes import gathered
from jaxrlhf.training.sharding import RULES, make_mesh


def data_mesh(devices: Sequence[Any] | None = None) -> Mesh:
    """Returns the mesh whose axis `data` has the given devices (all by default)."""
    return make_mesh({"data": -1}, devices=devices)


def check_batch(batch: int, mesh: Mesh) -> None:
    """Raises ValueError unless `batch` prompts divide over the mesh's axes that split a batch."""
    devices = math.prod(mesh.shape[axis] for axis in RULES["batch"])
    if batch < 1 or batch % devices:
        raise ValueError(
            f"A batch of {batch} prompts does not divide over {devices} devices; use a positive multiple of {devices}."
        )


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Returns the arrays of `tree` replicated over the mesh."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def put_on_devices(tree: Any, shardings: Any) -> Any:
    """Returns the arrays of `tree` with the given shardings, one for all or one each; a device receives its shard only.

    With several processes, all of them must hold the same arrays.
    """
    if isinstance(shardings, Sharding):
        return jax.tree.map(lambda leaf: _put(leaf, shardings), tree)
    return jax.tree.map(_put, tree, shardings)


def _put(leaf: Any, sharding: Sharding) -> jax.Array:
    if sharding.is_fully_addressable or (isinstance(leaf, jax.Array) and not leaf.is_fully_addressable):
        return jax.device_put(leaf, sharding)
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(_put(jax.random.key_data(leaf), sharding), impl=jax.random.key_impl(leaf))
    array = np.asarray(leaf)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of arrays `[B, ...]`."""
    return NamedSharding(mesh, PartitionSpec(RULES["batch"]))


def _on_all_devices(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and not leaf.is_fully_addressable


def init_on_devices(init: Callable[..., Any], *arguments: Any, shardings: Any) -> Any:
    """Returns an initial state, created with its shardings: no device ever holds more than its shard.

    Args:
        init: an algorithm's.
        arguments: of `init`, on the host or on devices.
        shardings: of the state: `shardings(jax.eval_shape(init, *arguments), mesh, names_of)`.
    """
    return jax.jit(init, out_shardings=shardings)(*arguments)


def compile_algorithm(algorithm: Algorithm, mesh: Mesh, *, state: Any = None, frozen: Any = None) -> Algorithm:
    """Returns the algorithm's step and its two halves, jitted over the mesh.

    Args:
        algorithm: its `data` has leaves `[B, ...]`.
        mesh: from `sharding.make_mesh`.
        state: shardings of the state; replicated by default.
        frozen: shardings of the frozen argument; replicated by default.
    """
    replicated, by_batch = NamedSharding(mesh, PartitionSpec()), batch_sharding(mesh)
    state = replicated if state is None else state
    frozen = replicated if frozen is None else frozen
    labelled = labelled_shardings(mesh)
    inputs: Any = (replicated, state, by_batch, frozen)
    labelled_inputs: Any = (replicated, state, labelled, frozen)
    outputs: Any = (state, replicated)

    def put_data(data):
        return put_on_devices(data, by_batch)

    def put_labels(labelled):
        # Labels, and whatever else came from the hosts, such as scores of the responses.
        return jax.tree.map(lambda leaf: leaf if _on_all_devices(leaf) else _put(leaf, by_batch), labelled)

    step = jax.jit(within(mesh, algorithm.step), in_shardings=inputs, out_shardings=outputs, donate_argnums=1)
    propose = jax.jit(within(mesh, algorithm.propose), in_shardings=inputs, out_shardings=labelled.sample)
    update = jax.jit(
        within(mesh, algorithm.update), in_shardings=labelled_inputs, out_shardings=outputs, donate_argnums=1
    )
    return Algorithm(
        init=jax.jit(algorithm.init, out_shardings=state),
        step=_from_hosts(step, replicated, put_data),
        propose=_from_hosts(propose, replicated, put_data),
        update=_from_hosts(update, replicated, put_labels),
    )


def _from_hosts(function: Any, replicated: Sharding, put_data: Callable[[Any], Any]) -> Any:
    """Puts host arrays on devices first, if there are several processes; in a single one `jit` does that itself."""
    if jax.process_count() == 1:
        return function
    return lambda key, state, data, frozen: function(put_on_devices(key, replicated), state, put_data(data), frozen)


def within(mesh: Mesh, function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the function traced under the mesh, so that it can constrain shardings."""

    def run(*arguments):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*arguments)

    return run


def labelled_shardings(mesh: Mesh) -> Labelled:
    """Returns the shardings of a labelled sample: responses and labels are split like their prompts."""
    by_batch: Any = batch_sharding(mesh)
    replicated: Any = dict.fromkeys(("from_policy", "num_draws"), NamedSharding(mesh, PartitionSpec()))
    return Labelled(Sample(**{name: replicated.get(name, by_batch) for name in Sample._fields}), by_batch)


def compile_update(update: Callable, mesh: Mesh, *, state: Any = None, frozen: Any = None) -> Callable:
    """Returns `update` jitted over the mesh; rows are split over devices, and the state is donated.

    Args:
        update: `(state, batch, frozen) -> (state, info)`.
        mesh: from `sharding.make_mesh`.
        state, frozen: shardings, as in `compile_algorithm`.
    """
    replicated, by_batch = NamedSharding(mesh, PartitionSpec()), batch_sharding(mesh)
    state = replicated if state is None else state
    inputs: Any = (state, by_batch, replicated if frozen is None else frozen)
    compiled = jax.jit(within(mesh, update), in_shardings=inputs, out_shardings=(state, replicated), donate_argnums=0)
    if jax.process_count() == 1:
        return compiled
    return lambda state, batch, frozen: compiled(state, put_on_devices(batch, by_batch), frozen)


def compile_annotator(
    annotate: Callable[..., jax.Array], mesh: Mesh, *, frozen: Any = None, further: int = 0
) -> Callable[..., jax.Array]:
    """Returns a traceable annotator `(key, sample, frozen) -> labels`, jitted over the mesh for use between the halves.

    Args:
        annotate: the annotator.
        mesh: from `sharding.make_mesh`.
        frozen: as in `compile_algorithm`.
        further: number of its arguments behind these, replicated.
    """
    replicated, by_batch = NamedSharding(mesh, PartitionSpec()), batch_sharding(mesh)
    inputs: Any = (replicated, labelled_shardings(mesh).sample, replicated if frozen is None else frozen)
    inputs += (replicated,) * further
    compiled = jax.jit(within(mesh, annotate), in_shardings=inputs, out_shardings=by_batch)
    return lambda key, *others: compiled(put_on_devices(key, replicated), *others)


def make_outer_step(
    compiled: Algorithm,
    annotate: Callable[[Key, Sample], Any] | None = None,
    *,
    traced: Callable[..., jax.Array] | None = None,
    score: Callable[[Key, Sample], Any] | None = None,
    choose: Callable[[State, Sample, Params], jax.Array] | None = None,
) -> Callable[[Key, State, Batch, Params], tuple[State, Info]]:
    """Returns the outer step, with labels from the algorithm's traced annotator or from a host annotator.

    Args:
        compiled: the compiled algorithm.
        annotate: `(key, sample) -> labels [B, M, L]` in plain Python, called in every process with all prompts and
            responses on the host; None uses the algorithm's own annotator.
        traced: of `compile_annotator`, where there is no `annotate` but the halves are used for the sake of `score`.
        score: `(key, sample) -> scores [B, M, 2, K]`, in plain Python like `annotate`; attached to the sample as by
            `mixture.attach_scores`.
        choose: `(state, sample, frozen) -> indices [N]` of the pairs to ask about, counted row by row, compiled; they are
            the last argument of `annotate` and of `traced`.
    """
    if annotate is None and score is None and choose is None:
        return compiled.step

    def step(key: Key, state: State, data: Batch, frozen: Params):
        sample_key, label_key, update_key = jax.random.split(key, 3)
        sample = compiled.propose(sample_key, state, data, frozen)
        on_host = sample._replace(prompts=gathered(sample.prompts), responses=gathered(sample.responses))
        chosen = () if choose is None else (choose(state, sample, frozen),)
        if annotate is not None:
            labels = annotate(label_key, on_host, *map(gathered, chosen))
        else:
            assert traced is not None
            labels = traced(label_key, sample, frozen, *chosen)
        labelled = Labelled(sample, labels)
        if score is not None:
            labelled = attach_scores(labelled, score(jax.random.fold_in(label_key, 1), on_host))
        return compiled.update(update_key, state, labelled, frozen)

    return step
