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

from jaxrlhf.bilevel.problem import Sample
from jaxrlhf.types import Key


def once(annotate: Callable[[Key, Sample], Any], path: pathlib.Path) -> Callable[[Key, Sample], np.ndarray]:
    """Returns the host annotator `(key, sample) -> labels` with a file of what it has answered.

    Args:
        annotate: asked for samples that are not in the file, and for those in it whose line is damaged.
        path: of the file, a line a sample; made at the first answer.

    Raises:
        ValueError: at a call, where labels are not an array of numbers.
        OSError: the file cannot be read or written.
    """
    known = _read(path)

    def ask(key: Key, sample: Sample) -> np.ndarray:
        name = _name(key, sample)
        if name not in known:
            labels = np.asarray(annotate(key, sample))
            line = json.dumps({"sample": name, "dtype": str(labels.dtype), "labels": labels.tolist()}) + "\n"
            with path.open("ab") as stream:
                # Whatever was being written when a process was killed ends its own line.
                stream.write((b"\n" if _unfinished(path) else b"") + line.encode())
                stream.flush()
                os.fsync(stream.fileno())
            known[name] = labels
        return known[name]

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


def _unfinished(path: pathlib.Path) -> bool:
    if not path.stat().st_size:
        return False
    with path.open("rb") as stream:
        stream.seek(-1, os.SEEK_END)
        return stream.read() != b"\n"
