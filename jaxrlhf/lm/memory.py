"""What a run will hold in memory, said before anything is allocated: every array's bytes, by their shapes alone."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax


class MemoryPlan(NamedTuple):
    """Bytes by what they are for; `total` and `of_base` sum them up."""

    parts: dict[str, int]

    @property
    def total(self) -> int:
        """All bytes."""
        return sum(self.parts.values())

    def of_base(self, name: str = "reference") -> float:
        """All bytes as a multiple of one part's, by default the base weights'."""
        return self.total / self.parts[name]


def bytes_of(tree: Any) -> int:
    """Bytes of a pytree of arrays, or of their shapes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def plan_bilevel(init: Callable[..., Any], key: Any, upper: Any, lower: Any, frozen: Any) -> MemoryPlan:
    """Returns the plan of a bilevel state and what it is trained on.

    The arrays of a step in progress (activations, samples, the sampler's cache) come on top.

    Args:
        init: of a `BilevelAlgorithm`.
        key: PRNG key, or its shape.
        upper: the reward's parameters, or their shapes.
        lower: the policy's.
        frozen: `LanguageFrozen`, or its shapes.
    """
    state = jax.eval_shape(init, *(jax.eval_shape(lambda tree=tree: tree) for tree in (key, upper, lower)))
    return plan_of(state, frozen)


def plan_of(state: Any, frozen: Any) -> MemoryPlan:
    """Returns the plan of a `BilevelState` and `LanguageFrozen`, of arrays or shapes."""
    parts = {
        "reference": bytes_of(frozen.reference),
        "annotator": bytes_of(frozen.annotator),
        "reward": bytes_of(state.upper),
        "reward's optimiser": bytes_of(state.upper_optimizer),
        "lower iterates": bytes_of(state.lowers),
        "lower solver": bytes_of(state.solver),
        "counters": bytes_of((state.step, state.inner_error)),
    }
    return MemoryPlan({name: size for name, size in parts.items() if size})
