"""TensorFlow Datasets builders without TensorFlow: records prepared once as `array_record` files, with random access.

    prepared = prepare("pairs.jsonl", held_out=0.1, data_dir="prepared")
    prepared.splits["train"][17]                         # a `Preference`
    prepare(download("harmless-base/test", "prepared"), parse=hh_rlhf.parse, data_dir="prepared")

A prepared folder's name is a hash of its records, so that changed data, or another parser, are prepared again.
"""

import collections
import contextlib
import fcntl
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core.download.checksums import UrlInfo
from tensorflow_datasets.core.download.download_manager import NonMatchingChecksumError
from tensorflow_datasets.core.download.util import DownloadError
from tensorflow_datasets.core.utils import Size

from jaxrlhf.data.reading import BadLine, read_records
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


class RecordBuilder(tfds.core.GeneratorBasedBuilder):
    """The builder behind `prepare`, for direct use with TensorFlow Datasets."""

    VERSION = tfds.core.Version("1.0.0")
    name = "jaxrlhf_records"

    def __init__(
        self,
        path: str | pathlib.Path,
        *,
        parse: Callable[[Any], Record | Parsed] | None = None,
        skip_bad: bool = False,
        held_out: float = 0.0,
        data_dir: str | pathlib.Path,
    ):
        self._path, self._held_out = pathlib.Path(path), held_out
        self._read = read_records(path, parse, skip_bad=skip_bad)
        config = tfds.core.BuilderConfig(name=self._fingerprint(), description=f"Records of {self._path}.")
        super().__init__(file_format="array_record", data_dir=str(data_dir), config=config)

    def _fingerprint(self) -> str:
        # A hash of the records, not of the files: another parser makes another folder.
        digest = hashlib.sha256(repr((self._held_out, self._read.bad, self._read.unread)).encode())
        for record in self._read.records:
            digest.update(repr(record).encode())
        return digest.hexdigest()[:16]

    def _info(self) -> tfds.core.DatasetInfo:
        records, bad, unread = self._read
        kinds = collections.Counter(type(record).__name__ for record in records)
        if not kinds:
            reason = " ".join(bad[0].reason.split()).removesuffix(".")
            raise DataError(f"No line of {self._path} can be read; the first bad one is line {bad[0].line}: {reason}.")
        if len(kinds) > 1:
            names = ", ".join(f"{count:,} {name}" for name, count in sorted(kinds.items()))
            raise DataError(f"{self._path} mixes kinds of records ({names}); give each kind a file of its own.")
        kind = type(records[0])
        return tfds.core.DatasetInfo(
            builder=self,
            description=f"{len(records)} records.",
            features=tfds.features.FeaturesDict(_features(kind)),
            metadata=tfds.core.MetadataDict(
                kind=kind.__name__, bad=[[str(line.path), line.line, line.reason] for line in bad], unread=unread
            ),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager):
        del dl_manager
        splits: dict[str, list] = {"train": [], "test": []}
        hashes = [_prompt_hash(record) for record in self._read.records]
        # Of few records none may lie below the share: then those of one prompt are held out.
        fewest = min(hashes) if self._held_out and len(set(hashes)) > 1 else 0.0
        for index, (record, place) in enumerate(zip(self._read.records, hashes, strict=True)):
            split = "test" if place < self._held_out or place == fewest else "train"
            splits[split].append((index, record))
        return {name: self._generate_examples(split) for name, split in splits.items() if split}

    def _generate_examples(self, indexed_records):
        for index, record in indexed_records:
            yield index, _to_example(record)


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


def _features(kind: type) -> dict:
    text = tfds.features.Sequence({name: tfds.features.Text() for name in Message._fields})
    return {
        # The margin as text, empty if there is none: numbers are stored in single precision.
        Preference: {"prompt": text, "chosen": text, "rejected": text, "margin": tfds.features.Text()},
        # The messages of all completions, and how many each completion has.
        Ranking: {
            "prompt": text,
            "completions": text,
            "lengths": tfds.features.Sequence(np.int64),
            "ranks": tfds.features.Sequence(np.int64),
        },
        UnpairedPreference: {"prompt": text, "completion": text, "label": np.bool_},
        Demonstration: {"prompt": text, "completion": text},
        Prompt: {"prompt": text},
    }[kind]


def _stored(text: Text) -> list[dict]:
    messages = (Message(PLAIN, text),) if isinstance(text, str) else text
    return [message._asdict() for message in messages]


def _from_stored(stored: dict) -> Text:
    columns = (stored[name] for name in Message._fields)
    messages = tuple(Message(*map(_string, values)) for values in zip(*columns, strict=True))
    return messages[0].content if len(messages) == 1 and messages[0].role == PLAIN else messages


def _string(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _to_example(record: Record) -> dict:
    if isinstance(record, Ranking):
        completions = [_stored(text) for text in record.completions]
        return {
            "prompt": _stored(record.prompt),
            "completions": [message for completion in completions for message in completion],
            "lengths": [len(completion) for completion in completions],
            "ranks": list(record.ranks),
        }
    texts = {name: _stored(value) for name, value in record._asdict().items() if name not in ("margin", "label")}
    if isinstance(record, Preference):
        return texts | {"margin": "" if record.margin is None else repr(record.margin)}
    return texts | ({"label": record.label} if isinstance(record, UnpairedPreference) else {})


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


def _prompt_hash(record: Record) -> float:
    """Returns a hash of the prompt in [0, 1); of the text or the record if the prompt is empty."""
    if record.prompt or isinstance(record, Demonstration):
        # By role and content alone: the records of one prompt stay together whatever is beside it.
        messages = _stored(record.prompt or getattr(record, "completion", ""))
        hashed = json.dumps([{"role": message["role"], "content": message["content"]} for message in messages])
    else:
        hashed = repr(record)
    digest = hashlib.sha256(hashed.encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
