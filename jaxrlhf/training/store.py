"""A run's folder copied to an object store after every checkpoint and at its end, and back where the run continues.

A run works in a local folder, which has locks and files that grow. What is copied are its files by their own names, so
that models and reports can be read in the store. Checkpoints never change once they are written; a list of the files
(`store.json`) is written after them, and the files of older checkpoints are removed after that: at any moment the list
names whole checkpoints only. Files that grow (metrics, labels) may be ahead of the list, which a run that resumes expects.
"""

import contextlib
import json
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

from etils import epath

LIST = "store.json"
VERSION = 1
CHECKPOINTS = "checkpoints"


class RunStore:
    """The copy of one run's folder at an address such as `gs://bucket/runs`, or in a folder.

    Attributes:
        root: of the copy.
    """

    def __init__(self, address: str, name: str):
        """Takes the address of the folder for all runs, and the run's name."""
        with _said(address, "opened"):
            self.root = epath.Path(address) / name
        self._address = f"{address.rstrip('/')}/{name}"
        self._copied: dict[str, tuple[int, int]] = {}

    def __str__(self) -> str:
        return self._address

    def begin(self, folder: pathlib.Path, *, resume: bool) -> None:
        """Fetches the run's folder if it is in the store and not here.

        Args:
            folder: of the run; nothing is written to one that exists.
            resume: whether a run that exists may be continued.

        Raises:
            ValueError: the run exists and is not resumed, the store is further than the folder, a file is missing or cut
                short, or the store cannot be read.
        """
        files = self._list()
        if files is None:
            return
        if not resume:
            raise ValueError(f"There is a run in {self} already; add --resume to go on with it, or name another.")
        if not folder.exists():
            self._fetch(folder, files)
            return
        here = max((int(path.name) for path in (folder / CHECKPOINTS).glob("*") if path.name.isdigit()), default=0)
        there = _last_step(files)
        if there > here:
            raise ValueError(
                f"{self} has taken {there} steps and {folder} only {here}: move that folder away to go on from the store."
            )

    def push(self, folder: pathlib.Path) -> None:
        """Copies what has changed, then the list of files, and removes what the folder has no longer.

        Raises:
            ValueError: the store cannot be written; the checkpoints of its list are still whole.
        """
        before = self._list() or {}
        with _said(str(self), "written"):
            now: dict[str, int] = {}
            for name in sorted(_files(folder), key=lambda name: (name.startswith(CHECKPOINTS), name)):
                with contextlib.suppress(FileNotFoundError):
                    now[name] = self._copy_out(folder, name, before.get(name))
            content = {"version": VERSION, "files": now}
            self.root.mkdir(parents=True, exist_ok=True)
            (self.root / LIST).write_text(json.dumps(content, indent=1) + "\n")
            for name in before.keys() - now.keys():
                (self.root / name).unlink(missing_ok=True)

    def _copy_out(self, folder: pathlib.Path, name: str, listed: int | None) -> int:
        """Copies a file unless it has been; returns its size."""
        status = (folder / name).stat()
        stamp = status.st_size, status.st_mtime_ns
        same = name.startswith(CHECKPOINTS) and listed == status.st_size
        if not same and self._copied.get(name) != stamp:
            _copy(epath.Path(folder / name), self.root / name)
        self._copied[name] = stamp
        return status.st_size

    def _list(self) -> dict[str, int] | None:
        """Returns the sizes of the listed files; None if there is no run."""
        with _said(str(self), "read"):
            if not (self.root / LIST).exists():
                return None
            text = (self.root / LIST).read_text()
        try:
            content = json.loads(text)
            files, version = {str(name): int(size) for name, size in content["files"].items()}, content["version"]
            outside = [name for name in files if pathlib.PurePosixPath(name).is_absolute() or ".." in name.split("/")]
            if outside:
                raise ValueError(f"{outside[0]} is outside the folder")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{self}/{LIST} is damaged ({_short(error)}); name another run, or mend it.") from None
        if version != VERSION:
            raise ValueError(f"{self} was written by a newer version; update jaxrlhf.")
        return files

    def _fetch(self, folder: pathlib.Path, files: dict[str, int]) -> None:
        partial = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for name, size in files.items():
            with _said(str(self), "read"):
                if not (self.root / name).exists():
                    raise ValueError(f"{self} lacks {name}, which its {LIST} lists; copy it there again.")
                _copy(self.root / name, epath.Path(partial / name))
            found = (partial / name).stat().st_size
            if name.startswith(CHECKPOINTS) and found != size:
                raise ValueError(f"{name} in {self} has {found} bytes in place of {size}; copy it there again.")
        partial.rename(folder)


def _files(folder: pathlib.Path) -> Iterator[str]:
    """Yields the names of a run's files, without locks, trials and what is still being written."""
    for path in folder.rglob("*"):
        name = path.relative_to(folder)
        partial = any("-tmp" in part or part.endswith(".partial") for part in name.parts)
        if path.is_file() and not partial and name.parts[0] not in ("writer", "trial", "checkpoints-trial"):
            yield name.as_posix()


def _last_step(files: dict[str, int]) -> int:
    parts = (name.split("/") for name in files if name.startswith(f"{CHECKPOINTS}/"))
    return max((int(part[1]) for part in parts if part[1].isdigit()), default=0)


def _copy(source: Any, target: Any) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with source.open("rb") as reader, target.open("wb") as writer:
        shutil.copyfileobj(reader, writer, 1 << 24)


@contextlib.contextmanager
def _said(address: str, done: str) -> Iterator[None]:
    """Turns whatever a store's library raises into one sentence."""
    try:
        yield
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(
            f"{address} cannot be {done} ({_short(error)}); check the address and its credentials, and that the library "
            "of its store is installed (gcsfs for gs://, s3fs for s3://)."
        ) from None


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
