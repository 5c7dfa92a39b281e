"""Batches of token rows as `grain` datasets: infinite and shuffled for training, a single pass for evaluation.

    batches = iter(pair_batches(rows, batch_size=64, seed=0, shard=(jax.process_index(), jax.process_count())))
    batch = next(batches)                       # Pairs
    save_state(batches, "run/data.json")        # then, in another process, on an iterator made the same way
    restore_state(batches, "run/data.json")     # continues with the batch after

`batch_size` is the global batch size, over all shards. Every shard draws in the same order and takes its slice of each
batch: the slices concatenated are the batch of a single process, and a state can be restored with another number of
shards.
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
    loss_mask_of,
    padded_demonstrations,
    padded_pairs,
    padded_prompts,
)
from jaxrlhf.data.encode import Encoded
from jaxrlhf.data.records import DataError
from jaxrlhf.data.tokenization import PairRow, row_length

# Rows packed at the same time, unless a batch is larger. More rows leave less padding but mix two epochs more.
BINS = 64

Row = TypeVar("Row", Encoded, PairRow, np.ndarray)
Batch = TypeVar("Batch", Demonstrations, Pairs, PromptRows)


class IndexedBatch(NamedTuple, Generic[Batch]):
    """A batch, and the indices `[N]` of its rows in the data, -1 on a row that only fills the batch."""

    indices: np.ndarray
    batch: Batch


def packed_demonstrations(
    rows: Sequence[Encoded], *, batch_size: int, length: int, seed: int, shard: tuple[int, int] = (0, 1)
) -> grain.IterDataset[Demonstrations]:
    """Returns infinite batches of rows of `length` tokens, each packed with several texts by first fit.

    Every epoch shuffles the texts anew. Once a text fits into none of the open rows, these are emitted; the end of an
    epoch and the beginning of the next may share a row.

    Args:
        rows: texts of at most `length` tokens.
        batch_size: rows in a batch, over all shards.
        length: of a row, in tokens.
        seed: of the shuffle.
        shard: index of this shard, from 0, and the number of shards.

    Raises:
        ValueError: there are no rows, one is empty or longer than `length`, or the shards do not divide the batch.
    """
    longest, own_rows = int(_lengths(rows).max()), _shard_slice(batch_size, shard)
    if longest > length:
        raise ValueError(f"A text has {longest} tokens and a row {length}; fit the texts with max_length={length}.")
    order = grain.MapDataset.source(rows).seed(seed).shuffle().repeat()
    # Threads do not help to read from memory.
    texts = order.map(_packable).to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    bins = max(BINS, batch_size)
    packed = grain.experimental.FirstFitPackIterDataset(
        texts, length_struct={"tokens": length, "loss_mask": length}, num_packing_bins=bins, seed=seed
    )

    def own_slice(batch: dict) -> Demonstrations:
        return Demonstrations(*(batch[name][own_rows] for name in ("tokens", "tokens_segment_ids", "loss_mask")))

    settings = {"pipeline": "packed demonstrations", "rows": _digest(rows), "batch_size": batch_size}
    return _CheckedDataset(
        packed.batch(batch_size).map(own_slice), settings | {"length": length, "seed": seed, "bins": bins}
    )


def demonstration_batches(
    rows: Sequence[Encoded],
    *,
    batch_size: int,
    seed: int,
    multiple: int = 64,
    window: int = 32,
    shard: tuple[int, int] = (0, 1),
) -> grain.IterDataset[Demonstrations]:
    """Returns infinite batches of one text a row; arguments and errors as `pair_batches`."""
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
    """Returns infinite batches of rows of similar length.

    Every epoch shuffles the rows anew and visits each once. A window of the shuffled rows is sorted by length and split
    into batches, which are emitted in random order.

    Args:
        rows: pairs of any length.
        batch_size: rows in a batch, over all shards.
        seed: of the shuffle.
        multiple: a batch is padded to its longest row over all shards, rounded up to a multiple of this.
        window: in batches; at most an epoch, so that no batch repeats the same few short rows.
        shard: index of this shard, from 0, and the number of shards.

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
    widest: int | None = None,
) -> grain.IterDataset[PromptRows]:
    """Returns infinite batches of prompts; arguments and errors as `pair_batches`.

    `widest` bounds the columns of a batch after rounding; no prompt may be longer.
    """
    return _by_length(rows, padded_prompts, batch_size, seed, multiple, window, shard, widest)


def evaluation_batches(
    rows: Sequence[Row],
    padded: Callable[[Sequence[Row], int], Batch],
    *,
    batch_size: int,
    multiple: int = 64,
    shard: tuple[int, int] = (0, 1),
) -> Iterator[IndexedBatch[Batch]]:
    """Returns a single pass over all rows, the shortest first, each with its index.

    Every batch has `batch_size` rows over all shards. The last one is filled up with its longest row, with weight 0
    (pairs) or an empty loss mask (demonstrations), and the index -1.

    Args:
        rows: of any length.
        padded: `padded_demonstrations`, `padded_pairs` or `padded_prompts`.
        batch_size: rows in a batch, over all shards.
        multiple: a batch is padded to its longest row over all shards, rounded up to a multiple of this.
        shard: index of this shard, from 0, and the number of shards.

    Raises:
        ValueError: as `pair_batches`.
    """
    lengths, own_rows = _lengths(rows), _shard_slice(batch_size, shard)
    order = np.argsort(lengths, kind="stable")

    def batch(start: int) -> IndexedBatch[Batch]:
        positions = np.arange(start, start + batch_size)
        indices, real = order[np.minimum(positions, len(rows) - 1)], positions < len(rows)
        full = padded([rows[index] for index in indices[own_rows]], _round_up(lengths[indices].max(), multiple))
        return IndexedBatch(np.where(real, indices, -1)[own_rows], _without_filler(full, real[own_rows]))

    _round_up(1, multiple)  # checks it at the call
    return map(batch, range(0, len(rows), batch_size))


def save_state(iterator: grain.DatasetIterator, path: str | pathlib.Path) -> None:
    """Writes an iterator's position as JSON, atomically; it is the same for every shard."""
    path = pathlib.Path(path)
    partial = path.with_name(path.name + ".part")
    partial.write_text(json.dumps(iterator.get_state(), indent=2, default=int) + "\n", encoding="utf-8")
    os.replace(partial, path)


def restore_state(iterator: grain.DatasetIterator, path: str | pathlib.Path) -> None:
    """Restores the position that `save_state` wrote for the same data, settings and version of `grain`.

    Raises:
        DataError: the file is not such a state, or its data or settings differ; the message names them.
    """
    try:
        iterator.set_state(json.loads(pathlib.Path(path).read_text(encoding="utf-8")))
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is not the state of a data pipeline ({error}); begin the data anew.") from None
    except DataError as error:
        raise DataError(f"{path}: {error}") from None


class _CheckedDataset(grain.IterDataset):
    """A dataset whose iterators store their settings with their state, and refuse the state of other settings."""

    def __init__(self, parent: grain.IterDataset, settings: dict[str, Any]):
        super().__init__(parent)
        self._settings = settings

    def __iter__(self) -> grain.DatasetIterator:
        return _CheckedIterator(self._parent.__iter__(), self._settings)


class _CheckedIterator(grain.DatasetIterator):
    def __init__(self, parent: grain.DatasetIterator, settings: dict[str, Any]):
        super().__init__(parent)
        self._settings = settings

    def __next__(self) -> Any:
        return next(self._parent)

    def get_state(self) -> dict[str, Any]:
        return {"settings": self._settings, "position": self._parent.get_state()}

    def set_state(self, state: dict[str, Any]) -> None:
        saved, own = state["settings"], self._settings
        changed = [name for name in own | saved if saved.get(name) != own.get(name)]
        if changed:
            changes = ", ".join(f"{name} was {saved.get(name)} and is {own.get(name)}" for name in changed)
            raise DataError(f"the state is of other data or settings ({changes}); restore it with the original ones.")
        self._parent.set_state(state["position"])


class _BatchIndices:
    """The row indices `[N]` of every batch, a data source for `grain`. Caches the window drawn last."""

    def __init__(self, lengths: np.ndarray, batch_size: int, seed: int, window: int):
        self._lengths, self._seed = lengths, seed
        self._window = max(1, min(window, len(lengths) // batch_size))
        order = grain.MapDataset.range(len(lengths)).seed(seed).shuffle().repeat()
        self._windows = order.batch(self._window * batch_size)
        self._cache: tuple[int, np.ndarray] = (-1, np.empty(0))

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> np.ndarray:
        window, position = divmod(index, self._window)
        cache = self._cache
        if cache[0] != window:
            # One assignment, as other threads may read.
            cache = self._cache = (window, self._sorted(window))
        return cache[1][position]

    def _sorted(self, window: int) -> np.ndarray:
        rows = np.asarray(self._windows[window])
        batches = rows[np.argsort(self._lengths[rows], kind="stable")].reshape(self._window, -1)
        return batches[np.random.default_rng([self._seed, window]).permutation(self._window)]


def _by_length(rows, padded, batch_size, seed, multiple, window, shard, widest=None) -> grain.IterDataset:
    lengths, own_rows = _lengths(rows), _shard_slice(batch_size, shard)
    if window < 1:
        raise ValueError(f"window must be at least 1, got {window}.")

    def batch(indices: np.ndarray) -> Any:
        length = _round_up(lengths[indices].max(), multiple)
        return padded([rows[index] for index in indices[own_rows]], length if widest is None else min(length, widest))

    _round_up(1, multiple)  # checks it at the call
    batches = grain.MapDataset.source(_BatchIndices(lengths, batch_size, seed, window)).map(batch)
    settings = {"pipeline": padded.__name__, "rows": _digest(rows), "batch_size": batch_size, "seed": seed}
    # One thread prepares the next batches while a step runs.
    prefetched = batches.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2))
    return _CheckedDataset(prefetched, settings | {"multiple": multiple, "window": window})


def _packable(row: Encoded) -> dict[str, np.ndarray]:
    return {"tokens": row.tokens, "loss_mask": loss_mask_of(row)}


def _without_filler(batch: Batch, real: np.ndarray) -> Batch:
    """Returns the batch with rows that are not real left out of the loss."""
    if isinstance(batch, Pairs):
        return batch._replace(weight=batch.weight * real)
    if isinstance(batch, Demonstrations):
        return batch._replace(loss_mask=batch.loss_mask & real[:, None])
    return batch


def _lengths(rows: Sequence) -> np.ndarray:
    lengths = np.array([row_length(row) for row in rows], np.int64)
    if not lengths.size or not lengths.min():
        raise ValueError("There are no rows." if not lengths.size else f"Row {lengths.argmin()} has no token.")
    return lengths


def _shard_slice(batch_size: int, shard: tuple[int, int]) -> slice:
    """Returns the slice of a batch that is a shard's."""
    index, count = shard
    if not 0 <= index < count:
        raise ValueError(f"A shard must be one of 0 to {count - 1} of {count}, got {index}.")
    if batch_size < 1 or batch_size % count:
        raise ValueError(f"{count} shards do not divide a batch of {batch_size} rows.")
    size = batch_size // count
    return slice(index * size, (index + 1) * size)


def _round_up(length: int, multiple: int) -> int:
    if multiple < 1:
        raise ValueError(f"multiple must be at least 1, got {multiple}.")
    return -(-int(length) // multiple) * multiple


def _digest(rows: Sequence) -> str:
    """Returns a hash of the rows."""
    digest = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, tuple):
            for part in value:
                add(part)
        else:
            values = np.asarray(value)
            digest.update(f"{values.dtype}{values.shape}".encode() + values.tobytes())

    for row in rows:
        add(row)
    return digest.hexdigest()[:16]
