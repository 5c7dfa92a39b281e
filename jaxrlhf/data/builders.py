"""TensorFlow Datasets builders without TensorFlow: records prepared once as `array_record` files, with random access.

    prepared = prepare("pairs.jsonl", held_out=0.1, data_dir="prepared")
    prepared.splits["train"][17]                         # a `Preference`
    prepare(download("harmless-base/test", "prepared"), parse=hh_rlhf.parse, data_dir="prepared")

A prepared folder's name is a hash of its records, so that changed data, or another parser, are prepared again.
"""

import contextlib
import fcntl
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from jaxrlhf.data.reading import BadLine
from jaxrlhf.data.records import (
    DataError,
    Demonstration,
    Message,
    Parsed,
    Preference,
    Prompt,
    Ranking,
    Record,
    Text,
    UnpairedPreference,
)

KINDS = {kind.__name__: kind for kind in (Preference, Ranking, UnpairedPreference, Demonstration, Prompt)}
PLAIN = ""
"""The role of the single message that a plain string is stored as."""


class PublishedFile(NamedTuple):
    """A published file: its URL, its size in bytes and the SHA-256 of its content."""

    address: str
    size: int
    checksum: str


HH_RLHF = {
    "harmless-base/test": PublishedFile(
        "https://huggingface.co/datasets/Anthropic/hh-rlhf/resolve/main/harmless-base/test.jsonl.gz",
        742801,
        "ebfaaed21162a4de120ae85366075b34425e2a6303fac59b99555002f7016f03",
    )
}
"""The files of HH-RLHF (arXiv 2204.05862) with a known checksum; describe any other with a `PublishedFile`."""


class RecordSource:
    """Records on the disk by index, a data source for `grain`. Reading a damaged record raises DataError."""

    def __init__(self, examples: Any, kind: type, folder: str):
        self._examples, self._kind, self._folder = examples, kind, folder

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            # Ends iteration over a sequence.
            raise IndexError(f"There are {len(self)} records, not {index + 1}.")
        try:
            example = self._examples[index]
        except (OSError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:150]
            raise DataError(
                f"The data prepared in {self._folder} are damaged ({reason}); remove that folder."
            ) from None
        return _from_example(example, self._kind)


class Prepared(NamedTuple):
    """The splits by name, the lines that were skipped, and how many lines have each key that nothing reads."""

    splits: dict[str, RecordSource]
    bad: list[BadLine]
    unread: dict[str, int]


def prepare(
    path: str | pathlib.Path,
    *,
    parse: Callable[[Any], Record | Parsed] | None = None,
    skip_bad: bool = False,
    held_out: float = 0.0,
    data_dir: str | pathlib.Path,
) -> Prepared:
    """Prepares the records of a file or folder, unless they are prepared already.

    Args:
        path: as for `read_records`.
        parse: as for `read_records`.
        skip_bad: skips bad lines, which are kept in `Prepared.bad`.
        held_out: fraction of the prompts whose records form the split "test", chosen by a hash of the prompt: the records
            of one prompt stay together, and adding data moves no prompt to another split. At least one prompt is held
            out, where the fraction is not 0.
        data_dir: the folder of prepared data.

    Raises:
        DataError: as `read_records`; the file mixes kinds; or the fraction is out of range.
    """
    if not 0 <= held_out < 1:
        raise DataError(f"The held-out share must lie in [0, 1), got {held_out:g}; give another --held-out.")
    # A second, which only those who read data wait for.
    from jaxrlhf.data.record_builder import RecordBuilder

    with _exclusive(str(data_dir)):
        options: Any = {"parse": parse, "skip_bad": skip_bad, "held_out": held_out, "data_dir": data_dir}
        builder = RecordBuilder(path, **options)
        if not all(file.exists() for split in builder.info.splits.values() for file in split.filepaths):
            # A prepared file is missing.
            builder.data_path.rmtree()
            builder = RecordBuilder(path, **options)
        builder.download_and_prepare()
    metadata = builder.info.metadata
    assert metadata is not None
    kind = KINDS[metadata["kind"]]
    names = list(builder.info.splits)
    # Its decorators hide the signature.
    examples = [builder.as_data_source(split=name) for name in names]  # pyright: ignore[reportCallIssue]
    folder = str(builder.data_path)
    sources = {name: RecordSource(split, kind, folder) for name, split in zip(names, examples, strict=True)}
    bad = [BadLine(pathlib.Path(file), line, reason) for file, line, reason in metadata["bad"]]
    return Prepared(sources, bad, metadata["unread"])


@contextlib.contextmanager
def _exclusive(data_dir: str) -> Iterator[None]:
    """Lets one process at a time prepare data in a folder; the next finds it prepared. A bucket has no locks."""
    if "://" in data_dir:
        yield
        return
    pathlib.Path(data_dir).mkdir(parents=True, exist_ok=True)
    with (pathlib.Path(data_dir) / "preparing").open("a") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def download(published: str | PublishedFile, data_dir: str | pathlib.Path) -> pathlib.Path:
    """Returns the path of a published file, downloaded once and verified against its checksum.

    Args:
        published: a name in `HH_RLHF`, or an address with its checksum.
        data_dir: the folder of prepared data; the file goes into its subfolder `downloads`.

    Raises:
        DataError: the name is unknown, the address cannot be reached, or the checksum differs.
    """
    if isinstance(published, str):
        if published not in HH_RLHF:
            raise DataError(
                f"No checksum is known for {published!r} (only for {', '.join(HH_RLHF)}); fetch the file and give its "
                "path, or give a PublishedFile with its checksum."
            )
        published = HH_RLHF[published]
    name = published.address.rsplit("/", 1)[-1]
    target = pathlib.Path(data_dir) / "downloads" / f"{published.checksum[:16]}-{name}"
    if target.exists():
        return target
    # A second, which only those who download wait for.
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.download.checksums import UrlInfo
    from tensorflow_datasets.core.download.download_manager import NonMatchingChecksumError
    from tensorflow_datasets.core.download.util import DownloadError
    from tensorflow_datasets.core.utils import Size

    manager = tfds.download.DownloadManager(
        download_dir=str(target.parent),
        url_infos={published.address: UrlInfo(Size(published.size), published.checksum, name)},
        force_checksums_validation=True,
    )
    try:
        fetched = pathlib.Path(manager.download(published.address))
    except NonMatchingChecksumError:
        raise DataError(
            f"What {published.address} gave has another checksum than {published.checksum}; it was changed or cut short, "
            "download it again."
        ) from None
    except (DownloadError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            f"{published.address} cannot be fetched ({reason}); fetch it where there is a network and give its path."
        ) from None
    # Atomic: a file that exists is complete.
    partial = target.with_suffix(".part")
    shutil.copyfile(fetched, partial)
    os.replace(partial, target)
    return target


def _from_stored(stored: dict) -> Text:
    columns = (stored[name] for name in Message._fields)
    messages = tuple(Message(*map(_string, values)) for values in zip(*columns, strict=True))
    return messages[0].content if len(messages) == 1 and messages[0].role == PLAIN else messages


def _string(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _from_example(example: dict, kind: type) -> Record:
    prompt = _from_stored(example["prompt"])
    if kind is Ranking:
        stops = np.cumsum(example["lengths"])
        stored, starts = example["completions"], stops - example["lengths"]
        texts = tuple(
            _from_stored({name: values[start:stop] for name, values in stored.items()})
            for start, stop in zip(starts, stops, strict=True)
        )
        return Ranking(prompt, texts, tuple(int(rank) for rank in example["ranks"]))
    if kind is Preference:
        margin = _string(example["margin"])
        chosen, rejected = _from_stored(example["chosen"]), _from_stored(example["rejected"])
        return Preference(prompt, chosen, rejected, float(margin) if margin else None)
    if kind is Prompt:
        return Prompt(prompt)
    completion = _from_stored(example["completion"])
    if kind is UnpairedPreference:
        return UnpairedPreference(prompt, completion, bool(example["label"]))
    return Demonstration(prompt, completion)
