"""Non-finite updates are skipped: the state stays as it was, and the run reports it."""

import math
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrlhf.training.processes import gathered, is_first_process


class Guarded(NamedTuple):
    """Diagnostics of a step, and whether it was skipped, `[]`."""

    info: Any
    skipped: jax.Array


def guarded(update: Callable[..., tuple[Any, Any]], *, state: int) -> Callable[..., tuple[Any, Guarded]]:
    """Returns the pure `(..., state, ...) -> (state, Guarded)` that keeps the old state if the new one is not finite.

    A NaN or an infinity in a loss or a gradient shows up in the parameters or the optimiser state. A skipped step still
    counts, so that the next one gets its own key and data.

    Args:
        update: `(..., state, ...) -> (state, info)`; the state has a `step`.
        state: its position among the arguments.
    """

    def run(*arguments):
        before, (after, info) = arguments[state], update(*arguments)
        # A diagnostic in the state may always be NaN; only a value that was finite and no longer is counts.
        became_non_finite = [
            jnp.any(jnp.isfinite(old) & ~jnp.isfinite(new))
            for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
            if jnp.issubdtype(new.dtype, jnp.inexact)
        ]
        bad = jnp.any(jnp.stack(became_non_finite))
        kept = jax.tree.map(lambda old, new: jnp.where(bad, old, new), before, after)
        return _with_step(kept, after), Guarded(info, bad)

    return run


def _with_step(kept: Any, after: Any) -> Any:
    if "step" in kept._fields:
        return kept._replace(step=after.step)
    # A controller's state counts by the state inside it.
    return kept._replace(inner=_with_step(kept.inner, after.inner))


class SkippedSteps:
    """Counts skipped steps, saves their data, and stops the run after several in a row.

    Attributes:
        count: number of skipped steps.
    """

    def __init__(self, folder: pathlib.Path, *, max_consecutive: int):
        """Starts at zero.

        Args:
            folder: where the data of skipped steps are written, as `step-N.npz`; created when needed.
            max_consecutive: number of consecutive skipped steps that stops the run.

        Raises:
            ValueError: `max_consecutive` is below 1.
        """
        if max_consecutive < 1:
            raise ValueError(f"At least 1 step must fail before a run does, got {max_consecutive}.")
        self.count = 0
        self._folder, self._max_consecutive, self._consecutive = folder, max_consecutive, 0

    def record(self, step: int, result: Guarded, data: Any) -> None:
        """Records a step.

        Args:
            step: its number.
            result: what `guarded` returned for it.
            data: its batch, a tree of arrays; None if it is no longer available.

        Raises:
            ValueError: too many consecutive steps were skipped.
        """
        if not bool(result.skipped):
            self._consecutive = 0
            return
        self._consecutive, self.count = self._consecutive + 1, self.count + 1
        # Gathering involves all processes; the first one writes.
        leaves = jax.tree_util.tree_leaves_with_path(gathered(data))
        if leaves and is_first_process():
            self._folder.mkdir(exist_ok=True)
            arrays: dict[str, Any] = {jax.tree_util.keystr(path).strip("."): leaf for path, leaf in leaves}
            np.savez(self._folder / f"step-{step}.npz", **arrays)
        if self._consecutive >= self._max_consecutive:
            numbers = {name: float(value) for name, value in result.info._asdict().items() if np.ndim(value) == 0}
            wrong = ", ".join(f"{name} {value}" for name, value in numbers.items() if not math.isfinite(value))
            raise ValueError(
                f"{self._consecutive} steps in a row up to step {step} were not finite ({wrong or 'in the new state'}) "
                f"and were skipped; lower the learning rates. Their data is in {self._folder}."
            )

    def notes(self) -> list[str]:
        """Returns the sentences for the report; empty if no step was skipped."""
        if not self.count:
            return []
        return [f"{self.count} steps were not finite and were skipped; see {self._folder.name}."]
