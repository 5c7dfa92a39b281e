"""Runs each library's measurements in a process of its own, which has the whole GPU."""

import multiprocessing
import pathlib
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks import libraries, trainers
from benchmarks.batches import random_tokens
from benchmarks.gpu.cases import Config, Library, Row, case_of
from benchmarks.gpu.measure import (
    BFLOAT16_TOLERANCE,
    MEASURES,
    Measurement,
    free_memory,
    out_of_memory,
    rows_of,
    torch_step,
)
from benchmarks.gpu.steps import call_of, supervised_step
from benchmarks.timing import EXTRA, check_close
from jaxrlhf.lm.hugging_face.weights import load_decoder
from jaxrlhf.lm.transformer.model import decoder
from jaxrlhf.lm.transformer.trunk import Attention

TIME_FRACTIONS: dict[Library, float] = {"ours": 0.65, "transformers": 0.5, "Tunix": 1.0}
"""Of the time left when a library's process starts; the last one may use all of it."""
CHECKED_LEARNING_RATE = 1e-2
"""For the first steps that are compared: losses must fall by much more than rounding."""

Result = Measurement | str
"""A measurement, or why there is none."""


class Start(NamedTuple):
    """The first message of a process: its device, and its losses of the first steps of a tiny model."""

    device: str
    losses: list[float]


class Results(NamedTuple):
    """Everything that the processes sent.

    Attributes:
        measured: by library and row.
        devices: name of each library's device.
        notes: what was checked.
    """

    measured: dict[tuple[Library, Row], Result]
    devices: dict[Library, str]
    notes: list[str]


def first_losses(library: Library, directory: pathlib.Path, attention: Attention) -> list[float]:
    """Returns a library's losses of the first 4 supervised steps of the model in a directory."""
    config, params = load_decoder(directory)
    tokens = random_tokens(config, 4, 32)
    if library == "ours":
        policy = decoder(config, dtype=jnp.bfloat16, attention=attention)
        call = call_of(supervised_step(policy, params, 0, tokens, CHECKED_LEARNING_RATE))
        return [float(call().loss) for _ in range(4)]
    if library == "transformers":
        model = libraries.torch_policy(directory).to(libraries.torch_device())
        step = torch_step(model, tokens, CHECKED_LEARNING_RATE)
    else:
        model = libraries.tunix_bfloat16(libraries.tunix_policy(directory, config))
        step = trainers.tunix_supervised(model, tokens, CHECKED_LEARNING_RATE)
    return [step() for _ in range(4)]


def start(library: Library, directory: pathlib.Path, attention: Attention) -> Start:
    """Returns the device that a library runs on, and its first losses."""
    device = jax.devices()[0].device_kind
    if library == "transformers":
        import torch

        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return Start(device, first_losses(library, directory, attention))


def attempt(function: Callable, *arguments: Any) -> Any:
    """Returns the function's result, or a sentence on why it failed.

    Failures are a missing package, a lack of memory, an error of the device or its compiler, and a check that fails.
    """
    try:
        return function(*arguments)
    except ImportError as error:
        return f"{error.name or error} is not installed; {EXTRA}"
    except (MemoryError, RuntimeError, ValueError) as error:
        traceback.print_exc()
        message = " ".join(str(error).split())[:160]
        return f"out of memory: {message}" if out_of_memory(error) else message or repr(error)


def run(config: Config, library: Library, directory: pathlib.Path, sender: Connection) -> None:
    """Sends `Start`, then a result for each of a library's rows as soon as it is there; runs in its own process."""
    if library == "transformers":
        jax.config.update("jax_platforms", "cpu")  # torch needs the GPU's memory
    sender.send(attempt(start, library, directory, config.attention))
    for row in rows_of(config, library):
        began = time.monotonic()
        print(f"{library}, {row.label}, {row.workload}: begins", flush=True)
        result = attempt(MEASURES[library, row.workload], case_of(config, row))
        free_memory()
        summary = result if isinstance(result, str) else f"{1e3 * result.timing.median:.4g} ms"
        print(f"{library}, {row.label}, {row.workload}: {summary} (after {time.monotonic() - began:.0f} s)", flush=True)
        sender.send(result)


def messages_of(config: Config, library: Library, directory: pathlib.Path, deadline: float) -> tuple[list[Any], str]:
    """Starts a library's process and returns its messages up to the deadline, and why there are no more."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=run, args=(config, library, directory, sender), daemon=True)
    messages, reason = [], "not measured: the time limit was reached"
    process.start()
    sender.close()
    try:
        while receiver.poll(max(0.0, deadline - time.monotonic())):
            messages.append(receiver.recv())
    except EOFError:
        process.join()
        reason = f"not measured: the process ended with code {process.exitcode}"
    process.terminate()
    process.join()
    return messages, reason


def check_losses(library: Library, ours: list[float], theirs: list[float]) -> str:
    """Returns a sentence on a library's first losses, after checking them against those of the first library.

    Raises:
        ValueError: they differ.
    """
    losses = f"First losses of a tiny model, {library}: {', '.join(f'{loss:.3f}' for loss in theirs)}"
    if ours is theirs:
        return f"{losses}."
    return f"{losses}; {check_close('equal', ours, theirs, tolerance=BFLOAT16_TOLERANCE)}."


def collect(config: Config, directory: pathlib.Path, deadline: float) -> Results:
    """Runs the libraries one after the other; a library whose first losses are wrong has no measurements."""
    results, ours = Results({}, {}, []), None
    for index, library in enumerate(config.libraries):
        fraction = 1.0 if index == len(config.libraries) - 1 else TIME_FRACTIONS[library]
        now = time.monotonic()
        messages, reason = messages_of(config, library, directory, now + fraction * (deadline - now))
        first, *measured = messages or [reason]
        if isinstance(first, Start):
            results.devices[library] = first.device
            ours = first.losses if ours is None else ours
            note = attempt(check_losses, library, ours, first.losses)
            if note.startswith("First"):
                results.notes.append(note)
            else:
                measured, reason = [], note
        else:
            measured, reason = [], first
        rows = rows_of(config, library)
        padded = [*measured, *[reason] * (len(rows) - len(measured))]
        results.measured.update({(library, row): result for row, result in zip(rows, padded, strict=True)})
    return results
