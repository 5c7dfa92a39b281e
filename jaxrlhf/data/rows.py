"""The records of a data file before they are parsed, whatever its format: numbers and JSON values."""

import functools
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

from jaxrlhf.data.csv_rows import csv_rows
from jaxrlhf.data.files import CSV, PARQUET, PLAIN, check_encoding, ends_in, numbered_lines
from jaxrlhf.data.json_values import parse_line


def numbered_rows(file: pathlib.Path) -> Iterator[tuple[int, Callable[[], Any]]]:
    """Yields the number of each line or row, from 1, and what returns its value, or raises ValueError with why not.

    Raises:
        DataError: the file is not readable.
    """
    if ends_in(file, PARQUET):
        # It takes a while to import.
        from jaxrlhf.data.parquet_rows import parquet_rows

        yield from parquet_rows(file)
    elif ends_in(file, CSV):
        yield from csv_rows(file)
    else:
        read = _text if ends_in(file, PLAIN) else _json
        for number, line in numbered_lines(file):
            yield number, functools.partial(read, line)


def _text(line: str) -> dict[str, str]:
    check_encoding(line)
    return {"text": line}


def _json(line: str) -> Any:
    check_encoding(line)
    return parse_line(line)
