"""The journal of paid answers on disk: written the moment an answer comes, never written over, shared by several runs.

It is an SQLite file with a write-ahead log and full synchronisation, and not lines appended to a text file: each answer is
a transaction that is on the disk when `Journal.keep` returns, a torn write at the end of the log is recognised by its
check sum, and several runs may write at once. Copy it together with the `-wal` file beside it, if there is one.
"""

import contextlib
import hashlib
import pathlib
import sqlite3
import threading
import time
import weakref
from collections.abc import Iterable

Answer = float | None

OURS = 0x6A726C68
"""SQLite's `application_id` of a journal: what tells it from other people's databases."""
LONGEST_WAIT = 30.0
"""Seconds that a writer waits for another one; a write takes milliseconds."""


class Journal:
    """Answers by the keys of their questions, on disk; safe for several threads and processes at once."""

    def __init__(self, path: str | pathlib.Path | None):
        """Opens a journal or makes one; None is one in memory, which is gone with the process.

        Raises:
            ValueError: the file is damaged or no journal, and was left as it is; or it cannot be made.
        """
        self.path = None if path is None else pathlib.Path(path)
        self._lock = threading.Lock()
        with self._one_sentence():
            if self.path is not None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
            self._connection = _open(self.path)
        # Closed with the journal or the process, and the log is then merged into the file.
        self._close = weakref.finalize(self, self._connection.close)

    def find(self, keys: Iterable[bytes]) -> dict[bytes, Answer]:
        """Returns the answers that there are.

        Raises:
            ValueError: the journal cannot be read.
        """
        found = {}
        with self._lock, self._one_sentence():
            for key in keys:
                row = self._connection.execute("SELECT answer FROM answers WHERE key = ?", (key,)).fetchone()
                if row is not None:
                    found[key] = row[0]
        return found

    def keep(self, key: bytes, answer: Answer) -> Answer:
        """Writes an answer and returns what now stands: where another writer was first, its answer stays.

        On return the answer is on the disk.

        Raises:
            ValueError: the journal cannot be written.
        """
        with self._lock, self._one_sentence():
            row = (key, answer, _seal(key, answer))
            self._connection.execute("INSERT INTO answers VALUES (?, ?, ?) ON CONFLICT DO NOTHING", row)
            return self._connection.execute("SELECT answer FROM answers WHERE key = ?", (key,)).fetchone()[0]

    def __len__(self) -> int:
        with self._lock, self._one_sentence():
            return self._connection.execute("SELECT count(*) FROM answers").fetchone()[0]

    def close(self) -> None:
        """Closes the file; the journal is of no more use."""
        self._close()

    @contextlib.contextmanager
    def _one_sentence(self):
        try:
            yield
        except (sqlite3.OperationalError, sqlite3.ProgrammingError, OSError) as error:
            # A full disk, a folder without permission, a lock that another process does not give up.
            raise ValueError(
                f"The journal of labels {self.path} cannot be used ({error}); what is in it stays."
            ) from None
        except sqlite3.DatabaseError as error:
            reason = " ".join(str(error).split())
            raise ValueError(
                f"The journal of labels {self.path} is damaged or none at all ({reason}) and was left as it is; "
                "move it away to begin another, or put a copy in its place."
            ) from None


def _open(path: pathlib.Path | None) -> sqlite3.Connection:
    """Returns the connection to a journal that is as it was written, or new."""
    until = time.monotonic() + LONGEST_WAIT
    while True:
        try:
            if path is not None and path.exists() and path.stat().st_size:
                _check(path)
            connection = _connect(":memory:" if path is None else str(path))
            try:
                _prepare(connection)
            except BaseException:
                connection.close()
                raise
            return connection
        except sqlite3.OperationalError as error:
            # Of two who make a file at once SQLite turns one away without a wait.
            if getattr(error, "sqlite_errorcode", 0) & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > until:
                raise
            time.sleep(0.02)


def _check(path: pathlib.Path) -> None:
    """Looks at a file before anything may write to it, and be it only by closing it."""
    with contextlib.closing(_connect(f"{path.absolute().as_uri()}?mode=ro")) as connection:
        (found,) = connection.execute("PRAGMA quick_check(1)").fetchone()
        if found != "ok":
            raise sqlite3.DatabaseError(found)
        (owner,) = connection.execute("PRAGMA application_id").fetchone()
        # One whose maker was killed has no table yet, and is nobody's.
        if not connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            return
        if owner != OURS:
            raise ValueError(f"{path} is a database, but no journal of labels; name another file.")
        # SQLite looks after its own pages: what is written over inside of them would be taken for answers.
        for key, answer, seal in connection.execute("SELECT key, answer, seal FROM answers"):
            if not isinstance(key, bytes) or seal != _seal(key, answer):
                raise sqlite3.DatabaseError("an answer is not as it was written")


def _prepare(connection: sqlite3.Connection) -> None:
    connection.execute("PRAGMA journal_mode = WAL")
    # Without it a loss of power would take the last answers.
    connection.execute("PRAGMA synchronous = FULL")
    if connection.execute("PRAGMA application_id").fetchone()[0] != OURS:
        connection.execute(f"PRAGMA application_id = {OURS}")
    connection.execute(
        "CREATE TABLE IF NOT EXISTS answers (key BLOB PRIMARY KEY, answer REAL, seal BLOB) WITHOUT ROWID"
    )


def _seal(key: bytes, answer: Answer) -> bytes:
    """Returns a check sum of an answer and its question."""
    return hashlib.sha256(key + repr(answer).encode()).digest()[:8]


def _connect(place: str) -> sqlite3.Connection:
    return sqlite3.connect(
        place,
        timeout=LONGEST_WAIT,
        isolation_level=None,
        check_same_thread=False,
        uri=place.startswith("file:"),
    )
