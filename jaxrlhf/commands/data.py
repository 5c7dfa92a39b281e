"""Data sets named on the command line: a path, or the name of a published file."""

import contextlib
import functools
import io
import logging
import pathlib
from collections.abc import Callable
from typing import Any, Literal

from jaxrlhf.commands.hub import local_data
from jaxrlhf.data import formats, hh_rlhf
from jaxrlhf.data.builders import HH_RLHF, Prepared, RecordSource, download, prepare
from jaxrlhf.data.files import data_files
from jaxrlhf.data.reading import Records, read_records
from jaxrlhf.data.records import DataError, Parsed
from jaxrlhf.data.rows import numbered_rows
from jaxrlhf.data.tokenization import TokenizedRows, describe_counts, describe_rows

Format = Literal["auto", "hh-rlhf", "records"]
PUBLISHED = "hh-rlhf:"


def open_records(data: str, *, form: Format, held_out: float, skip_bad: bool, data_dir: pathlib.Path) -> Prepared:
    """Returns the records of a file or folder; they are prepared once, below `data_dir`.

    Args:
        data: a path, a name on a hub (`hub.local_data`), or `hh-rlhf:NAME` with a name in `builders.HH_RLHF`.
        form: "hh-rlhf" reads transcripts as published, "records" the formats of `data.formats`; "auto" decides by the
            keys and values of the first line that is JSON.
        held_out: fraction of the prompts in the split "test".
        skip_bad: skips and lists unreadable lines.
        data_dir: directory for prepared data.

    Raises:
        DataError: as in `builders.prepare`.
    """
    path, parse = _located(data, form, data_dir)
    import tensorflow_datasets as tfds

    # The builder reports downloads that do not happen, and draws progress bars of its own.
    tfds.disable_progress_bar()
    logging.getLogger("absl").setLevel(logging.ERROR)
    with contextlib.redirect_stdout(io.StringIO()):
        return prepare(path, parse=parse, skip_bad=skip_bad, held_out=held_out, data_dir=data_dir)


def read_all(data: str, *, form: Format, skip_bad: bool, data_dir: pathlib.Path) -> Records:
    """Returns the records of a file or folder in their order; the arguments are those of `open_records`.

    Raises:
        DataError: as in `reading.read_records`.
    """
    path, parse = _located(data, form, data_dir)
    return read_records(path, parse, skip_bad=skip_bad)


def splits_of(prepared: Prepared) -> tuple[RecordSource, RecordSource]:
    """Returns the training and the held-out records.

    Raises:
        DataError: one of the two is empty.
    """
    for name, meaning in (("train", "to learn from"), ("test", "held out")):
        if name not in prepared.splits:
            raise DataError(f"No record is {meaning}; give more data, or another --held-out.")
    return prepared.splits["train"], prepared.splits["test"]


def skipped_lines(prepared: Prepared | Records) -> list[str]:
    """Returns a sentence for each skipped line, and one for the keys that nothing reads."""
    unread = [f"Keys not read: {text}." for text in unread_rows(prepared).values()]
    return [*(f"Skipped {line.path.name}, {line.place}: {line.reason}" for line in prepared.bad), *unread]


def unread_rows(prepared: Prepared | Records) -> dict[str, str]:
    """Returns the row of a plan with the keys that nothing reads and their number of lines; empty if there are none."""
    counts = describe_counts(prepared.unread)
    return {"keys not read": counts} if counts else {}


def data_rows(training: TokenizedRows, held_out: TokenizedRows, prepared: Prepared) -> dict[str, str]:
    """Returns the rows of a plan that describe the data."""
    return {
        "training data": describe_rows(training),
        "held out": describe_rows(held_out),
        "bad lines": f"{len(prepared.bad)} skipped, listed in the report" if prepared.bad else "none",
        **unread_rows(prepared),
    }


def data_notes(training: TokenizedRows, held_out: TokenizedRows, prepared: Prepared) -> list[str]:
    """Returns the notes of a report that describe the data."""
    notes = [f"Training data: {describe_rows(training)}.", f"Held out: {describe_rows(held_out)}."]
    return [*skipped_lines(prepared), *notes]


def _located(data: str, form: Format, data_dir: pathlib.Path) -> tuple[pathlib.Path, Callable[[Any], Parsed]]:
    """Returns the path of the data and what reads a line's JSON value."""
    if data.startswith(PUBLISHED):
        path = download(data.removeprefix(PUBLISHED), data_dir)
    else:
        path = local_data(data)
        if not path.exists() and "*" not in path.name:
            known = ", ".join(PUBLISHED + name for name in HH_RLHF)
            raise DataError(
                f"There is no file or folder {data}; give a path, the name of a data set, or one of {known}."
            )
    if form == "auto":
        form = "hh-rlhf" if _holds_transcripts(path) else "records"
    return path, functools.partial(_read, form)


def _holds_transcripts(path: pathlib.Path) -> bool:
    # A file that changes its format later is reported with the line number.
    for file in data_files(path):
        for _, value in numbered_rows(file):
            with contextlib.suppress(ValueError):
                return hh_rlhf.is_published(value())
    return False


def _read(form: Format, value: Any) -> Parsed:
    """Returns the record of a JSON value; an error names the other format where that reads the value."""
    reads = {"hh-rlhf": hh_rlhf.read, "records": formats.read}
    try:
        return reads[form](value)
    except ValueError as error:
        (other,) = set(reads) - {form}
        try:
            reads[other](value)
        except ValueError:
            raise error from None
        raise ValueError(f"{str(error).removesuffix('.')}; --format {other} reads this line.") from None
