"""The TensorFlow Datasets builder behind `builders.prepare`, which imports this module when it is first called."""

import collections
import hashlib
import json
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from jaxrlhf.data.builders import PLAIN
from jaxrlhf.data.reading import read_records
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
            raise DataError(f"No line of {self._path} can be read; the first bad one is {bad[0].place}: {reason}.")
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
