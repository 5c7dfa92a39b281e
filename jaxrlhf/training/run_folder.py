"""What a run leaves behind: a folder of its own with config, metrics, results and figures."""

import dataclasses
import json
import math
import os
import pathlib
import time
from typing import Any

import numpy as np


class RunFolder:
    """A new folder under `root`, written as the run goes, so that a killed run keeps what it has measured."""

    def __init__(self, root: pathlib.Path, name: str):
        """Makes `root/name-YYYYmmdd-HHMMSS`, with a number behind it where that is taken.

        Raises:
            ValueError: the folder cannot be made or written.
        """
        stamp = time.strftime("%Y%m%d-%H%M%S")
        for attempt in range(1000):
            self.path = root / (f"{name}-{stamp}" + (f"-{attempt}" if attempt else ""))
            try:
                root.mkdir(parents=True, exist_ok=True)
                self.path.mkdir()
                break
            except FileExistsError:
                if not root.is_dir():
                    raise ValueError(f"The output {root} is a file; give --output a folder.") from None
            except OSError as error:
                raise ValueError(
                    f"The output folder {root} cannot be written ({error.strerror}); give --output another."
                ) from None
        if not os.access(self.path, os.W_OK):
            raise ValueError(f"The output folder {self.path} cannot be written; give --output another.")

    def write_json(self, name: str, value: Any) -> None:
        """Writes one JSON file; dataclasses, paths and arrays become plain values, a number that is not finite null."""
        (self.path / name).write_text(json.dumps(plain(value), indent=2, allow_nan=False) + "\n")

    def append_metrics(self, **row: Any) -> None:
        """Appends one line to metrics.jsonl."""
        with (self.path / "metrics.jsonl").open("a") as stream:
            stream.write(json.dumps(plain(row), allow_nan=False) + "\n")

    def write_text(self, name: str, text: str) -> None:
        """Writes one text file."""
        (self.path / name).write_text(text)


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
