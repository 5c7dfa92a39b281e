"""Shardings: a mesh, logical names of array dimensions, and rules from names to mesh axes.

A mesh has four axes, each of size 1 by default:

    data       replicates the weights, splits the batch
    fsdp       splits the weights and optimiser states, gathered as they are used; splits the batch too
    tensor     splits heads, experts (or the MLP) and vocabulary
    stencil    splits the lower iterates

The compiler inserts all communication (`jax.jit` with `NamedSharding`). Dimension names follow from the path of an array
in the state, so that optimiser moments, stacked iterates and tangents are sharded like the parameters they belong to.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "tensor", "stencil")

Names = tuple[str | None, ...]
"""Logical names of an array's dimensions; None for a dimension that is not split."""

RULES: Mapping[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "width": ("fsdp",),
    "heads": ("tensor",),
    "experts": ("tensor",),
    "mlp": ("tensor",),
    "vocabulary": ("tensor",),
    "iterates": ("stencil",),
}
"""Mesh axes of each name; a dimension with any other name is not split."""


def make_mesh(sizes: Mapping[str, int] | None = None, *, devices: Sequence[Any] | None = None) -> Mesh:
    """Returns the mesh over all devices.

    Args:
        sizes: of the axes; at most one is -1, which takes the remaining devices. By default all devices are `data`.
        devices: all by default.

    Raises:
        ValueError: an axis is unknown, or the product of the sizes is not the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = dict(sizes or {"data": -1})
    for name, size in sizes.items():
        if name not in AXES:
            raise ValueError(f"A mesh has the axes {', '.join(AXES)}, not {name!r}.")
        if size < 1 and size != -1:
            raise ValueError(f"The mesh axis {name} needs a size of at least 1, or -1 for what is left, got {size}.")
    open_axes = [name for name, size in sizes.items() if size == -1]
    taken = int(np.prod([size for size in sizes.values() if size != -1], initial=1))
    if len(open_axes) > 1:
        raise ValueError(f"Only one mesh axis can take what is left, not {' and '.join(open_axes)}.")
    if open_axes and len(devices) % taken == 0:
        sizes[open_axes[0]] = len(devices) // taken
    shape = [sizes.get(name, 1) for name in AXES]
    if int(np.prod(shape)) != len(devices):
        asked = " x ".join(f"{name} {size}" for name, size in sizes.items())
        raise ValueError(f"A mesh of {asked} does not fit {len(devices)} devices.")
    return Mesh(np.asarray(devices).reshape(shape), AXES)


def parse_mesh(text: str) -> dict[str, int]:
    """Parses mesh sizes such as `fsdp=8` or `tensor=2,data=-1`.

    Raises:
        ValueError: a part is not `name=number`, or an axis is named twice.
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, equals, size = part.strip().partition("=")
        if name in sizes:
            raise ValueError(f"A mesh names each axis once; {text!r} names {name} twice.")
        try:
            sizes[name] = int(size)
        except ValueError:
            raise ValueError(f"A mesh is written as fsdp=8 or tensor=2,data=-1; {part!r} is no part of one.") from None
        if not equals:
            raise ValueError(f"A mesh is written as fsdp=8 or tensor=2,data=-1; {part!r} is no part of one.")
    return sizes


def specification(
    names: Names, shape: tuple[int, ...], mesh: Mesh, rules: Mapping[str, tuple[str, ...]] = RULES
) -> PartitionSpec:
    """Returns an array's partition by its names, each mesh axis at most once; sizes that do not divide are not split."""
    parts, used = [], set()
    for name, size in zip(names, shape, strict=True):
        axes = tuple(axis for axis in rules.get(name or "", ()) if mesh.shape[axis] > 1 and axis not in used)
        if not axes or size % int(np.prod([mesh.shape[axis] for axis in axes])):
            parts.append(None)
            continue
        used.update(axes)
        parts.append(axes[0] if len(axes) == 1 else axes)
    return PartitionSpec(*parts)


def shardings(
    tree: Any,
    mesh: Mesh,
    names_of: Callable[[tuple[str, ...], tuple[int, ...]], Names],
    *,
    rules: Mapping[str, tuple[str, ...]] = RULES,
) -> Any:
    """Returns a `NamedSharding` for every array of a tree (arrays, or their shapes).

    Args:
        tree: a state, parameters, a frozen argument.
        mesh: from `make_mesh`.
        names_of: `(path, shape) -> ` the names of an array's dimensions; the path is a tuple of strings.
        rules: mesh axes by name.
    """

    def sharding(path, leaf):
        names = names_of(tuple(_text(part) for part in path), leaf.shape)
        return NamedSharding(mesh, specification(names, leaf.shape, mesh, rules))

    return jax.tree_util.tree_map_with_path(sharding, tree)


def by_size(path: tuple[str, ...], shape: tuple[int, ...]) -> Names:
    """Names the largest dimension `width` if there are at least two: a default for parameters of unknown structure."""
    del path
    if len(shape) < 2:
        return (None,) * len(shape)
    largest = int(np.argmax(shape))
    return tuple("width" if axis == largest else None for axis in range(len(shape)))


def _text(part: Any) -> str:
    for name in ("key", "name", "idx"):
        if hasattr(part, name):
            return str(getattr(part, name))
    return str(part)
