"""What a run leaves behind: a folder of its own with config, metrics, results and figures."""

import dataclasses
import fcntl
import json
import math
import os
import pathlib
import socket
import time
from typing import Any

import numpy as np


class RunFolder:
    """A folder under `root`, written as the run goes, so that a killed run keeps what it has measured.

    Attributes:
        path: of the folder.
        resumed: whether it was there before.
        writes: whether this process is the one that writes.
    """

    def __init__(self, root: pathlib.Path, name: str, *, fixed: str | None = None, resume: bool = False):
        """Makes `root/name-YYYYmmdd-HHMMSS`, with a number behind it where that is taken; or opens `root/fixed`.

        As long as this process lives, no other may write the folder.

        Args:
            root: where it is made.
            name: of what is run.
            fixed: the folder's own name, which a later run can give again.
            resume: goes on in a folder that is there; makes one where there is none, and so may always be given.

        Raises:
            ValueError: the folder cannot be made or written, another process writes it, or it is there and is not to be
                resumed.
        """
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
        """Returns the folder that another process of the same run writes; this one only reads."""
        folder = cls.__new__(cls)
        folder.path, folder.resumed, folder.writes = path, True, False
        return folder

    def release(self) -> None:
        """Lets another writer in, this process among them."""
        if self.writes:
            self._lock.close()

    def write_json(self, name: str, value: Any) -> None:
        """Writes one JSON file; dataclasses, paths and arrays become plain values, a number that is not finite null."""
        self.write_text(name, json.dumps(plain(value), indent=2, allow_nan=False) + "\n")

    def append_metrics(self, **row: Any) -> None:
        """Appends one line to metrics.jsonl."""
        if not self.writes:
            return
        with (self.path / "metrics.jsonl").open("a") as stream:
            stream.write(json.dumps(plain(row), allow_nan=False) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """Returns the lines of metrics.jsonl."""
        path = self.path / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []

    def metrics_size(self) -> int:
        """Returns the bytes of metrics.jsonl."""
        path = self.path / "metrics.jsonl"
        return path.stat().st_size if path.is_file() else 0

    def cut_metrics(self, size: int) -> None:
        """Takes back what metrics.jsonl has beyond a size: steps that a run goes on before."""
        if self.writes and self.metrics_size() > size:
            os.truncate(self.path / "metrics.jsonl", size)

    def write_text(self, name: str, text: str) -> None:
        """Writes one text file."""
        if self.writes:
            (self.path / name).write_text(text)


def _locked(path: pathlib.Path) -> Any:
    """Returns an open file by which this process alone holds the folder; the system gives it back if the process dies."""
    stream = (path / "writer").open("a+")
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        stream.seek(0)
        holder = stream.read().strip() or "unknown"
        raise ValueError(
            f"Another process ({holder}) writes {path}; wait until it has ended, or name another run."
        ) from None
    stream.truncate(0)
    stream.write(f"process {os.getpid()} on {socket.gethostname()}")
    stream.flush()
    return stream


def plain(value: Any) -> Any:
    """Returns `value` in JSON's types."""
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
