"""Reading records from files of JSON lines or plain text."""

import collections
import json
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

from jaxrlhf.data import formats
from jaxrlhf.data.files import check_encoding, data_files, is_plain_text, numbered_lines
from jaxrlhf.data.records import DataError, Parsed


class BadLine(NamedTuple):
    """A line that could not be read: its file, its number, and why."""

    path: pathlib.Path
    line: int
    reason: str


class Records(NamedTuple):
    """Records in the order of files and lines, the skipped lines, and how many lines have each key that nothing reads."""

    records: list
    bad: list[BadLine]
    unread: dict[str, int]


def read_records(
    path: str | pathlib.Path, parse: Callable[[Any], Any] | None = None, *, skip_bad: bool = False
) -> Records:
    """Reads a `.jsonl` or `.txt` file, gzipped or not, or all such files below a folder, sorted by name.

    Args:
        path: the file or folder. In a folder, `.txt` files are read only if there is no `.jsonl` file; hidden files are
            left out; links that lead out of the folder are refused.
        parse: maps a line's JSON value to a record, or to a `Parsed` with the keys that it does not read, and raises
            ValueError with a reason; `formats.read` by default.
        skip_bad: collects bad lines instead of stopping at the first.

    Raises:
        DataError: there is no data, a file is not readable, or a line is bad.
    """
    parse = formats.read if parse is None else parse
    records, bad, unread = [], [], collections.Counter()
    for file in data_files(path):
        for number, line in numbered_lines(file):
            try:
                check_encoding(line)
                found = parse({"text": line} if is_plain_text(file) else parse_line(line))
            except ValueError as error:
                bad.append(BadLine(file, number, str(error)))
                if not skip_bad:
                    raise DataError(
                        f"{file}, line {number}: {error} Mend the line, or skip such lines with --skip-bad."
                    ) from None
            else:
                parsed = found if isinstance(found, Parsed) else Parsed(found)
                records.append(parsed.record)
                unread.update(parsed.unread)
    if not records and not bad:
        raise DataError(f"{path} holds no line of data.")
    return Records(records, bad, dict(unread))


def parse_line(line: str) -> Any:
    """Returns the JSON value of a line.

    Raises:
        ValueError: it is not JSON, an object names a key twice, or a text cannot be encoded.
    """
    if line.strip() in ("[", "{"):
        raise ValueError("not JSON on one line; write each record on a line of its own, not one value over many lines.")
    try:
        value = json.loads(line, object_pairs_hook=_object, parse_int=_integer)
        # JSON can escape half of a surrogate pair, which UTF-8 cannot encode.
        json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg.removesuffix(' at')} at column {error.colno}).") from None
    except UnicodeEncodeError:
        raise ValueError("a text holds half of a surrogate pair.") from None
    except RecursionError:
        raise ValueError("nested too deeply.") from None
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        name = next(name for name, count in collections.Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {name} stands twice in one object.")
    return value


def _integer(digits: str) -> int:
    # Python refuses to convert numbers of thousands of digits; a float holds 309.
    if len(digits) > 1000:
        raise ValueError(f"a number has {len(digits):,} digits.")
    return int(digits)
