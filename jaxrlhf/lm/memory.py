"""Memory plan of a run: the bytes of every array, computed from shapes before anything is allocated."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax


class MemoryPlan(NamedTuple):
    """Bytes by purpose, such as `reference` or `reward`."""

    sizes: dict[str, int]

    @property
    def total(self) -> int:
        """All bytes."""
        return sum(self.sizes.values())

    def relative_to(self, purpose: str = "reference") -> float:
        """All bytes as a multiple of those of one purpose, by default the base weights'."""
        return self.total / self.sizes[purpose]


def tree_bytes(tree: Any) -> int:
    """Returns the bytes of a pytree of arrays, or of their shapes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def plan_bilevel(init: Callable[..., Any], key: Any, upper: Any, lower: Any, frozen: Any) -> MemoryPlan:
    """Returns the plan of an algorithm's state and its frozen arrays.

    Temporaries of a step (activations, samples, the sampler's cache) are not included.

    Args:
        init: of the algorithm.
        key: PRNG key, or its shape.
        upper: the reward's parameters, or their shapes.
        lower: the policy's.
        frozen: `LanguageFrozen`, or its shapes.
    """
    state = jax.eval_shape(init, *(jax.eval_shape(lambda tree=tree: tree) for tree in (key, upper, lower)))
    return plan_of(state, frozen)


PURPOSES = {
    "upper": "reward",
    "upper_optimizer": "reward's optimiser",
    "fitted": "reward's optimiser",
    "lowers": "lower iterates",
    "solver": "lower solver",
    "policy": "policy",
    "optimizer": "policy's optimiser",
    "buffer": "kept labels",
}
"""What a field of an algorithm's state is for; of the state of replay or of a controller, those inside it count."""


def plan_of(state: Any, frozen: Any) -> MemoryPlan:
    """Returns the plan of an algorithm's state and of `LanguageFrozen`, of arrays or shapes."""
    sizes = {"reference": tree_bytes(frozen.reference), "annotator": tree_bytes(frozen.annotator)}
    sizes |= dict.fromkeys(PURPOSES.values(), 0)
    _add_sizes(state, sizes)
    return MemoryPlan({purpose: size for purpose, size in sizes.items() if size})


def _add_sizes(state: Any, sizes: dict[str, int]) -> None:
    for name in state._fields:
        part = getattr(state, name)
        if name == "inner":
            _add_sizes(part, sizes)
        else:
            purpose = PURPOSES.get(name, "counters")
            sizes[purpose] = sizes.get(purpose, 0) + tree_bytes(part)
