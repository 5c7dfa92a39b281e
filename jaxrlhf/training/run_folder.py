"""The folder of a run: its configuration, metrics, results and figures."""

import dataclasses
import errno
import fcntl
import json
import math
import os
import pathlib
import socket
import time
from typing import Any

import numpy as np

from jaxrlhf.training.paths import check_local
from jaxrlhf.training.store import RunStore


class RunFolder:
    """A folder under `root`, written during the run, so that a killed run keeps what it has measured.

    Attributes:
        path: of the folder.
        resumed: whether it existed before.
        writes: whether this process is the one that writes.
        store: to which the folder is copied; None without.
    """

    store: RunStore | None = None

    def __init__(self, root: pathlib.Path, name: str, *, fixed: str | None = None, resume: bool = False):
        """Creates `root/name-YYYYmmdd-HHMMSS`, numbered if that exists; or opens `root/fixed`.

        The folder is locked against other processes for as long as this one lives.

        Args:
            root: parent folder.
            name: of the command or study.
            fixed: the folder's exact name, by which the run can be resumed.
            resume: continues in an existing folder, or creates it; so it may always be set.

        Raises:
            ValueError: the root is an address, the folder cannot be created or written, another process writes it, or it
                exists and `resume` is False.
        """
        check_local(root, "--output")
        if resume and fixed is None:
            raise ValueError("A run that can be resumed needs a name of its own; give --run NAME too.")
        if fixed is not None and (pathlib.PurePath(fixed).name != fixed or fixed in ("", ".", "..")):
            raise ValueError(f"A run's name is that of one folder, without slashes; got {fixed!r}.")
        stamp = f"{name}-{time.strftime('%Y%m%d-%H%M%S')}" if fixed is None else fixed
        self.resumed, self.writes = False, True
        for attempt in range(1000):
            self.path = root / (stamp + (f"-{attempt}" if attempt else ""))
            try:
                root.mkdir(parents=True, exist_ok=True)
                self.path.mkdir()
                break
            except FileExistsError:
                if not root.is_dir():
                    raise ValueError(f"The output {root} is a file; give --output a folder.") from None
                if fixed is not None:
                    self.resumed = True
                    break
            except OSError as error:
                raise ValueError(
                    f"The output folder {root} cannot be written ({error.strerror}); give --output another."
                ) from None
        if not os.access(self.path, os.W_OK):
            raise ValueError(f"The output folder {self.path} cannot be written; give --output another.")
        if self.resumed and not resume:
            raise ValueError(f"There is a run in {self.path} already; add --resume to go on with it, or name another.")
        self._lock = _locked(self.path)

    @classmethod
    def followed(cls, path: pathlib.Path) -> "RunFolder":
        """Returns the folder of a run whose files another process writes; this one only reads."""
        folder = cls.__new__(cls)
        folder.path, folder.resumed, folder.writes = path, True, False
        return folder

    def release(self) -> None:
        """Releases the lock; another writer, or this process again, may open the folder."""
        if self.writes:
            self._lock.close()

    def write_json(self, name: str, value: Any) -> None:
        """Writes a JSON file; dataclasses, paths and arrays become plain values, non-finite numbers null."""
        self.write_text(name, json.dumps(plain(value), indent=2, allow_nan=False) + "\n")

    def append_metrics(self, **row: Any) -> None:
        """Appends one line to metrics.jsonl."""
        if not self.writes:
            return
        with (self.path / "metrics.jsonl").open("a") as stream:
            stream.write(json.dumps(plain(row), allow_nan=False) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """Returns the lines of metrics.jsonl.

        Raises:
            ValueError: a line is damaged.
        """
        path = self.path / "metrics.jsonl"
        lines = path.read_bytes().splitlines() if path.is_file() else []
        return [_metrics_row(line, f"{path}, line {number}") for number, line in enumerate(lines, 1)]

    def metrics_size(self) -> int:
        """Returns the size of metrics.jsonl in bytes."""
        path = self.path / "metrics.jsonl"
        return path.stat().st_size if path.is_file() else 0

    def truncate_metrics(self, size: int) -> None:
        """Truncates metrics.jsonl to a size in bytes, which removes steps that a resumed run takes again."""
        if self.writes and self.metrics_size() > size:
            os.truncate(self.path / "metrics.jsonl", size)

    def write_text(self, name: str, text: str) -> None:
        """Writes a text file."""
        if self.writes:
            (self.path / name).write_text(text, encoding="utf-8", errors="replace")


def _locked(path: pathlib.Path) -> Any:
    """Returns an open file that holds the folder's lock; the system releases it if the process dies."""
    stream = (path / "writer").open("a+")
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            raise ValueError(
                f"The run's folder {path} cannot be locked ({error.strerror}); give --output a folder of a file system "
                "that has locks."
            ) from None
        stream.seek(0)
        holder = stream.read().strip() or "unknown"
        raise ValueError(
            f"Another process ({holder}) writes {path}; wait until it has ended, or name another run."
        ) from None
    stream.truncate(0)
    stream.write(f"process {os.getpid()} on {socket.gethostname()}")
    stream.flush()
    return stream


def _metrics_row(line: bytes, place: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
        if type(row["step"]) is not int:
            raise ValueError(f"step is {row['step']!r}, no whole number")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{place} is damaged ({reason}); mend it, or move the run's folder away.") from None
    return row


def plain(value: Any) -> Any:
    """Returns `value` converted to JSON's types."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain(dataclasses.asdict(value))
    as_dict = getattr(value, "_asdict", None)
    if as_dict is not None:
        return plain(as_dict())
    if isinstance(value, dict):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(part) for part in value]
    if isinstance(value, pathlib.PurePath):
        return str(value)
    if hasattr(value, "dtype"):
        return plain(np.asarray(value).tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
