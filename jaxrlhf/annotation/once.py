"""Each sample is labelled once: a run that goes on finds the labels of the steps that it takes again.

    annotate = once(annotate, folder / "labels.jsonl")

A step that is taken again from its checkpoint draws the same responses from the same key. What they were labelled with was
written before anything was learned from it, so that a killed run neither pays twice nor, where annotators are random,
becomes another run.
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


def once(
    annotate: Callable[[Key, Sample], Any],
    path: pathlib.Path | None,
    *,
    agreed: Callable[[np.ndarray], np.ndarray] | None = None,
) -> Callable[[Key, Sample], np.ndarray]:
    """Returns the host annotator `(key, sample) -> labels [B, M, 1]` with a file of what it has answered.

    Args:
        annotate: asked for samples that are not in the file, and for those in it whose line is damaged.
        path: of the file, a line a sample; made at the first answer. None remembers without one.
        agreed: of several processes, `array -> ` the first one's; only the first one has a path then.

    Raises:
        OSError: the file cannot be read or written.
    """
    known = {} if path is None else _read(path)

    def find(name, shape):
        found = known.get(name)
        if agreed is None:
            return found
        found = agreed(np.full(shape, np.nan, np.float32) if found is None else found)
        return None if np.isnan(found).any() else found

    def ask(key: Key, sample: Sample) -> np.ndarray:
        name = _name(key, sample)
        labels = find(name, (*sample.measure.shape, 1))
        if labels is None:
            labels = np.asarray(annotate(key, sample))
            if path is not None:
                _append(path, {"sample": name, "dtype": str(labels.dtype), "labels": labels.tolist()})
        known[name] = labels
        return labels

    return ask


def _name(key: Key, sample: Sample) -> str:
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves((jax.random.key_data(key), sample.prompts, sample.responses)):
        array = np.asarray(leaf)
        digest.update(f"{array.dtype}{array.shape}".encode() + array.tobytes())
    return digest.hexdigest()


def _read(path: pathlib.Path) -> dict[str, np.ndarray]:
    known = {}
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        try:
            told = json.loads(line)
            known[told["sample"]] = np.array(told["labels"], told["dtype"])
        except (ValueError, KeyError, TypeError):
            continue
    return known


def _append(path: pathlib.Path, told: dict[str, Any]) -> None:
    with path.open("ab+") as stream:
        # Whatever was being written when a process was killed ends its own line.
        stream.seek(-min(1, stream.tell()), os.SEEK_END)
        unfinished = stream.read() not in (b"", b"\n")
        stream.write((b"\n" if unfinished else b"") + json.dumps(told).encode() + b"\n")
        stream.flush()
        os.fsync(stream.fileno())
