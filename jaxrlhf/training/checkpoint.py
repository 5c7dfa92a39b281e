"""Checkpoints of a run (Orbax, asynchronous): everything that it needs to resume, saved atomically.

A checkpoint holds a tree of arrays (states, optimisers, a buffer, a sample whose labels are pending) and notes in JSON
(iterator states, counts, the phase within the step). It is written in the background, and completely or not at all: a
killed process leaves the previous ones intact.

Each array has a fingerprint, a sum over its bits modulo 2^32 that does not depend on its sharding. Restoring compares
fingerprints: a checkpoint that was damaged on the disk is reported, moved aside and never used; the previous one is used
instead.
"""

import contextlib
import hashlib
import json
import math
import pathlib
import shutil
import time
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from jaxrlhf.base.types import Params
from jaxrlhf.training.paths import PlainPath, check_local

VERSION = 1
"""Version of a checkpoint's metadata."""


class Restored(NamedTuple):
    """A restored checkpoint: its step, its arrays with the requested shardings, its notes."""

    step: int
    arrays: Params
    notes: Any


class DamagedError(Exception):
    """A checkpoint differs from what was written."""


class OtherRunError(ValueError):
    """Checkpoints are another run's.

    Attributes:
        name: of the part of the identity that differs.
    """

    def __init__(self, message: str, name: str):
        """Takes the message and the name."""
        super().__init__(message)
        self.name = name


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
        """Opens the folder; creates it if necessary.

        Args:
            folder: for these checkpoints only.
            identity: what must not change when the run is resumed, such as the model's shape and the algorithm; in JSON's
                types.
            every_steps, every_seconds: intervals of `due`; either may be None.
            keep: number of latest checkpoints to keep.
            keep_best: number of checkpoints with the largest `score` to keep besides.

        Raises:
            ValueError: a number is out of range.
        """
        if keep < 1 or keep_best < 0:
            raise ValueError(
                f"At least 1 checkpoint is kept, and not fewer than 0 best ones; got {keep} and {keep_best}."
            )
        check_local(folder, "The folder of checkpoints")
        self._plain = PlainPath(folder)
        self.folder = self._plain.folder
        self.identity = json.loads(json.dumps(identity))
        self._every_steps, self._every_seconds, self._saved_at = every_steps, every_seconds, time.monotonic()
        self._scores: dict[int, float] = {}
        policies = [preservation_policy.LatestN(keep), _Best(self._scores, keep_best)]
        self._manager = ocp.CheckpointManager(
            self._plain.path,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=preservation_policy.AnyPreservationPolicy(policies),
                enable_async_checkpointing=True,
            ),
        )
        for step in self._manager.all_steps():
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                self._record_score(step, self._metadata(step).get("score"))

    def due(self, step: int) -> bool:
        """Returns whether this step should be saved, by its number or by the seconds since the last checkpoint."""
        if self._every_steps is not None and step % self._every_steps == 0:
            return True
        return self._every_seconds is not None and time.monotonic() - self._saved_at >= self._every_seconds

    def save(self, step: int, arrays: Params, notes: Any = None, *, score: float | None = None) -> None:
        """Starts to write a checkpoint; the arrays are copied before this returns, so they may be donated afterwards.

        Raises:
            OSError, ValueError: this checkpoint, or the previous one, could not be written. Older ones are intact.
        """
        metadata = {"version": VERSION, "identity": self.identity, "notes": notes, "fingerprints": fingerprints(arrays)}
        metadata |= {"score": score}
        metadata["checksum"] = _checksum(metadata)
        self._record_score(step, score)
        self._manager.save(
            step,
            args=ocp.args.Composite(arrays=ocp.args.StandardSave(arrays), metadata=ocp.args.JsonSave(metadata)),
            force=True,
        )
        self._saved_at = time.monotonic()

    def restore(self, shapes: Params) -> Restored | None:
        """Returns the last undamaged checkpoint, or None if there are no checkpoints.

        Args:
            shapes: a tree of `jax.ShapeDtypeStruct`, each with the sharding of the restored array; the mesh and the
                number of devices may differ from those of the saved run.

        Raises:
            ValueError: the checkpoints are another run's, or a newer version's, or all are damaged; nothing was changed.
        """
        damaged = []
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                restored = self._read(step, shapes)
            except DamagedError as error:
                damaged.append((step, str(error)))
                continue
            self._set_aside(damaged)
            return restored
        if damaged:
            reasons = "; ".join(f"step {step}: {reason}" for step, reason in damaged)
            raise ValueError(
                f"No checkpoint in {self.folder} is whole ({reasons}). Move the folder away to begin anew."
            )
        return None

    def best(self, shapes: Params) -> Restored:
        """Returns the undamaged checkpoint with the largest score.

        Args:
            shapes: as in `restore`.

        Raises:
            ValueError: as in `restore`; or none has a score, or none of those can be read.
        """
        self.wait()
        kept = [step for step in self._manager.all_steps() if step in self._scores]
        reasons = ["no evaluation gave a finite score"] if not kept else []
        for step in sorted(kept, key=lambda step: self._scores[step], reverse=True):
            try:
                return self._read(step, shapes)
            except DamagedError as error:
                reasons.append(f"step {step}: {error}")
        raise ValueError(f"There is no best checkpoint in {self.folder} ({'; '.join(reasons)}).")

    def wait(self) -> None:
        """Waits until the last checkpoint is on the disk.

        Raises:
            OSError, ValueError: it could not be written.
        """
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits until the last checkpoint is on the disk, and closes the folder."""
        self._manager.close()

    def _record_score(self, step: int, score: float | None) -> None:
        if score is not None and math.isfinite(score):
            self._scores[step] = score

    def _read(self, step: int, shapes: Params) -> Restored:
        try:
            metadata = self._metadata(step)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DamagedError(self._plain.own(_short(error))) from None
        self._check(metadata, step)
        try:
            args = ocp.args.Composite(arrays=ocp.args.StandardRestore(shapes))
            arrays = self._manager.restore(step, args=args)["arrays"]
        except Exception as error:  # damaged bytes raise whatever the reader raises
            raise DamagedError(self._plain.own(_short(error))) from None
        for name, value in fingerprints(arrays).items():
            if metadata["fingerprints"].get(name) != value:
                raise DamagedError(f"{name} is not as it was written")
        return Restored(step, arrays, metadata["notes"])

    def _metadata(self, step: int) -> dict[str, Any]:
        metadata = self._manager.restore(step, args=ocp.args.Composite(metadata=ocp.args.JsonRestore()))["metadata"]
        if metadata["checksum"] != _checksum(metadata):
            raise ValueError("its notes are not as they were written")
        return metadata

    def _check(self, metadata: dict[str, Any], step: int) -> None:
        if metadata["version"] > VERSION:
            raise ValueError(
                f"The checkpoint of step {step} in {self.folder} was written by a newer version; update jaxrlhf."
            )
        for name in sorted({*self.identity, *metadata["identity"]}):
            ours, theirs = self.identity.get(name), metadata["identity"].get(name)
            if ours != theirs:
                raise OtherRunError(
                    f"The checkpoints in {self.folder} are another run's: its {name} is {theirs!r}, this one's {ours!r}. "
                    "Name another run, or resume this one with its original settings.",
                    name,
                )

    def _set_aside(self, damaged: list[tuple[int, str]]) -> None:
        """Moves damaged checkpoints out of the way of later steps."""
        for step, reason in damaged:
            source = self.folder / str(step)
            target = self.folder.parent / f"{self.folder.name}-damaged-{step}-{time.time_ns()}"
            warnings.warn(
                f"The checkpoint of step {step} is damaged ({reason}); it was moved to {target}.", stacklevel=3
            )
            if jax.process_index() == 0:
                with contextlib.suppress(FileNotFoundError):
                    source.rename(target)
        if damaged:
            self._manager.reload()


class _Best(preservation_policy.PreservationPolicy):
    """Keeps the checkpoints with the largest scores, including those of earlier processes."""

    def __init__(self, scores: Mapping[int, float], count: int):
        self._scores, self._count = scores, count

    def should_preserve(self, checkpoints: Any, *, context: Any) -> list[bool]:
        del context
        steps = [checkpoint.step for checkpoint in checkpoints]
        scored = sorted((step for step in steps if step in self._scores), key=lambda step: self._scores[step])
        best = set(scored[-self._count :] if self._count else ())
        return [step in best for step in steps]


def check_folder(folder: str | pathlib.Path) -> None:
    """Writes a small checkpoint beside a folder of checkpoints, reads it back and removes it.

    Raises:
        ValueError: it cannot be written, or reads back otherwise.
    """
    trial = pathlib.Path(f"{folder}-trial")
    shutil.rmtree(trial, ignore_errors=True)
    array = jnp.arange(3.0)
    shape = jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding)
    try:
        with contextlib.closing(Checkpoints(trial, {})) as written:
            written.save(0, {"array": array})
        with contextlib.closing(Checkpoints(trial, {})) as read:
            if read.restore({"array": shape}) is None:
                raise ValueError("it is not there")
    except Exception as error:  # a library may raise anything for a path that it cannot handle
        raise ValueError(
            f"A checkpoint cannot be written below {trial.parent} and read back ({_short(error)}); "
            "make room there, or give --output another folder."
        ) from None
    finally:
        shutil.rmtree(trial, ignore_errors=True)


def fingerprints(tree: Params) -> dict[str, int]:
    """Returns a number for each array of a tree, by its path: `sum_i bits_i (2 i + 1) mod 2^32` over its 32-bit words.

    A flipped bit changes it, as the factors are odd. An integer sum is the same in any order, and so on any mesh.
    """
    # One after the other: simulated devices share few threads, and concurrent programs can deadlock waiting for each
    # other's devices.
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
    # The flat index of each word, without a flat copy, which would gather a sharded array.
    index = jnp.zeros(words.shape, jnp.uint32)
    stride = 1
    for axis in reversed(range(words.ndim)):
        position = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        index = index + position * jnp.uint32(stride % 2**32)
        stride *= words.shape[axis]
    return total + jnp.sum(words * (2 * index + 1), dtype=jnp.uint32)


def _checksum(metadata: Mapping[str, Any]) -> str:
    content = {name: value for name, value in metadata.items() if name != "checksum"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
