"""Several processes as one run: a TPU pod, a Slurm job, or addresses that are told.

Every process runs the same script on the same data and holds its part of every array. What happens on the host happens in
the first process (files, what is printed), in each process for its share (annotators), or in all of them alike.
"""

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

BEAT = 2.0
"""Seconds between two signs of life of a process."""

LOST = 30
"""Seconds without one, after which a process counts as lost."""

TEXT = 4096
"""Bytes of a text that one process tells the others."""


class ProcessAddress(NamedTuple):
    """The first process's address, the number of processes, and this one's, from 0."""

    address: str
    count: int
    index: int


class SharedError(ValueError):
    """Raised in all processes alike, which are still together."""


def parse_process_address(text: str) -> ProcessAddress | None:
    """Returns the place that a line such as `10.0.0.1:1234,4,0` says; None for `auto`, which asks the environment.

    Raises:
        ValueError: it is neither.
    """
    if text == "auto":
        return None
    found = re.fullmatch(r"([^,\s]+:\d+),(\d+),(\d+)", text)
    if not found or not int(found[3]) < int(found[2]):
        raise ValueError(
            f"Processes are told as auto or HOST:PORT,COUNT,INDEX with an index below the count, not {text!r}."
        )
    return ProcessAddress(found[1], int(found[2]), int(found[3]))


def connect(place: ProcessAddress | None, *, seconds: int = 300) -> None:
    """Joins this process to the others. To be called before anything is computed.

    A process that dies takes the others with it within `LOST` seconds, with a message of JAX's coordination service; where
    that is not the first to notice, `lost` says who is gone.

    Args:
        place: of this process; None asks the environment: of a TPU pod, Slurm, Open MPI, or Kubernetes.
        seconds: to wait for the others.

    Raises:
        ValueError: the environment says nothing, or not all processes came.
    """
    told: dict[str, Any] = {}
    if place is not None:
        if place.index:
            _wait_for(place.address, seconds)
        told = {"coordinator_address": place.address, "num_processes": place.count, "process_id": place.index}
    try:
        jax.distributed.initialize(**told, initialization_timeout=seconds, heartbeat_timeout_seconds=LOST)
    except ValueError as error:
        raise ValueError(
            f"This is no place where several processes are known ({error}); tell them with HOST:PORT,COUNT,INDEX."
        ) from None
    except RuntimeError as error:
        where = "the first process" if place is None else place.address
        raise ValueError(f"Not all processes came to {where} within {seconds} s ({_short(error)}).") from None
    beat = threading.Thread(target=_beat, daemon=True)
    beat.start()


def first() -> bool:
    """Returns whether this is the process that writes and speaks."""
    return jax.process_index() == 0


def lost(*, seconds: float = 5 * BEAT) -> list[int]:
    """Returns the processes that gave no sign of life for some seconds; the first, if it is not to be reached."""
    client = _client()
    if client is None:
        return []
    try:
        before = _beats(client)
        time.sleep(seconds)
        after = _beats(client)
    except RuntimeError:
        return [0]
    return [index for index in range(jax.process_count()) if before.get(index) == after.get(index)]


def told_of_lost(error: BaseException) -> str:
    """Returns a sentence on an error that broke what the processes did together."""
    gone = [f"process {index}" for index in lost()]
    told = (
        f"{', '.join(gone)} of {jax.process_count()} {'is' if len(gone) == 1 else 'are'} gone"
        if gone
        else "of no known cause"
    )
    return f"The processes cannot go on together: {told} ({_short(error)}). Start all of them again with --resume."


def from_first(make: Callable[[], str]) -> str:
    """Returns the text that the first process makes, in all of them.

    Raises:
        SharedError: what the first process raised as a ValueError.
    """
    if jax.process_count() == 1:
        return make()
    text = ""
    if first():
        try:
            text = "+" + make()
        except ValueError as error:
            text = "-" + str(error)
    row = np.zeros(TEXT, np.uint8)
    written = text.encode()[:TEXT]
    row[: len(written)] = np.frombuffer(written, np.uint8)
    told = bytes(np.asarray(multihost_utils.broadcast_one_to_all(row))).rstrip(b"\0").decode(errors="ignore")
    if told.startswith("-"):
        raise SharedError(told[1:])
    return told[1:]


def gathered(tree: Any) -> Any:
    """Returns a tree of arrays on the host, whole in every process."""

    def one(leaf):
        whole = not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated
        return np.asarray(leaf) if whole else multihost_utils.process_allgather(leaf, tiled=True)

    return jax.tree.map(one, tree)


def shared(answer: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the function of texts of which each process answers its share, and all know all answers.

    Raises:
        SharedError: when called, where it failed in some process.
    """

    def answer_share(*texts: Sequence[str]) -> list[float]:
        count, processes = len(texts[0]), jax.process_count()
        width = -(-count // processes)
        begin = width * jax.process_index()
        failed, given = "", np.full(width, np.nan)
        try:
            own = answer(*[list(column[begin : begin + width]) for column in texts]) if begin < count else []
            given[: len(own)] = [np.nan if value is None else value for value in own]
        except (ValueError, TypeError, OSError) as error:
            failed = f"process {jax.process_index()}: {error}"
        _raise_together(failed)
        return np.asarray(multihost_utils.process_allgather(given)).ravel()[:count].tolist()

    return answer if jax.process_count() == 1 else answer_share


def agreed(values: np.ndarray) -> np.ndarray:
    """Returns the first process's array, which has the same shape in all of them."""
    return values if jax.process_count() == 1 else np.asarray(multihost_utils.broadcast_one_to_all(values))


def _raise_together(failed: str) -> None:
    row = np.zeros(TEXT // 8, np.uint8)
    written = failed.encode()[: len(row)]
    row[: len(written)] = np.frombuffer(written, np.uint8)
    rows = np.asarray(multihost_utils.process_allgather(row))
    told = [bytes(each).rstrip(b"\0").decode(errors="ignore") for each in rows]
    if any(told):
        raise SharedError("; ".join(each for each in told if each))


def _wait_for(address: str, seconds: float) -> None:
    """Waits until the first process listens: JAX would end this one without a word that one can act on."""
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
    # The coordination service's own store has no public name.
    from jax._src import distributed

    return distributed.global_state.client


def _beat() -> None:
    client, number = _client(), 0
    while True:
        number += 1
        with suppress(RuntimeError):
            client.key_value_set(f"jaxrlhf/beat/{jax.process_index()}", str(number), allow_overwrite=True)
        time.sleep(BEAT)


def _beats(client: Any) -> dict[int, str]:
    return {int(name.rsplit("/", 1)[1]): value for name, value in client.key_value_dir_get("jaxrlhf/beat/")}


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
