"""The journal of paid labels on disk: each is written as it arrives, none is overwritten, and several runs may share it.

It is an SQLite file with a write-ahead log and full synchronisation rather than lines appended to a text file: each label
is a transaction that is on disk when `Journal.keep` returns, a torn write at the end of the log is detected by its
checksum, and several runs may write concurrently. When copying it, copy the `-wal` file beside it too, if there is one.
"""

import contextlib
import hashlib
import pathlib
import sqlite3
import threading
import time
import weakref
from collections.abc import Iterable

Label = float | None

APPLICATION_ID = 0x6A726C68
"""SQLite's `application_id` of a journal, which tells it from other databases."""
VERSION = 0
"""SQLite's `user_version` of a journal; a larger one is refused."""
LOCK_TIMEOUT = 30.0
"""Seconds that a writer waits for another one; a write takes milliseconds."""


class Journal:
    """Labels by `question_key`, on disk; safe for concurrent threads and processes."""

    def __init__(self, path: str | pathlib.Path | None):
        """Opens or creates a journal; None is one in memory, which ends with the process.

        Raises:
            ValueError: the file is damaged or is no journal, and was left as it is; or it cannot be created.
        """
        self.path = None if path is None else pathlib.Path(path)
        self._lock = threading.Lock()
        with self._readable_errors():
            if self.path is not None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
            self._connection = _open(self.path)
        # Runs when the journal is collected or the process exits; SQLite then merges the log into the file.
        self._close = weakref.finalize(self, self._connection.close)

    def find(self, keys: Iterable[bytes]) -> dict[bytes, Label]:
        """Returns the labels stored for `keys`.

        Raises:
            ValueError: the journal cannot be read.
        """
        found = {}
        with self._lock, self._readable_errors():
            for key in keys:
                row = self._connection.execute("SELECT answer FROM answers WHERE key = ?", (key,)).fetchone()
                if row is not None:
                    found[key] = row[0]
        return found

    def keep(self, key: bytes, label: Label) -> Label:
        """Stores a label and returns the stored one: where another writer was first, its label stays, unless it is None.

        The label is on disk on return.

        Raises:
            ValueError: the journal cannot be written.
        """
        with self._lock, self._readable_errors():
            row = (key, label, _checksum(key, label))
            self._connection.execute(
                "INSERT INTO answers VALUES (?, ?, ?) ON CONFLICT (key) DO UPDATE "
                "SET answer = excluded.answer, seal = excluded.seal WHERE answer IS NULL",
                row,
            )
            stored = self._connection.execute("SELECT answer FROM answers WHERE key = ?", (key,)).fetchone()
            if stored is None:
                raise sqlite3.DatabaseError("a label that was written is not there")
            return stored[0]

    def __len__(self) -> int:
        with self._lock, self._readable_errors():
            return self._connection.execute("SELECT count(*) FROM answers").fetchone()[0]

    def close(self) -> None:
        """Closes the file; the journal cannot be used afterwards."""
        self._close()

    @contextlib.contextmanager
    def _readable_errors(self):
        try:
            yield
        except (sqlite3.OperationalError, sqlite3.ProgrammingError, OSError) as error:
            # A full disk, a folder without permission, a lock that another process holds.
            raise ValueError(
                f"The journal of labels {self.path} cannot be used ({error}); what is in it stays."
            ) from None
        except (sqlite3.Error, sqlite3.Warning, UnicodeDecodeError, OverflowError) as error:
            # Damaged names of tables may be no text.
            reason = " ".join(str(error).split())
            raise ValueError(
                f"The journal of labels {self.path} is damaged or none at all ({reason}) and was left as it is; "
                "move it away to begin another, or put a copy in its place."
            ) from None


def _open(path: pathlib.Path | None) -> sqlite3.Connection:
    """Returns a connection to an intact or new journal."""
    deadline = time.monotonic() + LOCK_TIMEOUT
    while True:
        try:
            if path is not None and path.exists() and path.stat().st_size:
                _check(path)
            connection = _connect(":memory:" if path is None else _uri(path, "rwc"))
            try:
                _prepare(connection)
            except BaseException:
                connection.close()
                raise
            return connection
        except sqlite3.OperationalError as error:
            # Of two processes creating the file at once, SQLite rejects one without waiting.
            if getattr(error, "sqlite_errorcode", 0) & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def _check(path: pathlib.Path) -> None:
    """Checks a file read-only first: even closing a writable connection may write to it."""
    with contextlib.closing(_connect(_uri(path, "ro"))) as connection:
        (result,) = connection.execute("PRAGMA quick_check(1)").fetchone()
        if result != "ok":
            raise sqlite3.DatabaseError(result)
        (application,) = connection.execute("PRAGMA application_id").fetchone()
        # A journal whose creator was killed has neither table nor application_id yet.
        if not connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            return
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if application != APPLICATION_ID:
            raise ValueError(f"{path} is a database, but no journal of labels; name another file.")
        if version > VERSION:
            raise ValueError(f"The journal of labels {path} was written by a newer version; update jaxrlhf.")
        columns = [column[1] for column in connection.execute("PRAGMA table_info(answers)")]
        if columns != ["key", "answer", "seal"]:
            raise sqlite3.DatabaseError("it has no table of answers as journals have it")
        # SQLite checks the structure of pages only: overwritten values within them would pass as labels.
        for key, label, seal in connection.execute("SELECT key, answer, seal FROM answers"):
            is_label = label is None or (isinstance(label, float) and 0 <= label <= 1)
            if not isinstance(key, bytes) or not is_label or seal != _checksum(key, label):
                raise sqlite3.DatabaseError("an answer is not as it was written")


def _prepare(connection: sqlite3.Connection) -> None:
    connection.execute("PRAGMA journal_mode = WAL")
    # Otherwise a power loss could lose the last labels.
    connection.execute("PRAGMA synchronous = FULL")
    if connection.execute("PRAGMA application_id").fetchone()[0] != APPLICATION_ID:
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    connection.execute(
        "CREATE TABLE IF NOT EXISTS answers (key BLOB PRIMARY KEY, answer REAL, seal BLOB) WITHOUT ROWID"
    )


def _checksum(key: bytes, label: Label) -> bytes:
    return hashlib.sha256(key + repr(label).encode()).digest()[:8]


def _uri(path: pathlib.Path, mode: str) -> str:
    # As a path, names such as `:memory:` would mean something else to SQLite.
    return f"{path.absolute().as_uri()}?mode={mode}"


def _connect(name: str) -> sqlite3.Connection:
    return sqlite3.connect(
        name,
        timeout=LOCK_TIMEOUT,
        isolation_level=None,
        check_same_thread=False,
        uri=name.startswith("file:"),
    )
