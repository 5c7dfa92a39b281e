"""Data as the commands take it: a path, or the name of a published file."""

import contextlib
import io
import logging
import pathlib
from typing import Literal

import tensorflow_datasets as tfds

from jaxrlhf.data import hh_rlhf
from jaxrlhf.data.builders import HH_RLHF, Prepared, RecordSource, download, prepare
from jaxrlhf.data.records import DataError, files_of, lines_of, parse_record

Format = Literal["auto", "hh-rlhf", "records"]
PUBLISHED = "hh-rlhf:"


def open_records(data: str, *, form: Format, held_out: float, skip_bad: bool, data_dir: pathlib.Path) -> Prepared:
    """Returns the records of a file or folder, prepared once below `data_dir`.

    Args:
        data: a path, or `hh-rlhf:NAME` with a name in `builders.HH_RLHF`.
        form: "hh-rlhf" reads transcripts as published, "records" the formats of `data.records`; "auto" looks at the first
            line.
        held_out: share of the prompts for the split "test".
        skip_bad: skips lines that cannot be read, and lists them.
        data_dir: where prepared data lie.

    Raises:
        DataError: as `builders.prepare`.
    """
    if data.startswith(PUBLISHED):
        path = download(data.removeprefix(PUBLISHED), data_dir)
    else:
        path = pathlib.Path(data)
        if not path.exists():
            known = ", ".join(PUBLISHED + name for name in HH_RLHF)
            raise DataError(f"There is no file or folder {data}; give a path, or one of {known}.")
    if form == "auto":
        form = "hh-rlhf" if _holds_transcripts(path) else "records"
    parse = hh_rlhf.parse if form == "hh-rlhf" else parse_record
    # The builder speaks of downloads there are none of, and draws bars of its own.
    tfds.disable_progress_bar()
    logging.getLogger("absl").setLevel(logging.ERROR)
    with contextlib.redirect_stdout(io.StringIO()):
        return prepare(path, parse=parse, skip_bad=skip_bad, held_out=held_out, data_dir=data_dir)


def splits_of(prepared: Prepared) -> tuple[RecordSource, RecordSource]:
    """Returns the records to learn from and those held out.

    Raises:
        DataError: one of the two is empty.
    """
    for name, meaning in (("train", "to learn from"), ("test", "held out")):
        if name not in prepared.splits:
            raise DataError(f"No record is {meaning}; give more data, or another --held-out.")
    return prepared.splits["train"], prepared.splits["test"]


def told_of_bad(prepared: Prepared) -> list[str]:
    """Returns a sentence for each line that was skipped."""
    return [f"Skipped {line.path.name}, line {line.line}: {line.reason}" for line in prepared.bad]


def _holds_transcripts(path: pathlib.Path) -> bool:
    # Of the first line only; a file that changes its form later is named by its line.
    for _, line in lines_of(files_of(path)[0]):
        return '"chosen"' in line and "\\n\\nHuman:" in line
    return False
