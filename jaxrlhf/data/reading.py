"""Reading records from files of JSON lines, Parquet, CSV or plain text."""

import collections
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

from jaxrlhf.data import formats
from jaxrlhf.data.files import data_files, place
from jaxrlhf.data.records import DataError, Parsed
from jaxrlhf.data.rows import numbered_rows


class BadLine(NamedTuple):
    """A line, or a row of a Parquet file, that could not be read: its file, its number, and why."""

    path: pathlib.Path
    line: int
    reason: str

    @property
    def place(self) -> str:
        """The line or row, as messages name it."""
        return place(self.path, self.line)


class Records(NamedTuple):
    """Records in the order of files and lines, the skipped lines, and how many lines have each key that nothing reads."""

    records: list
    bad: list[BadLine]
    unread: dict[str, int]


def read_records(
    path: str | pathlib.Path, parse: Callable[[Any], Any] | None = None, *, skip_bad: bool = False
) -> Records:
    """Reads a file by its name's ending (`.jsonl`, `.csv`, `.txt`, gzipped or not, or `.parquet`), or a folder's by name.

    Args:
        path: the file or folder. In a folder, `.txt` files are read only if there are no others; hidden files are left
            out; two formats, and links that lead out of the folder, are refused.
        parse: maps a line's JSON value, or a row's, to a record, or to a `Parsed` with the keys that it does not read, and
            raises ValueError with a reason; `formats.read` by default.
        skip_bad: collects bad lines instead of stopping at the first.

    Raises:
        DataError: there is no data, a file is not readable, or a line is bad.
    """
    parse = formats.read if parse is None else parse
    records, bad, unread = [], [], collections.Counter()
    for file in data_files(path):
        for number, value in numbered_rows(file):
            try:
                found = parse(value())
            except ValueError as error:
                bad.append(BadLine(file, number, str(error)))
                if not skip_bad:
                    where = place(file, number)
                    unit = where.split()[0]
                    raise DataError(
                        f"{file}, {where}: {error} Mend the {unit}, or skip such {unit}s with --skip-bad."
                    ) from None
            else:
                parsed = found if isinstance(found, Parsed) else Parsed(found)
                records.append(parsed.record)
                unread.update(parsed.unread)
    if not records and not bad:
        raise DataError(f"{path} holds no line of data.")
    return Records(records, bad, dict(unread))
