"""Rows of Parquet files as the JSON objects that the same data would be as lines.

Arrow gives each struct of a column the same fields: a field that is null is taken as absent, as TRL does.
"""

import collections
import decimal
import functools
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow
import pyarrow.parquet

from jaxrlhf.data.records import DataError

BATCH = 1024


def parquet_rows(file: pathlib.Path) -> Iterator[tuple[int, Callable[[], dict[str, Any]]]]:
    """Yields the number of each row, from 1, and a function that returns its object or raises ValueError.

    Raises:
        DataError: the file is not readable as Parquet, or has two columns of one name.
    """
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            _check_names(file, table.schema_arrow.names)
            for batch in table.iter_batches(BATCH, use_threads=False):
                for index in range(batch.num_rows):
                    number += 1
                    yield number, functools.partial(_row, batch, index)
    # Which of them pyarrow raises depends on the damage.
    except (OSError, pyarrow.ArrowException, ValueError) as error:
        reason = " ".join(str(error).split())[:150].rstrip(". ")
        raise DataError(
            f"{file}, after row {number}: not readable as Parquet ({reason}); copy the file again."
        ) from None


def _check_names(file: pathlib.Path, names: list[str]) -> None:
    twice = next((name for name, count in collections.Counter(names).items() if count > 1), None)
    if twice is not None:
        raise DataError(f"{file} has two columns {twice}; rename one.")


def _row(batch: pyarrow.RecordBatch, index: int) -> dict[str, Any]:
    row = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            row[name] = _plain(column[index].as_py(maps_as_pydicts="strict"))
        except UnicodeDecodeError:
            raise ValueError(f"{name} is not UTF-8.") from None
        except KeyError:
            raise ValueError(f"{name} holds a map with a key that stands twice.") from None
    return row


def _plain(value: Any) -> Any:
    """Returns a value as JSON would have it, where it has a form; structs without their null fields."""
    if isinstance(value, dict):
        return {name: _plain(entry) for name, entry in value.items() if entry is not None}
    if isinstance(value, list):
        return [_plain(entry) for entry in value]
    return float(value) if isinstance(value, decimal.Decimal) else value
