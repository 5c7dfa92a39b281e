"""Several processes as one run: on a TPU pod, in a Slurm job, or at given addresses.

Every process runs the same script on the same data and holds its shards of every array. Host work happens in the first
process (files, printing), split over the processes (annotators), or identically in all of them.
"""

import atexit
import re
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

HEARTBEAT_SECONDS = 2.0
"""Seconds between two heartbeats of a process."""

HEARTBEAT_TIMEOUT = 30
"""Seconds without a heartbeat after which a process counts as lost."""

TEXT_BYTES = 4096
"""Maximum size of a text that one process sends to the others."""


class ProcessAddress(NamedTuple):
    """The first process's address, the number of processes, and this one's index, from 0."""

    address: str
    count: int
    index: int


class SharedError(ValueError):
    """Raised in all processes at the same point, so that they can still communicate."""


def parse_process_address(text: str) -> ProcessAddress | None:
    """Parses a text such as `10.0.0.1:1234,4,0`; returns None for `auto`, which detects the address.

    Raises:
        ValueError: the text is neither.
    """
    if text == "auto":
        return None
    match = re.fullmatch(r"([^,\s]+:\d+),(\d+),(\d+)", text)
    if not match or not int(match[3]) < int(match[2]):
        raise ValueError(
            f"Processes are given as auto or HOST:PORT,COUNT,INDEX with an index below the count, not {text!r}."
        )
    return ProcessAddress(match[1], int(match[2]), int(match[3]))


def connect(address: ProcessAddress | None, *, seconds: int = 300) -> None:
    """Connects this process to the others. Must be called before any computation.

    If a process dies, JAX's coordination service ends the others within `HEARTBEAT_TIMEOUT` seconds, with a message of its
    own; if a collective fails first, `lost_processes` says which processes are gone.

    Args:
        address: of this process; None detects it: on a TPU pod, or under Slurm, Open MPI or Kubernetes.
        seconds: to wait for the others.

    Raises:
        ValueError: no address was detected, or not all processes connected.
    """
    options: dict[str, Any] = {}
    if address is not None:
        if address.index:
            _wait_for(address.address, seconds)
        options = {
            "coordinator_address": address.address,
            "num_processes": address.count,
            "process_id": address.index,
        }
    try:
        jax.distributed.initialize(
            **options, initialization_timeout=seconds, heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT
        )
    except ValueError as error:
        raise ValueError(
            f"The addresses of the processes cannot be detected here ({error}); give HOST:PORT,COUNT,INDEX."
        ) from None
    except RuntimeError as error:
        first = "the first process" if address is None else address.address
        raise ValueError(f"Not all processes connected to {first} within {seconds} s ({_short(error)}).") from None
    ended = threading.Event()
    beating = threading.Thread(target=_send_heartbeats, args=(ended,), daemon=True)

    def end() -> None:
        ended.set()
        beating.join(HEARTBEAT_SECONDS)

    beating.start()
    # A thread that is within the client when the interpreter ends would abort the process.
    atexit.register(end)


def is_first_process() -> bool:
    """Returns whether this is the first process, which writes files and prints."""
    return jax.process_index() == 0


def lost_processes(*, seconds: float = 5 * HEARTBEAT_SECONDS) -> list[int]:
    """Returns the processes without a heartbeat for some seconds; the first process if it cannot be reached."""
    client = _client()
    if client is None:
        return []
    try:
        before = _heartbeats(client)
        time.sleep(seconds)
        after = _heartbeats(client)
    except RuntimeError:
        return [0]
    return [index for index in range(jax.process_count()) if before.get(index) == after.get(index)]


def lost_processes_message(error: BaseException) -> str:
    """Returns the message for an error that a collective raised: which processes are gone, and the remedy."""
    gone = [f"process {index}" for index in lost_processes()]
    reason = (
        f"{', '.join(gone)} of {jax.process_count()} {'is' if len(gone) == 1 else 'are'} gone"
        if gone
        else "the cause is unknown"
    )
    return f"The processes cannot go on together: {reason} ({_short(error)}). Start all of them again with --resume."


def broadcast_text(make: Callable[[], str]) -> str:
    """Returns in all processes the text that `make` returns in the first.

    Raises:
        SharedError: `make` raised a ValueError in the first process.
    """
    if jax.process_count() == 1:
        return make()
    text = ""
    if is_first_process():
        try:
            text = "+" + make()
        except ValueError as error:
            text = "-" + str(error)
    text = _decode(np.asarray(multihost_utils.broadcast_one_to_all(_encode(text, TEXT_BYTES))))
    if text.startswith("-"):
        raise SharedError(text[1:])
    return text[1:]


def gathered(tree: Any) -> Any:
    """Returns a tree of arrays on the host, the full arrays in every process."""

    def gather(leaf):
        local = not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated
        return np.asarray(leaf) if local else multihost_utils.process_allgather(leaf, tiled=True)

    return jax.tree.map(gather, tree)


def split_over_processes(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the function of texts split over the processes: each evaluates its part, and all get all values.

    Raises:
        SharedError: when called, if the function failed in some process.
    """

    def split_function(*texts: Sequence[str]) -> list[float]:
        count, processes = len(texts[0]), jax.process_count()
        width = -(-count // processes)
        start = width * jax.process_index()
        failure, values = "", np.full(width, np.nan)
        try:
            own = function(*[list(column[start : start + width]) for column in texts]) if start < count else []
            values[: len(own)] = [np.nan if value is None else value for value in own]
        except (ValueError, TypeError, OSError) as error:
            failure = f"process {jax.process_index()}: {error}"
        _raise_together(failure)
        return np.asarray(multihost_utils.process_allgather(values)).ravel()[:count].tolist()

    return function if jax.process_count() == 1 else split_function


def sentences_of_all(sentences: Sequence[str]) -> list[str]:
    """Returns in all processes the sentences of all of them, each once; that of one process alone names the process."""
    if jax.process_count() == 1:
        return list(sentences)
    rows = np.asarray(multihost_utils.process_allgather(_encode("\n".join(sentences), TEXT_BYTES)))
    said: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        for sentence in _decode(row).splitlines():
            said.setdefault(sentence, []).append(index)
    everywhere = jax.process_count()
    return [
        sentence if len(places) == everywhere else f"process {', '.join(map(str, places))}: {sentence}"
        for sentence, places in said.items()
    ]


def broadcast_array(values: np.ndarray) -> np.ndarray:
    """Returns the first process's array in all of them; shapes must agree."""
    return values if jax.process_count() == 1 else np.asarray(multihost_utils.broadcast_one_to_all(values))


def _raise_together(failure: str) -> None:
    """Raises SharedError in all processes if any of them has a failure to report."""
    rows = np.asarray(multihost_utils.process_allgather(_encode(failure, TEXT_BYTES // 8)))
    failures = [_decode(row) for row in rows]
    if any(failures):
        raise SharedError("; ".join(failure for failure in failures if failure))


def _encode(text: str, size: int) -> np.ndarray:
    """Returns the text in UTF-8, truncated or padded with zeros to `[size]` bytes."""
    row, content = np.zeros(size, np.uint8), text.encode()[:size]
    row[: len(content)] = np.frombuffer(content, np.uint8)
    return row


def _decode(row: np.ndarray) -> str:
    return bytes(row).rstrip(b"\0").decode(errors="ignore")


def _wait_for(address: str, seconds: float) -> None:
    """Waits until the first process listens; JAX would end this one without a helpful message."""
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((host, int(port)), timeout=2.0).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise ValueError(
                    f"The first process does not answer at {address} ({error}); start it too, at its own address."
                ) from None
            time.sleep(0.2)


def _client() -> Any:
    # The coordination service's key-value store has no public API.
    from jax._src import distributed

    return distributed.global_state.client


def _send_heartbeats(ended: threading.Event) -> None:
    client, number = _client(), 0
    while not ended.is_set():
        number += 1
        with suppress(RuntimeError):
            client.key_value_set(f"jaxrlhf/beat/{jax.process_index()}", str(number), allow_overwrite=True)
        ended.wait(HEARTBEAT_SECONDS)


def _heartbeats(client: Any) -> dict[int, str]:
    return {int(name.rsplit("/", 1)[1]): value for name, value in client.key_value_dir_get("jaxrlhf/beat/")}


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
