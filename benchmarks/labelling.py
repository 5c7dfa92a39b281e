"""Loads the labelling page with simulated people, while the process that serves it trains and while it does not.

    python -m benchmarks.labelling

As in `jaxrlhf align --annotator browser`, the page runs in a thread of the process that trains; the labellers are a
process of their own on the same cores. Training is the whole bilevel step of a random decoder, sampling included, again
and again.
Checked afterwards: every label that the page said was saved is in the journal, and no pair was labelled twice.
"""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import tyro

from benchmarks.batches import random_tokens
from benchmarks.reporting import machine_info, write_results
from benchmarks.scaling import bilevel_step
from jaxrlhf.labelling import Board, LabelStore, Page, Queue, make_pair
from jaxrlhf.lm.transformer.config import DecoderConfig
from jaxrlhf.training.report import Table

GOAL = 200.0
"""Milliseconds within which 99 of 100 labels are to be answered."""


@dataclasses.dataclass(frozen=True)
class Config:
    """How many people label, and what is trained."""

    labellers: int = 200
    per_minute: float = 5000.0
    """Labels of all together."""
    seconds: float = 60.0
    """Measured time of each row."""
    words: int = 100
    """Of each text."""
    width: int = 64
    layers: int = 5
    """Of the decoder that is trained."""
    prompts: int = 16
    """Prompts a step, with two pairs of 16 tokens each."""
    output: pathlib.Path = pathlib.Path("runs")


class Training:
    """Takes steps in a thread until it is stopped, and counts them."""

    def __init__(self, step: Callable[[], Any]):
        """Begins at once."""
        self.steps, self._step, self._stop = 0, step, threading.Event()
        self._began, self._thread = time.monotonic(), threading.Thread(target=self._work)
        self._thread.start()

    def _work(self) -> None:
        while not self._stop.is_set():
            jax.block_until_ready(self._step())
            self.steps += 1

    def stop(self) -> float:
        """Returns the steps taken a second."""
        self._stop.set()
        self._thread.join()
        return self.steps / (time.monotonic() - self._began)


def make_step(config: Config) -> Callable[[], Any]:
    """Returns the call that takes a step, compiled."""
    heads = max(config.width // 8, 1)
    model = DecoderConfig(512, config.width, config.layers, heads, heads, 8, 3 * config.width, context_length=64)
    step = bilevel_step(model, random_tokens(model, config.prompts, 32))
    jax.block_until_ready(step())
    return step


def measure(config: Config, step: Callable[[], Any] | None) -> dict[str, Any]:
    """Returns what labellers see of a page, beside training or not, and checks the journal."""
    count = round(config.per_minute * config.seconds / 60 * 1.5) + 2 * config.labellers
    text = "word " * config.words
    with tempfile.TemporaryDirectory() as folder:
        queue = Queue(LabelStore(pathlib.Path(folder) / "labels.sqlite"), repeats=0.0)
        queue.add(make_pair("people", f"Prompt {n}: {text}", f"first {text}", f"second {text}") for n in range(count))
        with Page(queue, Board("Which answer is better?"), port=0) as page:
            training = None if step is None else Training(step)
            try:
                found = _label(config, str(page.address))
            finally:
                speed = 0.0 if training is None else training.stop()
        votes = LabelStore(pathlib.Path(folder) / "labels.sqlite").votes()
    if len(votes) != found["saved"] or len({vote.pair for vote in votes}) != len(votes):
        raise AssertionError(f"{found['saved']} labels were saved, {len(votes)} are in the journal")
    return found | {"steps_per_second": speed, "per_minute": 60 * len(found["seconds"]["label"]) / config.seconds}


def _label(config: Config, address: str) -> dict[str, Any]:
    flags = [f"--{name.replace('_', '-')}={getattr(config, name)}" for name in ("labellers", "per_minute", "seconds")]
    command = [sys.executable, "-m", "benchmarks.labellers", address, *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=config.seconds + 120)
    if done.returncode:
        raise RuntimeError(f"the labellers failed: {done.stderr[-2000:]}")
    return json.loads(done.stdout)


def row_of(name: str, found: dict[str, Any]) -> tuple:
    """Returns a row of the table: milliseconds of labels and of requests for the state, labels a minute, training."""
    labels, states = (1e3 * np.asarray(found["seconds"][kind] or [np.nan]) for kind in ("label", "state"))
    percentiles = [round(float(np.percentile(labels, part)), 1) for part in (50, 99, 99.9)]
    cells = (*percentiles, round(float(labels.max()), 1), round(float(np.percentile(states, 99)), 1))
    return name, round(found["per_minute"]), *cells, found["refused"], round(found["steps_per_second"], 2) or None


def main(config: Config) -> pathlib.Path:
    """Measures training alone, the page alone, and both; returns the folder of the results."""
    machine, step = machine_info(), make_step(config)
    alone = Training(step)
    time.sleep(config.seconds / 3)
    speed = alone.stop()
    found = {"page alone": measure(config, None), "page beside training": measure(config, step)}
    rows = [("training alone", *[None] * 7, round(speed, 2))] + [row_of(*each) for each in found.items()]
    columns = (
        "what",
        "labels a minute",
        "p50, ms",
        "p99",
        "p99.9",
        "longest",
        "p99 of states",
        "refused",
        "steps a second",
    )
    title = f"{config.labellers} labellers; goal: p99 of labels below {GOAL:g} ms beside training"
    note = (
        "Between a label's request and its answer, which brings the next pair, lie two transactions; both are on disk "
        "before the answer is sent. All labels that were said to be saved were in the journal, no pair twice."
    )
    load = f"The load of the machine was {os.getloadavg()[0]:.1f} at the end."
    return write_results(config, "labelling", [Table(title, columns, rows)], found, machine, notes=[note, load])


if __name__ == "__main__":
    main(tyro.cli(Config))
