"""The training loop: keys by step number, metrics one step late, nothing else."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax

from jaxrlhf.base.types import Batch, Key, Params


class StepProgress(NamedTuple):
    """Yielded after an outer step.

    Attributes:
        step: number of steps taken.
        state: the state after this step; valid until the iterator is advanced.
        info: diagnostics of the *previous* step (None at the first), so that reading them never waits for the device.
        data: the batch of `info`; None if there is no info.
        latest_info: diagnostics of this step (None when the iterator only delivers the last `info`); reading them waits.
        latest_data: the batch of this step, likewise.
    """

    step: int
    state: Any
    info: Any
    data: Batch | None = None
    latest_info: Any = None
    latest_data: Batch | None = None

    @property
    def info_step(self) -> int:
        """The number of the step that `info` belongs to."""
        return self.step - (self.latest_info is not None)


def outer_steps(
    step: Callable[[Key, Any, Batch, Params], tuple[Any, Any]],
    state: Any,
    batches: Iterable[Batch],
    frozen: Params,
    *,
    key: Key,
) -> Iterator[StepProgress]:
    """Runs one outer step per batch; after the last it yields once more, for the last step's diagnostics.

    Step t uses `fold_in(key, t)`, with t read from the state, so that a resumed run uses the same keys as an uninterrupted
    one, given the remaining batches.

    Args:
        step: `(key, state, data, frozen) -> (state, info)`; the state has a `step`.
        state: initial state.
        batches: one per step.
        frozen: parameters that are not trained.
        key: PRNG key of all steps.
    """
    number, previous_info, previous_data = int(state.step), None, None
    for data in batches:
        state, info = step(jax.random.fold_in(key, number), state, data, frozen)
        number += 1
        yield StepProgress(number, state, previous_info, previous_data, info, data)
        previous_info, previous_data = info, data
    if previous_info is not None:
        yield StepProgress(number, state, previous_info, previous_data)
