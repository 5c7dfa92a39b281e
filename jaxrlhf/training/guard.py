"""A step whose result is not finite is not taken: the state stays as it was, and the run says so."""

import math
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrlhf.training.processes import first, gathered


class Guarded(NamedTuple):
    """Diagnostics of a step, and whether it was left out, `[]`."""

    info: Any
    skipped: jax.Array


def guarded(update: Callable[..., tuple[Any, Any]], *, state: int) -> Callable[..., tuple[Any, Guarded]]:
    """Returns the pure `(..., state, ...) -> (state, Guarded)` that keeps the old state where the new one is not finite.

    A NaN or an infinity in a loss or a gradient reaches parameters or optimiser, and is seen there. The step is counted
    all the same, so that the next one has keys and data of its own.

    Args:
        update: `(..., state, ...) -> (state, info)`; the state has a `step`.
        state: its place among the arguments.
    """

    def run(*arguments):
        before, (after, info) = arguments[state], update(*arguments)
        # A diagnostic in the state may be NaN for good: what matters is what was finite and is no more.
        lost = [
            jnp.any(jnp.isfinite(old) & ~jnp.isfinite(new))
            for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
            if jnp.issubdtype(new.dtype, jnp.inexact)
        ]
        bad = jnp.any(jnp.stack(lost))
        kept = jax.tree.map(lambda old, new: jnp.where(bad, old, new), before, after)
        return kept._replace(step=after.step), Guarded(info, bad)

    return run


class Patience:
    """Counts the steps that were left out, keeps what they were given, and loses patience after several in a row.

    Attributes:
        skipped: steps that were left out.
    """

    def __init__(self, folder: pathlib.Path, *, limit: int):
        """Begins to count.

        Args:
            folder: where the data of such steps are written, as `step-N.npz`; made when there is one.
            limit: of steps in a row.

        Raises:
            ValueError: the limit is below 1.
        """
        if limit < 1:
            raise ValueError(f"At least 1 step must fail before a run does, got {limit}.")
        self.skipped = 0
        self._folder, self._limit, self._row = folder, limit, 0

    def take(self, step: int, found: Guarded, data: Any) -> None:
        """Takes note of a step.

        Args:
            step: its number.
            found: what `guarded` returned for it.
            data: its batch, a tree of arrays; None where it is no longer to be had.

        Raises:
            ValueError: too many steps in a row were left out.
        """
        if not bool(found.skipped):
            self._row = 0
            return
        self._row, self.skipped = self._row + 1, self.skipped + 1
        # All of several processes hold parts of it; one of them writes.
        whole = jax.tree_util.tree_leaves_with_path(gathered(data))
        if whole and first():
            self._folder.mkdir(exist_ok=True)
            arrays: dict[str, Any] = {jax.tree_util.keystr(path).strip("."): leaf for path, leaf in whole}
            np.savez(self._folder / f"step-{step}.npz", **arrays)
        if self._row >= self._limit:
            told = {name: float(value) for name, value in found.info._asdict().items() if np.ndim(value) == 0}
            wrong = ", ".join(f"{name} {value}" for name, value in told.items() if not math.isfinite(value))
            raise ValueError(
                f"{self._row} steps in a row up to step {step} were not finite ({wrong or 'in the new state'}) and were "
                f"left out; lower the learning rates. What they were given is in {self._folder}."
            )

    def notes(self) -> list[str]:
        """Returns what a report must say: nothing where no step was left out."""
        if not self.skipped:
            return []
        return [
            f"{self.skipped} steps came to something that is not finite and were left out; see {self._folder.name}."
        ]
