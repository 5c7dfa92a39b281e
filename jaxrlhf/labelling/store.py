"""What people said, on disk: tables beside the labels of a journal, in the same SQLite file.

`answers`, the journal's own table, has the labels that were used and never change. Here are the pairs that were shown, the
votes on them, which can be withdrawn until then, and the leases: who holds which pair, in which order. A vote is on disk
before `give` returns, and the lease that it fulfils is gone with the same transaction.
"""

import contextlib
import json
import pathlib
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from jaxrlhf.annotation.journal_file import Journal, Label
from jaxrlhf.labelling.pairs import Pair, to_json

TABLES = (
    "CREATE TABLE IF NOT EXISTS pairs (pair BLOB PRIMARY KEY, texts TEXT) WITHOUT ROWID",
    "CREATE TABLE IF NOT EXISTS votes (id INTEGER PRIMARY KEY, lease TEXT UNIQUE, pair BLOB, person TEXT, tab TEXT, "
    "label REAL, swapped INTEGER, repeat INTEGER, note TEXT, seconds REAL, at REAL, forecast REAL, "
    "withdrawn INTEGER DEFAULT 0)",
    "CREATE TABLE IF NOT EXISTS leases (lease TEXT PRIMARY KEY, pair BLOB, person TEXT, tab TEXT, swapped INTEGER, "
    "repeat INTEGER, granted REAL) WITHOUT ROWID",
    "CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT) WITHOUT ROWID",
)


class Lease(NamedTuple):
    """A pair held by a tab of a person's browser.

    Attributes:
        lease: random name.
        pair: its key.
        person, tab: who holds it.
        swapped: whether the second completion is on the left.
        repeat: whether the person has labelled the pair before, and is asked again to measure consistency.
        granted: Unix time.
    """

    lease: str
    pair: bytes
    person: str
    tab: str
    swapped: bool
    repeat: bool
    granted: float


class Vote(NamedTuple):
    """What a person said of a pair.

    Attributes:
        lease: under which it was shown.
        pair, person, tab, swapped, repeat: of the lease.
        label: 1 where the first completion is preferred, 0 the second, 1/2 for a tie, None where it was skipped.
        note: of the person.
        seconds: from when the pair was shown, by the browser's clock.
        at: Unix time.
        forecast: of the pair, when the vote was given.
    """

    lease: str
    pair: bytes
    person: str
    tab: str
    label: Label
    swapped: bool
    repeat: bool
    note: str
    seconds: float
    at: float
    forecast: float | None = None


class LabelStore(Journal):
    """A journal with the tables of what people said."""

    def __init__(self, path: str | pathlib.Path | None):
        """Opens or creates it; see `Journal`.

        Raises:
            ValueError: as there.
        """
        super().__init__(path)
        with self._readable_errors():
            for table in TABLES:
                self._connection.execute(table)

    def add_pairs(self, pairs: Iterable[Pair]) -> None:
        """Stores the texts of pairs; those that are there stay."""
        with self._transaction() as execute:
            for pair in pairs:
                execute("INSERT OR IGNORE INTO pairs VALUES (?, ?)", (pair.key, to_json(pair)))

    def grant(self, lease: Lease) -> None:
        """Stores a lease."""
        with self._transaction() as execute:
            execute("INSERT INTO leases VALUES (?, ?, ?, ?, ?, ?, ?)", lease)

    def give(self, vote: Vote) -> None:
        """Stores a vote, and ends its lease."""
        with self._transaction() as execute:
            execute("DELETE FROM leases WHERE lease = ?", (vote.lease,))
            row = vote._replace(note=json.dumps(vote.note))
            execute(
                "INSERT INTO votes (lease, pair, person, tab, label, swapped, repeat, note, seconds, at, forecast) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                row,
            )

    def withdraw(self, vote: str, lease: Lease, *, released: str | None = None) -> None:
        """Withdraws the vote given under a lease, and stores the lease under which its pair is shown again."""
        with self._transaction() as execute:
            execute("UPDATE votes SET withdrawn = 1 WHERE lease = ?", (vote,))
            if released is not None:
                execute("DELETE FROM leases WHERE lease = ?", (released,))
            execute("INSERT INTO leases VALUES (?, ?, ?, ?, ?, ?, ?)", lease)

    def release(self, leases: Iterable[str]) -> None:
        """Ends leases that nobody fulfilled."""
        with self._transaction() as execute:
            for lease in leases:
                execute("DELETE FROM leases WHERE lease = ?", (lease,))

    def votes(self) -> list[Vote]:
        """Returns the votes that were not withdrawn, in the order in which they came."""
        columns = ", ".join(Vote._fields)
        with self._lock, self._readable_errors():
            rows = self._connection.execute(f"SELECT {columns} FROM votes WHERE withdrawn = 0 ORDER BY id").fetchall()
        votes = (Vote(*row) for row in rows)
        return [v._replace(swapped=bool(v.swapped), repeat=bool(v.repeat), note=json.loads(v.note)) for v in votes]

    def leases(self) -> list[Lease]:
        """Returns the leases that have not ended."""
        with self._lock, self._readable_errors():
            rows = self._connection.execute("SELECT * FROM leases ORDER BY granted").fetchall()
        return [Lease(*row)._replace(swapped=bool(row[4]), repeat=bool(row[5])) for row in rows]

    def fact(self, name: str, value: str) -> str:
        """Stores a fact on what the journal is for, unless there is one; returns the stored one."""
        with self._transaction() as execute:
            execute("INSERT OR IGNORE INTO facts VALUES (?, ?)", (name, value))
            return execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()[0]

    @contextlib.contextmanager
    def _transaction(self) -> Iterator:
        with self._lock, self._readable_errors():
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection.execute
                self._connection.execute("COMMIT")
            except BaseException:
                self._connection.execute("ROLLBACK")
                raise
