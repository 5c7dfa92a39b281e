"""Records as sources of rows: those of the right kinds, and the completions of one prompt to compare."""

import itertools
from collections.abc import Iterator
from typing import NamedTuple, Protocol

from jaxrlhf.data.records import (
    DataError,
    Demonstration,
    Preference,
    Prompt,
    Ranking,
    Record,
    Text,
    UnpairedPreference,
)

KEYS = {
    Preference: "chosen and rejected",
    Ranking: "prompt and completions",
    UnpairedPreference: "prompt, completion and label",
    Demonstration: "prompt and completion (messages, text)",
    Prompt: "prompt",
}
"""The keys of a record's JSON object."""


class Source(Protocol):
    """Records by index: a list, or a split of `builders.Prepared`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Record: ...


class Dropped(NamedTuple):
    """The index of a record, and why it makes no row; for a pair, the index of its first text's record."""

    index: int
    reason: str


class Comparisons(NamedTuple):
    """Completions of one prompt with their records' indices, and the pairs of them: two positions, label and margin."""

    prompt: Text
    completions: list[tuple[int, Text]]
    pairs: list[tuple[int, int, float, float]]


def comparisons(records: Source, dropped: list[Dropped]) -> Iterator[Comparisons]:
    """Yields the completions to compare; unpaired preferences without a counterpart are appended to `dropped`.

    Raises:
        DataError: as `checked`.
    """
    by_prompt: dict[Text, list[tuple[int, UnpairedPreference]]] = {}
    for index, record in checked(records, (Preference, Ranking, UnpairedPreference), "pairs"):
        if isinstance(record, Preference):
            completions = [(index, record.chosen), (index, record.rejected)]
            yield Comparisons(record.prompt, completions, [(0, 1, 1.0, record.margin or 0.0)])
        elif isinstance(record, Ranking):
            ranked = sorted(zip(record.ranks, record.completions, strict=True), key=lambda entry: entry[0])
            positions = itertools.combinations(range(len(ranked)), 2)
            pairs = [(i, j, 1.0 if ranked[i][0] < ranked[j][0] else 0.5, 0.0) for i, j in positions]
            yield Comparisons(record.prompt, [(index, completion) for _, completion in ranked], pairs)
        elif isinstance(record, UnpairedPreference):
            by_prompt.setdefault(record.prompt, []).append((index, record))
    for prompt, group in by_prompt.items():
        desirable, undesirable = (
            [position for position, (_, record) in enumerate(group) if record.label is label] for label in (True, False)
        )
        if not desirable or not undesirable:
            reason = f"no {'undesirable' if desirable else 'desirable'} completion of the same prompt"
            dropped.extend(Dropped(index, reason) for index, _ in group)
            continue
        pairs = [(i, j, 1.0, 0.0) for i in desirable for j in undesirable]
        yield Comparisons(prompt, [(index, record.completion) for index, record in group], pairs)


def checked(records: Source, kinds: tuple[type, ...], rows: str) -> Iterator[tuple[int, Record]]:
    """Yields the records with their indices; raises DataError at one of another kind."""
    for index in range(len(records)):
        record = records[index]
        if not isinstance(record, kinds):
            names, keys = (
                " or ".join(words) for words in ((kind.__name__ for kind in kinds), (KEYS[kind] for kind in kinds))
            )
            raise DataError(
                f"Record {index} is of the kind {type(record).__name__}; {rows} are made of {names}, with the keys {keys}."
            )
        yield index, record
