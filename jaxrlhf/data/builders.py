"""TensorFlow Datasets builders without TensorFlow: records prepared once into `array_record` files, read at random.

    prepared = prepare("pairs.jsonl", held_out=0.1, data_dir="prepared")
    prepared.splits["train"][17]                         # a `Preference`
    prepare(download("harmless-base/test", "prepared"), parse=hh_rlhf.parse, data_dir="prepared")

A prepared folder is named by the records in it, so that changed data, or data read otherwise, are prepared anew.
"""

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

from jaxrlhf.data.records import (
    BadLine,
    DataError,
    Demonstration,
    Judged,
    Message,
    Preference,
    Prompt,
    Ranked,
    Record,
    Text,
    read_records,
)

KINDS = {kind.__name__: kind for kind in (Preference, Ranked, Judged, Demonstration, Prompt)}
PLAIN = ""
"""The role of the one message that a plain string is stored as."""


class Published(NamedTuple):
    """A file at its published address, its size in bytes and the SHA-256 of its content."""

    address: str
    size: int
    checksum: str


HH_RLHF = {
    "harmless-base/test": Published(
        "https://huggingface.co/datasets/Anthropic/hh-rlhf/resolve/main/harmless-base/test.jsonl.gz",
        742801,
        "ebfaaed21162a4de120ae85366075b34425e2a6303fac59b99555002f7016f03",
    )
}
"""The files of HH-RLHF (arXiv 2204.05862) whose checksums are known here; `Published` takes any other."""


class RecordSource:
    """Records by number, from the disk; what `grain` reads. One that cannot be read raises a DataError."""

    def __init__(self, examples: Any, kind: type, place: str):
        self._examples, self._kind, self._place = examples, kind, place

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            # What ends a loop over a sequence.
            raise IndexError(f"There are {len(self)} records, not {index + 1}.")
        try:
            example = self._examples[index]
        except (OSError, ValueError, RuntimeError) as error:
            told = " ".join(str(error).split())[:150]
            raise DataError(f"The data prepared in {self._place} are damaged ({told}); remove that folder.") from None
        return _decoded(example, self._kind)


class Prepared(NamedTuple):
    """Splits by name, and the lines that were skipped."""

    splits: dict[str, RecordSource]
    bad: list[BadLine]


class RecordBuilder(tfds.core.GeneratorBasedBuilder):
    """The builder behind `prepare`, for those who use TensorFlow Datasets themselves."""

    VERSION = tfds.core.Version("1.0.0")
    name = "jaxrlhf_records"

    def __init__(
        self,
        path: str | pathlib.Path,
        *,
        parse: Callable[[Any], Record] | None = None,
        skip_bad: bool = False,
        held_out: float = 0.0,
        data_dir: str | pathlib.Path,
    ):
        self._path, self._held_out = pathlib.Path(path), held_out
        self._read = read_records(path, parse, skip_bad=skip_bad)
        config = tfds.core.BuilderConfig(name=self._fingerprint(), description=f"Records of {self._path}.")
        super().__init__(file_format="array_record", data_dir=str(data_dir), config=config)

    def _fingerprint(self) -> str:
        # Of what was read and not of the files: another parser is another folder, whatever its name.
        digest = hashlib.sha256(repr((self._held_out, self._read.bad)).encode())
        for record in self._read.records:
            digest.update(repr(record).encode())
        return digest.hexdigest()[:16]

    def _info(self) -> tfds.core.DatasetInfo:
        found = self._read
        kinds = {type(record) for record in found.records}
        if len(kinds) != 1:
            names = ", ".join(sorted(kind.__name__ for kind in kinds)) or "none that could be read"
            raise DataError(f"{self._path} mixes kinds of records ({names}); give each kind a file of its own.")
        kind = kinds.pop()
        bad = [[str(line.path), line.line, line.reason] for line in found.bad]
        return tfds.core.DatasetInfo(
            builder=self,
            description=f"{len(found.records)} records.",
            features=tfds.features.FeaturesDict(_features(kind)),
            metadata=tfds.core.MetadataDict(kind=kind.__name__, bad=bad),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager):
        del dl_manager
        parts: dict[str, list] = {"train": [], "test": []}
        for number, record in enumerate(self._read.records):
            parts["test" if _place(record) < self._held_out else "train"].append((number, record))
        return {name: self._generate_examples(part) for name, part in parts.items() if part}

    def _generate_examples(self, numbered):
        for number, record in numbered:
            yield number, _encoded(record)


def prepare(
    path: str | pathlib.Path,
    *,
    parse: Callable[[Any], Record] | None = None,
    skip_bad: bool = False,
    held_out: float = 0.0,
    data_dir: str | pathlib.Path,
) -> Prepared:
    """Prepares the records of a file or folder, or finds them prepared.

    Args:
        path: as for `read_records`.
        parse: as for `read_records`.
        skip_bad: skips bad lines, which are kept in `Prepared.bad`.
        held_out: share of the prompts whose records make the split "test", by a hash of the prompt: records of one prompt
            stay together, and adding data moves no prompt.
        data_dir: where prepared data lie.

    Raises:
        DataError: as `read_records`; the file mixes kinds; or the share is out of range.
    """
    if not 0 <= held_out < 1:
        raise DataError(f"The held-out share must lie in [0, 1), got {held_out:g}.")
    with _alone(str(data_dir)):
        given: Any = {"parse": parse, "skip_bad": skip_bad, "held_out": held_out, "data_dir": data_dir}
        builder = RecordBuilder(path, **given)
        if not all(file.exists() for split in builder.info.splits.values() for file in split.filepaths):
            # A part of what was prepared is gone.
            builder.data_path.rmtree()
            builder = RecordBuilder(path, **given)
        builder.download_and_prepare()
    metadata = builder.info.metadata
    assert metadata is not None
    kind = KINDS[metadata["kind"]]
    names = list(builder.info.splits)
    # Its decorators hide the signature.
    examples = [builder.as_data_source(split=name) for name in names]  # pyright: ignore[reportCallIssue]
    place = str(builder.data_path)
    sources = {name: RecordSource(each, kind, place) for name, each in zip(names, examples, strict=True)}
    return Prepared(sources, [BadLine(pathlib.Path(file), line, reason) for file, line, reason in metadata["bad"]])


@contextlib.contextmanager
def _alone(data_dir: str) -> Iterator[None]:
    """Lets one process at a time prepare data there; the next one finds them. In a bucket there are no locks."""
    if "://" in data_dir:
        yield
        return
    pathlib.Path(data_dir).mkdir(parents=True, exist_ok=True)
    with (pathlib.Path(data_dir) / "preparing").open("a") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def download(published: str | Published, data_dir: str | pathlib.Path) -> pathlib.Path:
    """Returns the path of a published file, fetched once and checked against its checksum.

    Args:
        published: a name in `HH_RLHF`, or an address with its checksum.
        data_dir: where prepared data lie; the file goes into `downloads` there.

    Raises:
        DataError: the name is unknown, the address cannot be reached, or what came has another checksum.
    """
    if isinstance(published, str):
        if published not in HH_RLHF:
            raise DataError(
                f"No checksum is known for {published!r} ({', '.join(HH_RLHF)} is); fetch the file and give its path, or "
                "give a Published with its checksum."
            )
        published = HH_RLHF[published]
    name = published.address.rsplit("/", 1)[-1]
    kept = pathlib.Path(data_dir) / "downloads" / f"{published.checksum[:16]}-{name}"
    if kept.exists():
        return kept
    manager = tfds.download.DownloadManager(
        download_dir=str(kept.parent),
        url_infos={published.address: UrlInfo(Size(published.size), published.checksum, name)},
        force_checksums_validation=True,
    )
    try:
        fetched = pathlib.Path(manager.download(published.address))
    except NonMatchingChecksumError:
        raise DataError(
            f"What {published.address} gave has another checksum than {published.checksum}; it was changed or cut short, "
            "fetch it again."
        ) from None
    except (DownloadError, OSError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            f"{published.address} cannot be fetched ({first}); fetch it where there is a network and give its path."
        ) from None
    # In one piece: a file that is there is a whole one.
    part = kept.with_suffix(".part")
    shutil.copyfile(fetched, part)
    os.replace(part, kept)
    return kept


def _features(kind: type) -> dict:
    text = tfds.features.Sequence({"role": tfds.features.Text(), "content": tfds.features.Text()})
    return {
        # The margin as its digits, empty where there is none: numbers are stored in single precision.
        Preference: {"prompt": text, "chosen": text, "rejected": text, "margin": tfds.features.Text()},
        # How many messages each completion has, and the messages of all.
        Ranked: {
            "prompt": text,
            "completions": text,
            "lengths": tfds.features.Sequence(np.int64),
            "ranks": tfds.features.Sequence(np.int64),
        },
        Judged: {"prompt": text, "completion": text, "good": np.bool_},
        Demonstration: {"prompt": text, "completion": text},
        Prompt: {"prompt": text},
    }[kind]


def _stored(text: Text) -> list[dict]:
    messages = (Message(PLAIN, text),) if isinstance(text, str) else text
    return [{"role": message.role, "content": message.content} for message in messages]


def _told(stored: dict) -> Text:
    said = tuple(
        Message(_string(role), _string(content))
        for role, content in zip(stored["role"], stored["content"], strict=True)
    )
    return said[0].content if len(said) == 1 and said[0].role == PLAIN else said


def _string(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _encoded(record: Record) -> dict:
    if isinstance(record, Ranked):
        each = [_stored(text) for text in record.completions]
        return {
            "prompt": _stored(record.prompt),
            "completions": [message for text in each for message in text],
            "lengths": [len(text) for text in each],
            "ranks": list(record.ranks),
        }
    texts = {name: _stored(value) for name, value in record._asdict().items() if name not in ("margin", "good")}
    if isinstance(record, Preference):
        return texts | {"margin": "" if record.margin is None else repr(record.margin)}
    return texts | ({"good": record.good} if isinstance(record, Judged) else {})


def _decoded(example: dict, kind: type) -> Record:
    prompt = _told(example["prompt"])
    if kind is Ranked:
        stops = np.cumsum(example["lengths"])
        stored, starts = example["completions"], stops - example["lengths"]
        texts = tuple(
            _told({name: values[first:last] for name, values in stored.items()})
            for first, last in zip(starts, stops, strict=True)
        )
        return Ranked(prompt, texts, tuple(int(rank) for rank in example["ranks"]))
    if kind is Preference:
        margin = _string(example["margin"])
        chosen, rejected = _told(example["chosen"]), _told(example["rejected"])
        return Preference(prompt, chosen, rejected, float(margin) if margin else None)
    if kind is Prompt:
        return Prompt(prompt)
    completion = _told(example["completion"])
    return Judged(prompt, completion, bool(example["good"])) if kind is Judged else Demonstration(prompt, completion)


def _place(record: Record) -> float:
    """Returns a number in [0, 1) that the prompt determines, or the text where there is none."""
    if record.prompt or isinstance(record, Demonstration):
        named = json.dumps(_stored(record.prompt or getattr(record, "completion", "")))
    else:
        named = repr(record)
    digest = hashlib.sha256(named.encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
