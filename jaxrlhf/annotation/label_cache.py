"""Labels of whole samples on disk, so that a resumed run reuses the labels of the steps it repeats.

    annotate = cached_annotator(annotate, folder / "labels.jsonl")

A step repeated from a checkpoint samples the same responses from the same key. Its labels were written before the update
that used them, so a killed run neither pays twice nor, with a random annotator, turns into a different run.
"""

import hashlib
import json
import os
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxrlhf.base.problem import Sample
from jaxrlhf.base.types import Key


def cached_annotator(
    annotate: Callable[[Key, Sample], Any],
    path: pathlib.Path | None,
    *,
    agreed: Callable[[np.ndarray], np.ndarray] | None = None,
    complete: bool = False,
    shape: tuple[int, ...] = (1,),
) -> Callable[[Key, Sample], np.ndarray]:
    """Returns the host annotator `(key, sample) -> labels [B, M, 1]` with its labels cached in a file.

    Args:
        annotate: called for samples that are not in the file, or whose line there is damaged.
        path: JSON lines, one per sample; created with the first labels. None caches in memory only.
        agreed: with several processes, `array -> ` the first process's array; only that process has a path then.
        complete: caches a sample only if none of its labels is missing: those of a judge may come at the next try.
        shape: of what `annotate` returns, behind `[B, M]`; `(2, K)` where they are scores.

    Raises:
        OSError: the file cannot be read or written.
    """
    known = {} if path is None else _read(path)

    def keeps(labels):
        return not complete or bool(np.all(labels >= 0))

    def find(digest, shape):
        labels = known.get(digest)
        if labels is not None and (labels.shape != shape or not keeps(labels)):
            labels = None
        if agreed is None:
            return labels
        labels = agreed(np.full(shape, np.nan, np.float32) if labels is None else labels)
        return None if np.isnan(labels).any() else labels

    def annotate_once(key: Key, sample: Sample) -> np.ndarray:
        digest = _digest(key, sample)
        labels = find(digest, (*sample.measure.shape, *shape))
        if labels is None:
            labels = np.asarray(annotate(key, sample))
            if path is not None and keeps(labels):
                row = {"sample": digest, "dtype": str(labels.dtype), "labels": labels.tolist()}
                _append(path, row | {"seal": _seal(digest, labels)})
        known[digest] = labels
        return labels

    return annotate_once


def _digest(key: Key, sample: Sample) -> str:
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves((jax.random.key_data(key), sample.prompts, sample.responses)):
        array = np.asarray(leaf)
        digest.update(f"{array.dtype}{array.shape}".encode() + array.tobytes())
    return digest.hexdigest()


def _read(path: pathlib.Path) -> dict[str, np.ndarray]:
    known = {}
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        try:
            row = json.loads(line)
            labels = np.array(row["labels"], row["dtype"])
            # Lines of earlier versions have no seal.
            if labels.dtype.kind in "fiub" and row.get("seal", _seal(row["sample"], labels)) == _seal(
                row["sample"], labels
            ):
                known[row["sample"]] = labels
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError, MemoryError):
            continue
    return known


def _seal(digest: str, labels: np.ndarray) -> str:
    return hashlib.sha256(digest.encode() + labels.tobytes()).hexdigest()[:16]


def _append(path: pathlib.Path, row: dict[str, Any]) -> None:
    with path.open("ab+") as stream:
        # A line that was cut off by a kill is terminated first, so that it does not swallow this one.
        stream.seek(-min(1, stream.tell()), os.SEEK_END)
        unfinished = stream.read() not in (b"", b"\n")
        stream.write((b"\n" if unfinished else b"") + json.dumps(row).encode() + b"\n")
        stream.flush()
        os.fsync(stream.fileno())
