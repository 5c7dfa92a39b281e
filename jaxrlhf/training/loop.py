"""The outer loop: keys by step number, metrics one step late, nothing else."""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import jax

from jaxrlhf.bilevel.descent import BilevelInfo, BilevelState
from jaxrlhf.types import Batch, Key, Params


class Progress(NamedTuple):
    """Yielded after an outer step.

    Attributes:
        step: number of steps taken.
        state: the state after it; valid until the iterator is advanced.
        info: diagnostics of the step *before* it (None at the first), so that reading them never waits for the device.
        latest: diagnostics of this step (None when the iterator only delivers the last `info`); reading them waits.
    """

    step: int
    state: BilevelState
    info: BilevelInfo | None
    latest: BilevelInfo | None = None


def outer_steps(
    step: Callable[[Key, BilevelState, Batch, Params], tuple[BilevelState, BilevelInfo]],
    state: BilevelState,
    batches: Iterable[Batch],
    frozen: Params,
    *,
    key: Key,
) -> Iterator[Progress]:
    """Runs one outer step a batch; after the last it yields once more, for the last step's diagnostics.

    Step t uses `fold_in(key, t)`, with t read from the state, so that a resumed run draws what an uninterrupted one would,
    given the batches that remain.
    """
    number, late = int(state.step), None
    for data in batches:
        state, info = step(jax.random.fold_in(key, number), state, data, frozen)
        number += 1
        yield Progress(number, state, late, info)
        late = info
    if late is not None:
        yield Progress(number, state, late)
