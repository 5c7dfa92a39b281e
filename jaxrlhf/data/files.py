"""Data files as editors, archives and other tools leave them, and the lines of those that are text.

A file's format is told by the ending of its name. Text may be gzipped (by its content, whatever its name), in UTF-8 or
UTF-16, with or without a byte order mark, with the line ends of any system. Hidden files and folders, and folders such as
`__MACOSX`, are left out of a folder, as by `load_dataset`.
"""

import collections
import contextlib
import gzip
import io
import json
import pathlib
import zlib
from collections.abc import Iterator
from typing import IO

from jaxrlhf.data.records import DataError

JSONL, CSV, PARQUET, PLAIN = (".jsonl", ".jsonl.gz"), (".csv", ".csv.gz"), (".parquet",), (".txt", ".txt.gz")
# By their first bytes.
OTHER_FORMATS = {
    b"PAR1": "a Parquet file; let its name end in .parquet, and do not gzip it",
    b"ARROW1": "an Arrow file; convert it to Parquet or JSON lines",
    b"PK\x03\x04": "a zip archive; unpack it",
    b"\x28\xb5\x2f\xfd": "compressed with zstd; decompress it, or use gzip",
    b"\xfd7zXZ": "compressed with xz; decompress it, or use gzip",
    b"BZh": "compressed with bzip2; decompress it, or use gzip",
    b"version https://git-lfs": "a pointer of Git LFS and not the data; fetch the file with git lfs pull",
}


def data_files(path: str | pathlib.Path) -> list[pathlib.Path]:
    """Returns the data files at a path, by name: the file itself, those below a folder, or those that a `*` matches.

    Raises:
        DataError: there are none, or of two formats, one lies outside the folder or leads nowhere, or one would be read
            twice.
    """
    path = pathlib.Path(path)
    if path.is_file():
        return [path]
    pattern, folder = ("*", path) if path.is_dir() else (path.name, path.parent)
    if folder != path and not ("*" in pattern and any(folder.glob(pattern))):
        raise DataError(f"There is no file or folder {path}.")
    root = _root(folder)
    named = folder.rglob(pattern) if folder == path else folder.glob(pattern)
    found = sorted(file for file in named if not _left_out(file.relative_to(folder)))
    linked = next((file for file in found if file.is_symlink() and file.is_dir()), None)
    if linked is not None:
        raise DataError(f"{linked} is a link to a folder, which is not followed; copy the folder.")
    found = [file for file in found if not file.is_dir()]
    by_format = {endings[0]: _named(found, endings) for endings in (JSONL, CSV, PARQUET)}
    given = [ending for ending, files in by_format.items() if files]
    if len(given) > 1:
        raise DataError(
            f"{path} holds files that end in {' and '.join(given)}, perhaps of the same data; give one file, "
            "or a folder with one format."
        )
    files = by_format[given[0]] if given else _named(found, PLAIN)
    for file in files:
        if not file.resolve().is_relative_to(root):
            raise DataError(f"{file} leads out of the folder {folder}; copy the file into it.")
        if not file.is_file():
            raise DataError(f"{file} leads to no file; copy the file into the folder.")
        column = next((part for part in file.relative_to(folder).parts[:-1] if "=" in part), None)
        if column is not None and ends_in(file, PARQUET):
            raise DataError(
                f"{file} lies in the folder of a column, {column}, which is not read; give a folder below it."
            )
    once = {file.resolve(): file for file in files if not file.is_symlink()}
    again = next((file for file in files if file.is_symlink() and file.resolve() in once), None)
    if again is not None:
        raise DataError(f"{again} is a link to {once[again.resolve()]}, which would be read twice; take the link away.")
    copies = collections.Counter(str(file).lower().removesuffix(".gz") for file in files)
    twice = next((file for file in files if copies[str(file).lower().removesuffix(".gz")] > 1), None)
    if twice is not None and any(str(file).lower().endswith(".gz") for file in files):
        raise DataError(f"{twice} is there both plain and gzipped, and would be read twice; take one away.")
    if not files:
        raise DataError(f"The folder {path} holds no .jsonl, .parquet, .csv or .txt file that is not hidden.")
    return files


def ends_in(file: pathlib.Path, endings: tuple[str, ...]) -> bool:
    """Returns whether a file is of the format with these endings, by its name."""
    return file.name.lower().endswith(endings)


def place(file: pathlib.Path, number: int) -> str:
    """Returns how messages name a record of a file: by its row where there are no lines."""
    return f"{'row' if ends_in(file, PARQUET) else 'line'} {number}"


def numbered_lines(file: pathlib.Path) -> Iterator[tuple[int, str]]:
    """Yields the non-blank lines without their ends, with their numbers, from 1.

    A byte that is not UTF-8 becomes a lone surrogate (`surrogateescape`), so that `check_encoding` names its line.

    Raises:
        DataError: the file is not readable text.
    """
    number = 0
    try:
        with contextlib.ExitStack() as stack:
            for line in _decoded_lines(file, stack):
                # Lines may end in "\r\n", or in "\r" alone.
                for piece in line.removesuffix("\n").removesuffix("\r").split("\r"):
                    number += 1
                    if piece.strip().strip("\ufeff"):
                        # Files that were joined keep the byte order mark of each.
                        yield number, piece.removeprefix("\ufeff")
    except (OSError, EOFError, UnicodeError, zlib.error) as error:
        raise DataError(f"{file}, after line {number}: not readable as text ({error}); copy the file again.") from None


def check_encoding(line: str) -> None:
    """Raises ValueError if a line of `numbered_lines` holds a byte that is not UTF-8."""
    try:
        line.encode()
    except UnicodeEncodeError as error:
        byte, column = ord(line[error.start]) - 0xDC00, error.start + 1
        raise ValueError(f"not UTF-8 (byte 0x{byte:02x} at column {column}); save the file as UTF-8.") from None


def text_of(file: pathlib.Path, stack: contextlib.ExitStack) -> io.TextIOWrapper:
    """Returns a file opened as text with its own line ends, gzipped or not; a byte that is not UTF-8 is a lone surrogate.

    Raises:
        DataError: it is of a format that is no text.
    """
    raw, encoding = _opened(file, stack)
    errors = "surrogateescape" if encoding.startswith("utf-8") else "strict"
    return stack.enter_context(io.TextIOWrapper(raw, encoding=encoding, errors=errors, newline=""))


def _decoded_lines(file: pathlib.Path, stack: contextlib.ExitStack) -> Iterator[str]:
    raw, encoding = _opened(file, stack)
    if encoding.startswith("utf-8"):
        yield from (line.decode("utf-8", "surrogateescape") for line in raw)
    else:
        yield from stack.enter_context(io.TextIOWrapper(raw, encoding=encoding, newline="\n"))


def _opened(file: pathlib.Path, stack: contextlib.ExitStack) -> tuple[IO[bytes], str]:
    """Returns the bytes of a file, decompressed, and their encoding."""
    raw: IO[bytes] = stack.enter_context(file.open("rb"))
    if raw.read(2) == b"\x1f\x8b":
        raw.seek(0)
        raw = stack.enter_context(gzip.GzipFile(fileobj=raw))  # pyright: ignore[reportAssignmentType]
    raw.seek(0)
    head = raw.read(32)
    raw.seek(0)
    for beginning, description in OTHER_FORMATS.items():
        if head.startswith(beginning):
            raise DataError(f"{file} is {description}.")
    return raw, json.detect_encoding(head)  # pyright: ignore[reportAttributeAccessIssue]


def _root(folder: pathlib.Path) -> pathlib.Path:
    """Returns where links may lead: into the folder, or from a snapshot in the hub's cache into the repository's files."""
    for parent in (folder.absolute(), *folder.absolute().parents):
        if parent.name == "snapshots" and (parent.parent / "blobs").is_dir():
            return parent.parent.resolve()
    return folder.resolve()


def _left_out(file: pathlib.Path) -> bool:
    return any(part.startswith(".") for part in file.parts) or any(part.startswith("__") for part in file.parts[:-1])


def _named(files: list[pathlib.Path], endings: tuple[str, ...]) -> list[pathlib.Path]:
    return [file for file in files if ends_in(file, endings)]
