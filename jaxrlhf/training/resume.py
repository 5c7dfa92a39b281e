"""Runs that can be resumed: checkpoints at intervals, when the run is asked to stop, and when it fails.

    with RunCheckpointer(folder, identity, minutes=10) as checkpointer:
        state, notes = checkpointer.restore_or_init(algorithm.init, (key, upper, lower), shardings)  # {} if new
        for progress in outer_steps(...):
            notes = {"data": batches.get_state(), "info": progress.latest_info}
            if checkpointer.after_step(progress.step, progress.state, notes):
                break

Nothing is saved within a step: repeated from its key, it samples the same responses, and `annotation.label_cache` has
their labels.
"""

import contextlib
import pathlib
import shutil
import signal
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxrlhf.base.types import Params
from jaxrlhf.training.checkpoint import Checkpoints, Restored, check_folder
from jaxrlhf.training.preemption import Stop, stopping
from jaxrlhf.training.processes import SharedError, broadcast_array
from jaxrlhf.training.progress import bytes_text
from jaxrlhf.training.run_folder import RunFolder, plain
from jaxrlhf.training.step import init_on_devices

METRICS = "metrics"
"""The note that holds the size of metrics.jsonl in bytes."""


class StoppedError(Exception):
    """A run stopped before its last step because it was asked to, after saving a checkpoint.

    Attributes:
        signal: the signal that asked, 0 if none did.
    """

    def __init__(self, folder: pathlib.Path, step: int, steps: int, signal: int):
        """The message says how to resume."""
        super().__init__(
            f"stopped after step {step} of {steps}, as asked; all of it is in {folder}. "
            f"To resume it, run the same command with --run {folder.name} --resume."
        )
        self.signal = signal


class RunCheckpointer:
    """Saves checkpoints of a run within its `with` block; see the module.

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
            folder: the run's.
            identity: as in `Checkpoints`.
            minutes, steps: between two checkpoints; either may be None.
            keep_best: number of best-scoring steps to keep besides the last.

        Raises:
            ValueError: a number is out of range.
        """
        for name, value in (("minutes", minutes), ("steps", steps)):
            if value is not None and not value > 0:
                raise ValueError(f"The {name} between two checkpoints must be positive, got {value:g}.")
        self.stop = Stop()
        self._folder, self._exit_stack = folder, contextlib.ExitStack()
        self._checkpoints = Checkpoints(
            pathlib.Path(folder.path) / "checkpoints",
            plain(identity),
            every_steps=steps,
            every_seconds=None if minutes is None else 60 * minutes,
            keep_best=keep_best,
        )
        self._keeps_best = keep_best > 0
        self._latest: tuple[int, Params, dict[str, Any], float | None] | None = None

    def __enter__(self) -> "RunCheckpointer":
        self._exit_stack.callback(self._checkpoints.close)
        if jax.process_count() == 1:
            self.stop = self._exit_stack.enter_context(stopping())
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        try:
            with self._exit_stack:
                # Saving takes all processes, so the error must have been raised in all of them.
                together = jax.process_count() == 1 or isinstance(error, SharedError | StoppedError)
                if error is not None and self._latest is not None and together:
                    # The first error is the one to raise; a failure to save is only a warning.
                    try:
                        self._save()
                    except (OSError, ValueError, RuntimeError) as second:
                        warnings.warn(f"The last step could not be saved: {second}", stacklevel=2)
        finally:
            if error is not None:
                # A notebook keeps the error, and with it the folder, alive; the run can be resumed there too.
                self._folder.release()

    def restore_or_init(self, init: Callable[..., Any], arguments: tuple, shardings: Any) -> tuple[Any, dict[str, Any]]:
        """Returns the last checkpoint's state and notes, or an initial state and no notes.

        Metrics that were written after the checkpoint are removed.

        Args:
            init: returns an initial state.
            arguments: of `init`; used only if there is no checkpoint.
            shardings: of the state; the checkpoint may have been saved with others.

        Raises:
            ValueError: as `Checkpoints.restore`; or a checkpoint cannot be written here and read back, or has no room.
        """

        def sharded(shape, sharding):
            return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)

        shapes = jax.eval_shape(init, *arguments)
        if jax.process_count() == 1:
            check_folder(self._checkpoints.folder)
            _check_room(
                self._checkpoints.folder, sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))
            )
        restored = self._checkpoints.restore(jax.tree.map(sharded, shapes, shardings))
        if restored is None:
            self._folder.truncate_metrics(0)
            return init_on_devices(init, *arguments, shardings=shardings), {}
        self._folder.truncate_metrics(restored.notes[METRICS])
        return restored.arrays, restored.notes

    def best(self, shapes: Params) -> Restored:
        """Returns the checkpoint with the largest score, as `Checkpoints.best`."""
        return self._checkpoints.best(shapes)

    def after_step(
        self,
        step: int,
        state: Params,
        notes: Mapping[str, Any],
        *,
        last: bool = False,
        score: float | None = None,
    ) -> bool:
        """Saves a checkpoint of a finished step if one is due, and returns whether the run was asked to stop.

        Args:
            step: its number.
            state: after the step; if it is saved, then before this returns, so that the next step may donate it.
            notes: what else to save, in types that `run_folder.plain` converts; arrays are read only if saved.
            last: whether it is the run's last step, which is always saved.
            score: its evaluation, larger is better, if there was one; used only to keep the best.

        Raises:
            OSError, ValueError: this checkpoint, or the previous one, could not be written; older ones are intact.
        """
        self._latest = step, state, {METRICS: self._folder.metrics_size()} | dict(notes), score
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
            # One process was asked to stop, and all of them learn it at the same step.
            self.stop.ask(signal.SIGTERM)
        # Clocks differ between processes, and a step must be saved by all of them or none.
        due = broadcast_array(np.array([self._checkpoints.due(step)]))[0]
        if last or self.stop or due or (self._keeps_best and score is not None):
            self._save()
        return bool(self.stop)

    def _save(self) -> None:
        assert self._latest is not None
        step, state, notes, score = self._latest
        self._latest = None
        # A step that failed halfway may have deleted the state donated to it.
        if not any(leaf.is_deleted() for leaf in jax.tree.leaves(state)):
            self._checkpoints.save(step, state, plain(notes), score=score)
            self._copy_out()

    def _copy_out(self) -> None:
        """Copies the run's folder to its store, with the checkpoint that has just been written."""
        if self._folder.store is None:
            return
        self._checkpoints.wait()
        try:
            self._folder.store.push(self._folder.path)
        except ValueError as error:
            # The run goes on: the checkpoint is here, and the next one is copied with it.
            warnings.warn(f"A checkpoint was not copied: {error}", stacklevel=2)


def _check_room(folder: pathlib.Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < size:
        raise ValueError(
            f"A checkpoint of this run takes {bytes_text(size)}, and {folder} has room for {bytes_text(free)}; "
            "make room there, or give --output another folder."
        )
