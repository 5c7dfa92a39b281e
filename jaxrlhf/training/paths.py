"""Local paths: addresses are refused, and strange names are kept away from libraries that misread them."""

import contextlib
import os
import pathlib
import re
import tempfile
import weakref
from typing import Any

_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/+")
_SAFE = re.compile(r"[A-Za-z0-9_./@+=, -]*")


def check_local(path: Any, name: str) -> None:
    """Raises ValueError for an address such as `gs://bucket/run`, which would become a local folder `gs:`.

    Args:
        path: as text or as a path, in which `//` has become `/`.
        name: of the setting, such as `--output`.
    """
    if _ADDRESS.match(str(path)):
        address = _ADDRESS.sub(r"\1://", str(path), count=1)
        raise ValueError(
            f"{name} {address} is an address, and only folders and files of this machine are read and written; "
            "mount the store, or copy what it holds."
        )


class PlainPath:
    """A name of a folder that every library can read, whatever letters the folder's own name has.

    Some libraries take brackets in a path for a pattern, or fail at backslashes and at names that are not UTF-8. Such a
    folder is reached through a symbolic link with a plain name, which goes when this object does.

    Attributes:
        folder: the folder itself.
        path: its plain name; the folder's own where that is plain.
    """

    def __init__(self, folder: str | os.PathLike):
        """Creates the folder if necessary.

        Raises:
            OSError: the folder or the link cannot be created.
        """
        self.folder = self.path = pathlib.Path(folder).absolute()
        if _SAFE.fullmatch(str(self.folder)):
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        links = tempfile.mkdtemp(prefix="jaxrlhf-", dir=None if _SAFE.fullmatch(tempfile.gettempdir()) else "/tmp")
        self.path = pathlib.Path(links) / "folder"
        self.path.symlink_to(self.folder, target_is_directory=True)
        self._finalizer = weakref.finalize(self, _remove, self.path)

    def own(self, text: str) -> str:
        """Returns a message with the folder's own name in place of the plain one."""
        return text.replace(str(self.path), str(self.folder))


def _remove(link: pathlib.Path) -> None:
    with contextlib.suppress(OSError):
        link.unlink()
        link.parent.rmdir()
