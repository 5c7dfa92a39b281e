"""The outer loop: keys by step number, metrics one step late, nothing else."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax

from jaxrlhf.base.types import Batch, Key, Params


class Progress(NamedTuple):
    """Yielded after an outer step.

    Attributes:
        step: number of steps taken.
        state: the state after it; valid until the iterator is advanced.
        info: diagnostics of the step *before* it (None at the first), so that reading them never waits for the device.
        data: the batch of `info`; None where there is no info.
        latest: diagnostics of this step (None when the iterator only delivers the last `info`); reading them waits.
        given: the batch of this step, likewise.
    """

    step: int
    state: Any
    info: Any
    data: Batch | None = None
    latest: Any = None
    given: Batch | None = None

    @property
    def told(self) -> int:
        """The number of the step that `info` is of."""
        return self.step - (self.latest is not None)


def outer_steps(
    step: Callable[[Key, Any, Batch, Params], tuple[Any, Any]],
    state: Any,
    batches: Iterable[Batch],
    frozen: Params,
    *,
    key: Key,
) -> Iterator[Progress]:
    """Runs one outer step a batch; after the last it yields once more, for the last step's diagnostics.

    Step t uses `fold_in(key, t)`, with t read from the state, so that a resumed run draws what an uninterrupted one would,
    given the batches that remain.

    Args:
        step: `(key, state, data, frozen) -> (state, info)`; the state has a `step`.
        state: to begin with.
        batches: one a step.
        frozen: what is not trained.
        key: of all steps.
    """
    number, late, before = int(state.step), None, None
    for data in batches:
        state, info = step(jax.random.fold_in(key, number), state, data, frozen)
        number += 1
        yield Progress(number, state, late, before, info, data)
        late, before = info, data
    if late is not None:
        yield Progress(number, state, late, before)
