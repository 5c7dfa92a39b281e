"""Checkpoints of a run (Orbax, asynchronous): all that it needs to go on, as one atomic unit.

A checkpoint holds a tree of arrays (states, optimisers, a buffer, a sample whose labels are still awaited) and notes in
JSON (iterator states, counts, the phase inside the step). It is written beside the training, and is there or not there:
a process that is killed leaves the ones before it.

Each array has a fingerprint, a sum over its bits modulo 2^32 that does not depend on how it is spread over devices.
Restoring compares them: a checkpoint that was damaged on the disk is named, moved aside and never used, and the one
before it is.
"""

import contextlib
import hashlib
import json
import math
import pathlib
import time
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from jaxrlhf.base.types import Params

VERSION = 1
"""Of what a checkpoint holds besides its arrays."""


class Restored(NamedTuple):
    """What a checkpoint held: its step, its arrays as the given shapes say, its notes."""

    step: int
    arrays: Params
    notes: Any


class DamagedError(Exception):
    """A checkpoint is not what was written."""


class Checkpoints:
    """The checkpoints of one run folder."""

    def __init__(
        self,
        folder: str | pathlib.Path,
        identity: Mapping[str, Any],
        *,
        every_steps: int | None = None,
        every_seconds: float | None = 600.0,
        keep: int = 2,
        keep_best: int = 0,
    ):
        """Opens the folder, which is made where it is missing.

        Args:
            folder: of the checkpoints alone.
            identity: what must be the same when the run goes on, such as the model's shape and the algorithm; in JSON's
                types.
            every_steps, every_seconds: how often `due` says yes; either may be None.
            keep: of the last ones.
            keep_best: of those with the largest `score`, beside the last.

        Raises:
            ValueError: a number is out of range.
        """
        if keep < 1 or keep_best < 0:
            raise ValueError(
                f"At least 1 checkpoint is kept, and not fewer than 0 best ones; got {keep} and {keep_best}."
            )
        self.folder = pathlib.Path(folder).absolute()
        self.identity = json.loads(json.dumps(identity))
        self._every_steps, self._every_seconds, self._saved_at = every_steps, every_seconds, time.monotonic()
        self._scores: dict[int, float] = {}
        policies = [preservation_policy.LatestN(keep), _Best(self._scores, keep_best)]
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=preservation_policy.AnyPreservationPolicy(policies),
                enable_async_checkpointing=True,
            ),
        )
        for step in self._manager.all_steps():
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                self._note(step, self._told(step).get("score"))

    def due(self, step: int) -> bool:
        """Returns whether it is time for a checkpoint of this step: by steps, or by seconds since the last."""
        if self._every_steps is not None and step % self._every_steps == 0:
            return True
        return self._every_seconds is not None and time.monotonic() - self._saved_at >= self._every_seconds

    def save(self, step: int, arrays: Params, notes: Any = None, *, score: float | None = None) -> None:
        """Begins to write a checkpoint; the arrays are copied before it returns, and may be donated then.

        Raises:
            OSError, ValueError: this checkpoint, or the one before it, could not be written. Those before them are whole.
        """
        told = {"version": VERSION, "identity": self.identity, "notes": notes, "fingerprints": fingerprints(arrays)}
        told |= {"score": score}
        told["seal"] = _seal(told)
        self._note(step, score)
        self._manager.save(
            step,
            args=ocp.args.Composite(arrays=ocp.args.StandardSave(arrays), told=ocp.args.JsonSave(told)),
            force=True,
        )
        self._saved_at = time.monotonic()

    def restore(self, shapes: Params) -> Restored | None:
        """Returns the last whole checkpoint, or None where there is none.

        Args:
            shapes: a tree of `jax.ShapeDtypeStruct`, each with the sharding that its array shall have; another mesh or
                number of devices than the run had before will do.

        Raises:
            ValueError: the checkpoints are another run's, or a newer version's, or all are damaged; nothing was changed.
        """
        damaged = []
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                found = self._read(step, shapes)
            except DamagedError as error:
                damaged.append((step, str(error)))
                continue
            self._set_aside(damaged)
            return found
        if damaged:
            told = "; ".join(f"step {step}: {reason}" for step, reason in damaged)
            raise ValueError(f"No checkpoint in {self.folder} is whole ({told}). Move the folder away to begin anew.")
        return None

    def best(self, shapes: Params) -> Restored | None:
        """Returns the whole checkpoint of the largest score, or None where none has one.

        Args:
            shapes: as in `restore`.

        Raises:
            ValueError: as in `restore`.
        """
        self.wait()
        kept = [step for step in self._manager.all_steps() if step in self._scores]
        for step in sorted(kept, key=lambda step: self._scores[step], reverse=True):
            with contextlib.suppress(DamagedError):
                return self._read(step, shapes)
        return None

    def wait(self) -> None:
        """Waits until the last checkpoint is on the disk.

        Raises:
            OSError, ValueError: it could not be written.
        """
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, and gives the folder back."""
        self._manager.close()

    def _note(self, step: int, score: float | None) -> None:
        if score is not None and math.isfinite(score):
            self._scores[step] = score

    def _read(self, step: int, shapes: Params) -> Restored:
        try:
            told = self._told(step)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DamagedError(_short(error)) from None
        self._check(told, step)
        try:
            args = ocp.args.Composite(arrays=ocp.args.StandardRestore(shapes))
            arrays = self._manager.restore(step, args=args)["arrays"]
        except Exception as error:  # whatever a reader says of bytes that are not what they were
            raise DamagedError(_short(error)) from None
        for name, value in fingerprints(arrays).items():
            if told["fingerprints"].get(name) != value:
                raise DamagedError(f"{name} is not as it was written")
        return Restored(step, arrays, told["notes"])

    def _told(self, step: int) -> dict[str, Any]:
        told = self._manager.restore(step, args=ocp.args.Composite(told=ocp.args.JsonRestore()))["told"]
        if told["seal"] != _seal(told):
            raise ValueError("its notes are not as they were written")
        return told

    def _check(self, told: dict[str, Any], step: int) -> None:
        if told["version"] > VERSION:
            raise ValueError(
                f"The checkpoint of step {step} in {self.folder} was written by a newer version; update jaxrlhf."
            )
        for name in sorted({*self.identity, *told["identity"]}):
            ours, theirs = self.identity.get(name), told["identity"].get(name)
            if ours != theirs:
                raise ValueError(
                    f"The checkpoints in {self.folder} are another run's: its {name} is {theirs!r}, this one's {ours!r}. "
                    "Name another run, or go on with the settings that it was begun with."
                )

    def _set_aside(self, damaged: list[tuple[int, str]]) -> None:
        """Moves what cannot be used out of the way of the steps to come."""
        for step, reason in damaged:
            place = self.folder / str(step)
            other = self.folder.parent / f"{self.folder.name}-damaged-{step}-{time.time_ns()}"
            warnings.warn(
                f"The checkpoint of step {step} is damaged ({reason}); it was moved to {other}.", stacklevel=3
            )
            if jax.process_index() == 0:
                with contextlib.suppress(FileNotFoundError):
                    place.rename(other)
        if damaged:
            self._manager.reload()


class _Best(preservation_policy.PreservationPolicy):
    """Keeps the checkpoints of the largest scores, also of those that an earlier process wrote."""

    def __init__(self, scores: Mapping[int, float], count: int):
        self._scores, self._count = scores, count

    def should_preserve(self, checkpoints: Any, *, context: Any) -> list[bool]:
        del context
        steps = [each.step for each in checkpoints]
        scored = sorted((step for step in steps if step in self._scores), key=lambda step: self._scores[step])
        best = set(scored[-self._count :] if self._count else ())
        return [step in best for step in steps]


def fingerprints(tree: Params) -> dict[str, int]:
    """Returns a number for each array of a tree, by its path: `sum_i bits_i (2 i + 1) mod 2^32` over its 32-bit words.

    A flipped bit changes it, as the factors are odd; a sum of integers is the same in any order, and so on any mesh.
    """
    # One after the other: simulated devices share few threads, and programs that are under way together can wait for each
    # other's devices for ever.
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): int(_fingerprint(leaf)) for path, leaf in leaves}


@jax.jit
def _fingerprint(leaf: jax.Array) -> jax.Array:
    leaf = jnp.asarray(leaf)
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    if leaf.dtype == jnp.bool_:
        leaf = leaf.astype(jnp.uint8)
    width = min(leaf.dtype.itemsize, 4)
    words = jax.lax.bitcast_convert_type(leaf, {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[width]).astype(jnp.uint32)
    total = jnp.zeros((), jnp.uint32)
    if not words.size:
        return total
    # The index of each word without a flat copy, which would gather what is spread over devices.
    index = jnp.zeros(words.shape, jnp.uint32)
    stride = 1
    for axis in reversed(range(words.ndim)):
        place = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        index = index + place * jnp.uint32(stride % 2**32)
        stride *= words.shape[axis]
    return total + jnp.sum(words * (2 * index + 1), dtype=jnp.uint32)


def _seal(told: Mapping[str, Any]) -> str:
    plain = {name: value for name, value in told.items() if name != "seal"}
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
