"""A run that loses nothing: its state is kept from time to time, when it is asked to stop, and when it fails.

    with Keeper(folder, identity, minutes=10) as keeper:
        state, notes = keeper.begin(algorithm.init, (key, upper, lower), where)     # no notes at the beginning
        for reached in outer_steps(...):
            if keeper.stops(reached.step, reached.state, {"data": batches.get_state(), "info": reached.latest}):
                break

What happens between two steps needs no keeping: a step draws the same responses again from its key, and
`annotation.once` knows the labels that they were given.
"""

import contextlib
import pathlib
import signal
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxrlhf.base.types import Params
from jaxrlhf.training.checkpoint import Checkpoints, Restored
from jaxrlhf.training.preemption import Stop, stopping
from jaxrlhf.training.processes import SharedError, agreed
from jaxrlhf.training.run_folder import RunFolder, plain
from jaxrlhf.training.step import create

METRICS = "metrics"
"""The note that says how much of metrics.jsonl had been written."""


class StoppedError(Exception):
    """A run ended before its last step because it was asked to; all of it is kept.

    Attributes:
        signal: that it was asked by, 0 where none was.
    """

    def __init__(self, folder: pathlib.Path, step: int, steps: int, signal: int):
        """Says how to go on."""
        super().__init__(
            f"stopped after step {step} of {steps}, as asked; all of it is in {folder}. "
            f"The same command with --run {folder.name} --resume goes on."
        )
        self.signal = signal


class Keeper:
    """Keeps a run while its `with` lasts; see the module.

    Attributes:
        stop: whether the run was asked to stop.
    """

    def __init__(
        self,
        folder: RunFolder,
        identity: Mapping[str, Any],
        *,
        minutes: float | None,
        steps: int | None = None,
        keep_best: int = 0,
    ):
        """Opens the run's checkpoints.

        Args:
            folder: of the run.
            identity: as in `Checkpoints`.
            minutes, steps: between two checkpoints; either may be None.
            keep_best: steps that are kept for their scores beside the last.

        Raises:
            ValueError: a number is out of range.
        """
        for name, value in (("minutes", minutes), ("steps", steps)):
            if value is not None and not value > 0:
                raise ValueError(f"The {name} between two checkpoints must be positive, got {value:g}.")
        self.stop = Stop()
        self._folder, self._ending = folder, contextlib.ExitStack()
        self._checkpoints = Checkpoints(
            pathlib.Path(folder.path) / "checkpoints",
            plain(identity),
            every_steps=steps,
            every_seconds=None if minutes is None else 60 * minutes,
            keep_best=keep_best,
        )
        self._keeps_best = keep_best > 0
        self._latest: tuple[int, Params, dict[str, Any], float | None] | None = None

    def __enter__(self) -> "Keeper":
        self._ending.callback(self._checkpoints.close)
        if jax.process_count() == 1:
            self.stop = self._ending.enter_context(stopping())
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        try:
            with self._ending:
                # Of several processes one alone cannot keep anything.
                together = jax.process_count() == 1 or isinstance(error, SharedError)
                if error is not None and self._latest is not None and together:
                    # What failed is told; that it could not be kept either is beside it.
                    try:
                        self._save()
                    except (OSError, ValueError, RuntimeError) as second:
                        warnings.warn(f"The last step could not be kept: {second}", stacklevel=2)
        finally:
            if error is not None:
                # In a notebook the error, and with it the folder, stays; the run can go on there too.
                self._folder.release()

    def begin(self, init: Callable[..., Any], arguments: tuple, where: Any) -> tuple[Any, dict[str, Any]]:
        """Returns the state of the last checkpoint and its notes, or a first state and no notes.

        Metrics that were written after the checkpoint are taken back.

        Args:
            init: with its arguments, makes a first state.
            arguments: read where there is no checkpoint.
            where: shardings of the state; those of the checkpoint may have been others.

        Raises:
            ValueError: as `Checkpoints.restore`.
        """

        def placed(shape, place):
            return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=place)

        kept = self._checkpoints.restore(jax.tree.map(placed, jax.eval_shape(init, *arguments), where))
        self._folder.cut_metrics(0 if kept is None else kept.notes[METRICS])
        return (create(init, *arguments, where=where), {}) if kept is None else (kept.arrays, kept.notes)

    def best(self, shapes: Params) -> Restored | None:
        """Returns the kept step of the largest score, as `Checkpoints.best`."""
        return self._checkpoints.best(shapes)

    def stops(
        self,
        step: int,
        state: Params,
        notes: Mapping[str, Any],
        *,
        last: bool = False,
        score: float | None = None,
    ) -> bool:
        """Takes note of a finished step, keeps it where that is due, and returns whether the run was asked to stop.

        Args:
            step: its number.
            state: after it; kept as it is, if at all, before the next step can be given it.
            notes: what else is to be kept, in types that `run_folder.plain` knows; arrays are read only where it is.
            last: whether it is the run's last step, which is always kept.
            score: how well it does, the larger the better, where that was measured; the best are kept if any are.

        Raises:
            OSError, ValueError: this checkpoint, or the one before it, could not be written; older ones are whole.
        """
        self._latest = step, state, {METRICS: self._folder.metrics_size()} | dict(notes), score
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
            # One of them was told to end, and all of them know it at the same step.
            self.stop.ask(signal.SIGTERM)
        # Clocks differ between processes, and all of them must keep a step or none.
        due = agreed(np.array([self._checkpoints.due(step)]))[0]
        if last or self.stop or due or (self._keeps_best and score is not None):
            self._save()
        return bool(self.stop)

    def _save(self) -> None:
        assert self._latest is not None
        step, state, notes, score = self._latest
        self._latest = None
        # A step that failed half-way may have taken its state with it.
        if not any(leaf.is_deleted() for leaf in jax.tree.leaves(state)):
            self._checkpoints.save(step, state, plain(notes), score=score)
