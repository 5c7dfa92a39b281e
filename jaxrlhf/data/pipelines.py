"""Batches of token rows as `grain` datasets: endless and shuffled for training, in one pass for evaluation.

    batches = iter(pair_batches(rows, batch_size=64, seed=0, shard=(jax.process_index(), jax.process_count())))
    batch = next(batches)                       # Pairs
    save_state(batches, "run/data.json")        # and in another process, on an iterator made alike
    restore_state(batches, "run/data.json")     # the next batch is the one after

`batch_size` is that of all shards together. Every shard draws in the same order and takes its own slice of a batch: one
behind the other, the slices are the batch of a single process, and a state of one number of shards serves another.
"""

import hashlib
import json
import os
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import grain
import numpy as np

from jaxrlhf.data.batches import (
    Demonstrations,
    Pairs,
    PromptRows,
    learned_of,
    padded_demonstrations,
    padded_pairs,
    padded_prompts,
)
from jaxrlhf.data.encode import Encoded
from jaxrlhf.data.fitted import PairRow, row_length
from jaxrlhf.data.records import DataError

# Rows that are packed at once, or a batch where it is larger: more leave less padding, but mix more of two epochs.
BINS = 64


Row = TypeVar("Row", Encoded, PairRow, np.ndarray)
Batch = TypeVar("Batch", Demonstrations, Pairs, PromptRows)


class Numbered(NamedTuple, Generic[Batch]):
    """A batch, and the numbers `[N]` of its rows in the data, -1 on a row that only fills the batch."""

    numbers: np.ndarray
    batch: Batch


def packed_demonstrations(
    rows: Sequence[Encoded], *, batch_size: int, length: int, seed: int, shard: tuple[int, int] = (0, 1)
) -> grain.IterDataset[Demonstrations]:
    """Returns endless batches of rows of `length` tokens, each of several texts, by first fit.

    Texts are drawn in a new order every epoch. Where one fits no more into any of the rows that are filled at once, these
    are given out; the end of an epoch and the beginning of the next may share a row.

    Args:
        rows: of at most `length` tokens.
        batch_size: rows of a batch, of all shards together.
        length: of a row, in tokens.
        seed: of the order.
        shard: the number of this one, from 0, and how many there are.

    Raises:
        ValueError: there are no rows, one is empty or longer than `length`, or the shards do not divide the batch.
    """
    longest, share = int(_lengths(rows).max()), _share(batch_size, shard)
    if longest > length:
        raise ValueError(f"A text has {longest} tokens and a row {length}; fit the texts with max_length={length}.")
    order = grain.MapDataset.source(rows).seed(seed).shuffle().repeat()
    # Reading from memory gains nothing from threads.
    texts = order.map(_packable).to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    bins = max(BINS, batch_size)
    packed = grain.experimental.FirstFitPackIterDataset(
        texts, length_struct={"tokens": length, "learned": length}, num_packing_bins=bins, seed=seed
    )

    def shared(batch: dict) -> Demonstrations:
        return Demonstrations(*(batch[name][share] for name in ("tokens", "tokens_segment_ids", "learned")))

    settings = {"pipeline": "packed demonstrations", "rows": _digest(rows), "batch_size": batch_size}
    return _Stamped(packed.batch(batch_size).map(shared), settings | {"length": length, "seed": seed, "bins": bins})


def demonstration_batches(
    rows: Sequence[Encoded],
    *,
    batch_size: int,
    seed: int,
    multiple: int = 64,
    window: int = 32,
    shard: tuple[int, int] = (0, 1),
) -> grain.IterDataset[Demonstrations]:
    """Returns endless batches of one text in a row; arguments and errors as `pair_batches`."""
    return _by_length(rows, padded_demonstrations, batch_size, seed, multiple, window, shard)


def pair_batches(
    rows: Sequence[PairRow],
    *,
    batch_size: int,
    seed: int,
    multiple: int = 64,
    window: int = 32,
    shard: tuple[int, int] = (0, 1),
) -> grain.IterDataset[Pairs]:
    """Returns endless batches of rows of about one length.

    Rows are drawn in a new order every epoch, each once. A window of what was drawn is sorted by length and cut into
    batches, and these are given out in a random order.

    Args:
        rows: of any length.
        batch_size: rows of a batch, of all shards together.
        seed: of the order.
        multiple: the length of a batch is that of its longest row in any shard, rounded up to a multiple of this.
        window: in batches; at most an epoch, so that no batch is made of a few short rows that come again and again.
        shard: the number of this one, from 0, and how many there are.

    Raises:
        ValueError: there are no rows, one is empty, a number is below 1, or the shards do not divide the batch.
    """
    return _by_length(rows, padded_pairs, batch_size, seed, multiple, window, shard)


def prompt_batches(
    rows: Sequence[np.ndarray],
    *,
    batch_size: int,
    seed: int,
    multiple: int = 64,
    window: int = 32,
    shard: tuple[int, int] = (0, 1),
) -> grain.IterDataset[PromptRows]:
    """Returns endless batches of prompts; arguments and errors as `pair_batches`."""
    return _by_length(rows, padded_prompts, batch_size, seed, multiple, window, shard)


def in_order(
    rows: Sequence[Row],
    padded: Callable[[Sequence[Row], int], Batch],
    *,
    batch_size: int,
    multiple: int = 64,
    shard: tuple[int, int] = (0, 1),
) -> Iterator[Numbered[Batch]]:
    """Returns one pass over all rows, the shortest first, each once and with its number.

    Every batch has `batch_size` rows over all shards. The last is filled with its longest row, with weight 0 (pairs) or
    nothing learned (demonstrations), and the number -1.

    Args:
        rows: of any length.
        padded: `padded_demonstrations`, `padded_pairs` or `padded_prompts`.
        batch_size: rows of a batch, of all shards together.
        multiple: the length of a batch is that of its longest row in any shard, rounded up to a multiple of this.
        shard: the number of this one, from 0, and how many there are.

    Raises:
        ValueError: as `pair_batches`.
    """
    lengths, share = _lengths(rows), _share(batch_size, shard)
    order = np.argsort(lengths, kind="stable")

    def batch(first: int) -> Numbered[Batch]:
        places = np.arange(first, first + batch_size)
        numbers, real = order[np.minimum(places, len(rows) - 1)], places < len(rows)
        made = padded([rows[number] for number in numbers[share]], _rounded(lengths[numbers].max(), multiple))
        return Numbered(np.where(real, numbers, -1)[share], _silenced(made, real[share]))

    _rounded(1, multiple)
    return map(batch, range(0, len(rows), batch_size))


def save_state(iterator: grain.DatasetIterator, path: str | pathlib.Path) -> None:
    """Writes where an iterator stands, as JSON and in one piece; the same for every shard."""
    path = pathlib.Path(path)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(iterator.get_state(), indent=2, default=int) + "\n", encoding="utf-8")
    os.replace(part, path)


def restore_state(iterator: grain.DatasetIterator, path: str | pathlib.Path) -> None:
    """Sets an iterator to where `save_state` found another of the same data, settings and version of `grain`.

    Raises:
        DataError: the file is not such a state, or one of other data or settings, which the message names.
    """
    try:
        iterator.set_state(json.loads(pathlib.Path(path).read_text(encoding="utf-8")))
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is not the state of a data pipeline ({error}); begin the data anew.") from None
    except DataError as error:
        raise DataError(f"{path}: {error}") from None


class _Stamped(grain.IterDataset):
    """A dataset whose iterators' states hold the data and settings that they are of."""

    def __init__(self, parent: grain.IterDataset, settings: dict[str, Any]):
        super().__init__(parent)
        self._settings = settings

    def __iter__(self) -> grain.DatasetIterator:
        return _StampedIterator(self._parent.__iter__(), self._settings)


class _StampedIterator(grain.DatasetIterator):
    def __init__(self, parent: grain.DatasetIterator, settings: dict[str, Any]):
        super().__init__(parent)
        self._settings = settings

    def __next__(self) -> Any:
        return next(self._parent)

    def get_state(self) -> dict[str, Any]:
        return {"settings": self._settings, "position": self._parent.get_state()}

    def set_state(self, state: dict[str, Any]) -> None:
        saved, own = state["settings"], self._settings
        other = [name for name in own | saved if saved.get(name) != own.get(name)]
        if other:
            told = ", ".join(f"{name} was {saved.get(name)} and is {own.get(name)}" for name in other)
            raise DataError(f"the state is of other data or settings ({told}); take the ones it is of.")
        self._parent.set_state(state["position"])


class _Batches:
    """The rows' numbers of every batch `[N]`, by its number; what `grain` reads. Keeps the window that it drew last."""

    def __init__(self, lengths: np.ndarray, batch_size: int, seed: int, window: int):
        self._lengths, self._seed = lengths, seed
        self._window = max(1, min(window, len(lengths) // batch_size))
        order = grain.MapDataset.range(len(lengths)).seed(seed).shuffle().repeat()
        self._drawn = order.batch(self._window * batch_size)
        self._last: tuple[int, np.ndarray] = (-1, np.empty(0))

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> np.ndarray:
        number, place = divmod(index, self._window)
        last = self._last
        if last[0] != number:
            # Assigned at once, as threads may read.
            last = self._last = (number, self._sorted(number))
        return last[1][place]

    def _sorted(self, number: int) -> np.ndarray:
        drawn = np.asarray(self._drawn[number])
        batches = drawn[np.argsort(self._lengths[drawn], kind="stable")].reshape(self._window, -1)
        return batches[np.random.default_rng([self._seed, number]).permutation(self._window)]


def _by_length(rows, padded, batch_size, seed, multiple, window, shard) -> grain.IterDataset:
    lengths, share = _lengths(rows), _share(batch_size, shard)
    if window < 1:
        raise ValueError(f"window must be at least 1, got {window}.")

    def batch(numbers: np.ndarray) -> Any:
        length = _rounded(lengths[numbers].max(), multiple)
        return padded([rows[number] for number in numbers[share]], length)

    _rounded(1, multiple)
    batches = grain.MapDataset.source(_Batches(lengths, batch_size, seed, window)).map(batch)
    settings = {"pipeline": padded.__name__, "rows": _digest(rows), "batch_size": batch_size, "seed": seed}
    # One thread makes the next batches while a step runs.
    ahead = batches.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2))
    return _Stamped(ahead, settings | {"multiple": multiple, "window": window})


def _packable(row: Encoded) -> dict[str, np.ndarray]:
    return {"tokens": row.tokens, "learned": learned_of(row)}


def _silenced(batch: Batch, real: np.ndarray) -> Batch:
    if isinstance(batch, Pairs):
        return batch._replace(weight=batch.weight * real)
    return batch._replace(learned=batch.learned & real[:, None]) if isinstance(batch, Demonstrations) else batch


def _lengths(rows: Sequence) -> np.ndarray:
    lengths = np.array([row_length(row) for row in rows], np.int64)
    if not lengths.size or not lengths.min():
        raise ValueError("There are no rows." if not lengths.size else f"Row {lengths.argmin()} has no token.")
    return lengths


def _share(batch_size: int, shard: tuple[int, int]) -> slice:
    """Returns where a shard's rows stand in a batch."""
    number, count = shard
    if not 0 <= number < count:
        raise ValueError(f"A shard must be one of 0 to {count - 1} of {count}, got {number}.")
    if batch_size < 1 or batch_size % count:
        raise ValueError(f"{count} shards do not divide a batch of {batch_size} rows.")
    size = batch_size // count
    return slice(number * size, (number + 1) * size)


def _rounded(length: int, multiple: int) -> int:
    if multiple < 1:
        raise ValueError(f"multiple must be at least 1, got {multiple}.")
    return -(-int(length) // multiple) * multiple


def _digest(rows: Sequence) -> str:
    """Returns what tells these rows from others."""
    digest = hashlib.sha256()

    def add(part: Any) -> None:
        if isinstance(part, tuple):
            for each in part:
                add(each)
        else:
            values = np.asarray(part)
            digest.update(f"{values.dtype}{values.shape}".encode() + values.tobytes())

    for row in rows:
        add(row)
    return digest.hexdigest()[:16]
