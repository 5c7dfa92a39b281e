"""Rows of CSV files as JSON objects: the header names the keys, and the key says what a cell is.

| keys | a cell is |
|---|---|
| `prompt`, `chosen`, `rejected`, `completion`, `text` | a text, or a conversation as JSON: a list of messages |
| `label` | true or false, in letters of either case |
| `margin` | a number |
| `messages`, `completions`, `ranks`, `tools`, `documents`, `chat_template_kwargs` | JSON |

Other cells are JSON if they are a list or an object, else texts. An empty cell is null, as for `load_dataset`.
"""

import collections
import contextlib
import csv
import functools
import pathlib
import re
import zlib
from collections.abc import Callable, Iterator
from typing import Any

from jaxrlhf.data.files import check_encoding, text_of
from jaxrlhf.data.json_values import parse_line
from jaxrlhf.data.messages import shown
from jaxrlhf.data.records import DataError

TEXTS = ("prompt", "chosen", "rejected", "completion", "text")
JSON = ("messages", "completions", "ranks", "tools", "documents", "chat_template_kwargs")
LABELS = {"true": True, "false": False}
CONVERSATION = re.compile(r"""\s*\[\s*\{\s*["'](role|content)["']\s*:.*\]\s*""", re.DOTALL)
LONGEST = 2**31 - 1
MARK = "\ufeff"


def csv_rows(file: pathlib.Path) -> Iterator[tuple[int, Callable[[], dict[str, Any]]]]:
    """Yields the line that each row begins on, and a function that returns its object or raises ValueError with why not.

    Raises:
        DataError: the file is not readable as text, its header cannot be used, or a quote is never closed.
    """
    header, line = None, 0
    try:
        with contextlib.ExitStack() as stack:
            for line, cells in _cells(file, stack):
                if header is not None:
                    yield line, functools.partial(_object, header, cells)
                elif isinstance(cells, str):
                    raise DataError(f"{file}, line {line}: {cells}.")
                else:
                    header = _header(file, [cells[0].removeprefix(MARK), *cells[1:]])
    except (OSError, EOFError, UnicodeError, zlib.error) as error:
        raise DataError(f"{file}, after line {line}: not readable as text ({error}); copy the file again.") from None


def _cells(file: pathlib.Path, stack: contextlib.ExitStack) -> Iterator[tuple[int, list[str] | str]]:
    """Yields the line that each row begins on with its cells, or with what is wrong; empty rows are left out."""
    csv.field_size_limit(LONGEST)
    reader = csv.reader(text_of(file, stack), strict=True)
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if "end of data" in str(error):
                raise DataError(
                    f"{file}, line {line}: a quote that is opened in this row is never closed; close it."
                ) from None
            yield line, f"not CSV ({error}); write a quote within a quoted field twice"
        else:
            # A spreadsheet ends in rows of commas alone.
            if any(cells):
                yield line, cells


def _header(file: pathlib.Path, cells: list[str]) -> list[str]:
    """Returns the keys; a column without a name, such as the index that pandas writes, is called by its number."""
    try:
        check_encoding(",".join(cells))
    except ValueError as error:
        raise DataError(f"{file}, the header: {error}") from None
    for name, count in collections.Counter(cells).items():
        if name and count > 1:
            raise DataError(f"{file} has two columns {shown(name)}; rename one.")
        if name != name.strip():
            raise DataError(f"{file} has spaces around the name of the column {shown(name)}; take them out.")
    if len(cells) == 1 and re.search(r"[;\t|]", cells[0]):
        raise DataError(f"{file} has one column, {shown(cells[0])}; separate its fields with commas.")
    return [name or f"(column {number})" for number, name in enumerate(cells, 1)]


def _object(header: list[str], cells: list[str] | str) -> dict[str, Any]:
    if isinstance(cells, str):
        raise ValueError(f"{cells}.")
    if len(cells) != len(header):
        raise ValueError(f"the header has {len(header)} fields and this row {len(cells)}; quote fields with commas.")
    return {name: _value(name, cell) if cell else None for name, cell in zip(header, cells, strict=True)}


def _value(name: str, cell: str) -> Any:
    try:
        check_encoding(cell)
        if name == "label":
            return LABELS.get(cell.lower(), cell)
        if name in JSON or (name in TEXTS and CONVERSATION.fullmatch(cell)):
            return parse_line(cell)
    except ValueError as error:
        raise ValueError(f"{name} is {error}") from None
    with contextlib.suppress(ValueError):
        if name == "margin":
            return float(cell)
        if name not in TEXTS and cell[0] in "[{":
            return parse_line(cell)
    return cell
