"""Order, packing, padding, shards and restarts of the pipelines, on rows whose tokens say which row they are of."""

import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrlhf.data import DataError
from jaxrlhf.data.batches import padded_demonstrations, padded_pairs, padded_prompts
from jaxrlhf.data.encode import Encoded
from jaxrlhf.data.fitted import PairRow
from jaxrlhf.data.pipelines import (
    demonstration_batches,
    in_order,
    packed_demonstrations,
    pair_batches,
    prompt_batches,
    restore_state,
    save_state,
)

LENGTH = 16


def text(number, length, prompt=1):
    return Encoded(np.full(length, 100 + number, np.int32), np.arange(length) >= prompt)


def demonstrations(count=23, seed=0):
    lengths = np.random.default_rng(seed).integers(2, LENGTH + 1, count)
    # Some are learned from the first token on, which is not to come through.
    return [text(number, int(length), prompt=number % 2) for number, length in enumerate(lengths)]


def pairs(count=23, seed=0):
    lengths = np.random.default_rng(seed).integers(2, 40, (count, 2))
    return [
        PairRow(text(n, int(one)), text(n, int(other)), 1.0 - (n % 3) / 4, float(n))
        for n, (one, other) in enumerate(lengths)
    ]


def prompts(count=23, seed=0):
    return [row.tokens for row in demonstrations(count, seed)]


def packed(rows, **arguments):
    return packed_demonstrations(rows, length=LENGTH, **arguments)


MAKERS = {
    "packed": (packed, demonstrations),
    "demonstrations": (demonstration_batches, demonstrations),
    "pairs": (pair_batches, pairs),
    "prompts": (prompt_batches, prompts),
}
EVERY = pytest.mark.parametrize("kind", MAKERS)
SORTED = pytest.mark.parametrize("kind", ["demonstrations", "pairs", "prompts"])


def drawn(kind, count, **arguments):
    make, rows = MAKERS[kind]
    return take(iter(make(rows(), **arguments)), count)


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def numbers_of(batch):
    """The numbers of the rows of an unpacked batch."""
    return [int(row.max()) - 100 for row in batch.tokens]


def same(one, other):
    assert len(one) == len(other)
    for first, second in zip(one, other, strict=True):
        assert type(first) is type(second)
        for left, right in zip(first, second, strict=True):
            assert left.dtype == right.dtype
            np.testing.assert_array_equal(left, right)


def different(one, other):
    with pytest.raises(AssertionError):
        same(one, other)


@EVERY
def test_the_order_is_that_of_the_seed(kind):
    first = drawn(kind, 6, batch_size=4, seed=3)
    same(first, drawn(kind, 6, batch_size=4, seed=3))
    different(first, drawn(kind, 6, batch_size=4, seed=4))


@SORTED
def test_every_epoch_holds_every_row_once_in_another_order(kind):
    # A window is at most an epoch, here 5 batches: 23 windows of 20 rows are 20 epochs of 23.
    batches = drawn(kind, 115, batch_size=4, seed=0)
    found = np.array([numbers_of(batch) for batch in batches]).reshape(23, 20)
    counts = [np.bincount(np.concatenate(found[: last + 1]), minlength=23) for last in range(23)]
    assert all(count.max() - count.min() <= 1 for count in counts) and (counts[-1] == 20).all()
    assert len({tuple(window) for window in found.tolist()}) == 23


def test_epochs_that_are_whole_windows_are_orders_of_all_rows():
    iterator = iter(pair_batches(pairs(24), batch_size=4, seed=0, window=3))
    epochs = [[number for batch in take(iterator, 6) for number in numbers_of(batch)] for _ in range(5)]
    assert all(sorted(epoch) == list(range(24)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 5


def test_every_epoch_is_drawn_anew():
    # By what stands together: the random order of a window's batches, or of packed rows, would change the rest anyway.
    iterator = iter(pair_batches(pairs(24), batch_size=4, seed=0, window=1))
    epochs = [{frozenset(numbers_of(batch)) for batch in take(iterator, 6)} for _ in range(5)]
    assert len(set(map(frozenset, epochs))) == 5
    rows = [text(number, LENGTH) for number in range(128)]
    iterator = iter(packed(rows, batch_size=64, seed=0))
    halves = [frozenset(next(iterator).tokens[:, 0]) for _ in range(8)]
    assert len(set(halves)) == 8 and all(
        len(one | other) == 128 for one, other in zip(halves[::2], halves[1::2], strict=True)
    )


@SORTED
def test_windows_are_sorted_and_batches_are_not(kind):
    rows = MAKERS[kind][1](400)
    lengths = (
        {n: max(len(part.tokens) for part in row[:2]) for n, row in enumerate(pairs(400))}
        if kind == "pairs"
        else {n: len(tokens) for n, tokens in enumerate(prompts(400))}
    )
    batches = take(iter(MAKERS[kind][0](rows, batch_size=10, seed=0, multiple=8, window=20)), 20)
    spans = []
    for batch in batches:
        found = [lengths[number] for number in numbers_of(batch)]
        assert batch.tokens.shape[-1] == -(-max(found) // 8) * 8
        spans.append((min(found), max(found)))
    ordered = sorted(spans)
    assert all(one[1] <= other[0] for one, other in itertools.pairwise(ordered)) and spans != ordered


@EVERY
@pytest.mark.parametrize("count", [2, 4])
def test_shards_are_slices_of_the_whole(kind, count):
    # Every length its own, so that a shard that took its own longest row would be found out.
    arguments = {"batch_size": 4, "seed": 1} | ({} if kind == "packed" else {"multiple": 1})
    whole = drawn(kind, 12, **arguments)
    shards = [drawn(kind, 12, **arguments, shard=(number, count)) for number in range(count)]
    assert all(len(batch.tokens) == 4 // count for shard in shards for batch in shard)
    joined = [type(parts[0])(*map(np.concatenate, zip(*parts, strict=True))) for parts in zip(*shards, strict=True)]
    same(joined, whole)


def runs(batch):
    """The texts of packed rows: their numbers, lengths and learned tokens, checked to stand in one piece each."""
    for tokens, segments, learned in zip(*batch, strict=True):
        count = segments.max()
        filled = int((segments > 0).sum())
        assert count >= 1 and (np.diff(segments[:filled]) >= 0).all() and not segments[filled:].any()
        assert not tokens[filled:].any() and not learned[filled:].any()
        for segment in range(1, count + 1):
            (inside,) = np.nonzero(segments == segment)
            assert len(set(tokens[inside])) == 1 and (np.diff(inside) == 1).all()
            yield int(tokens[inside[0]]) - 100, len(inside), learned[inside]


def test_packing_keeps_every_text_whole():
    rows = demonstrations()
    # Rows are given out 64 at a time: eight batches are all that was drawn so far.
    iterator = iter(packed(rows, batch_size=8, seed=0))
    seen = np.zeros(len(rows), int)
    for _ in range(5):
        shared = 0
        for batch in take(iterator, 8):
            assert batch.tokens.shape == (8, LENGTH)
            assert [part.dtype for part in batch] == [np.int32, np.int32, bool]
            for number, length, learned in runs(batch):
                seen[number] += 1
                assert length == len(rows[number].tokens)
                assert not learned[0] and (learned[1:] == rows[number].completion[1:]).all()
            shared += (batch.segments.max(axis=1) > 1).sum()
        assert seen.max() - seen.min() <= 1 and shared > 0
    assert seen.min() > 10


def test_packing_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="A text has 16 tokens and a row 15; fit the texts with max_length=15"):
        packed_demonstrations([text(0, 16)], batch_size=1, length=15, seed=0)


def test_padding():
    rows = [text(0, 3), text(1, 5, prompt=0)]
    made = padded_demonstrations(rows, 6)
    np.testing.assert_array_equal(made.tokens, [[100] * 3 + [0] * 3, [101] * 5 + [0]])
    np.testing.assert_array_equal(made.segments, [[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0]])
    np.testing.assert_array_equal(made.learned, [[0, 1, 1, 0, 0, 0], [0, 1, 1, 1, 1, 0]])
    left = padded_prompts([row.tokens for row in rows], 6)
    np.testing.assert_array_equal(left.tokens, [[0] * 3 + [100] * 3, [0] + [101] * 5])
    np.testing.assert_array_equal(left.mask, left.tokens > 0)
    both = padded_pairs([PairRow(text(2, 2), text(3, 4), 0.5, 1.5)], 4)
    np.testing.assert_array_equal(both.tokens, [[[102, 102, 0, 0], [103] * 4]])
    np.testing.assert_array_equal(both.mask, both.tokens > 0)
    np.testing.assert_array_equal(both.completion, [[[0, 1, 0, 0], [0, 1, 1, 1]]])
    assert (both.labels, both.margins, both.weight) == (0.5, 1.5, 1.0)
    assert [part.dtype for part in both] == [np.int32, bool, bool] + [np.float32] * 3
    assert [part.dtype for part in left] == [np.int32, bool]
    with pytest.raises(ValueError, match="A row has 5 tokens, more than 4"):
        padded_demonstrations(rows, 4)


def test_labels_and_margins_stay_with_their_texts():
    rows = pairs()
    for batch in drawn("pairs", 30, batch_size=4, seed=0):
        for place, number in enumerate(numbers_of(batch)):
            row = rows[number]
            assert (batch.labels[place], batch.margins[place]) == (row.label, row.margin)
            assert batch.mask[place].sum(axis=-1).tolist() == [len(part.tokens) for part in row[:2]]
            assert batch.completion[place].sum(axis=-1).tolist() == [len(part.tokens) - 1 for part in row[:2]]
        assert (batch.weight == 1).all()


PADDED = {"demonstrations": padded_demonstrations, "pairs": padded_pairs, "prompts": padded_prompts}


@SORTED
@pytest.mark.parametrize("batch_size", [1, 4, 23, 40])
def test_one_pass_holds_every_row_once(kind, batch_size):
    rows = MAKERS[kind][1]()
    found = list(in_order(rows, PADDED[kind], batch_size=batch_size, multiple=4))
    numbers = np.concatenate([each.numbers for each in found])
    assert sorted(numbers[numbers >= 0]) == list(range(23)) and len(numbers) == -(-23 // batch_size) * batch_size
    # Only the last batch is filled.
    assert (numbers[:23] >= 0).all() and (numbers[23:] == -1).all()
    for each in found:
        real = each.numbers >= 0
        assert (np.array(numbers_of(each.batch))[real] == each.numbers[real]).all()
        if kind == "pairs":
            np.testing.assert_array_equal(each.batch.weight, real.astype(np.float32))
            np.testing.assert_array_equal(each.batch.margins[real], each.numbers[real])
        if kind == "demonstrations":
            assert (each.batch.learned.any(axis=1) == real).all()
    assert (np.diff([each.batch.tokens.shape[-1] for each in found]) >= 0).all()


def test_one_pass_in_shards():
    whole = list(in_order(pairs(), padded_pairs, batch_size=8, multiple=1))
    halves = [list(in_order(pairs(), padded_pairs, batch_size=8, multiple=1, shard=(n, 2))) for n in range(2)]
    for each, *parts in zip(whole, *halves, strict=True):
        np.testing.assert_array_equal(np.concatenate([part.numbers for part in parts]), each.numbers)
        same([type(each.batch)(*map(np.concatenate, zip(*(part.batch for part in parts), strict=True)))], [each.batch])


def check_restart(kind, before, folder, batch_size, seed, count=150):
    make, rows = MAKERS[kind]
    running = iter(make(rows(count), batch_size=batch_size, seed=seed))
    take(running, before)
    save_state(running, folder / "state.json")
    expected = take(running, 12)
    # All made anew, as in another process, and once more where an iterator has gone on already.
    fresh = iter(make(rows(count), batch_size=batch_size, seed=seed))
    for _ in range(2):
        restore_state(fresh, folder / "state.json")
        save_state(fresh, folder / "again.json")
        assert (folder / "again.json").read_text() == (folder / "state.json").read_text()
        same(take(fresh, 12), expected)


@EVERY
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_a_restart_goes_on_to_the_bit(kind, data, tmp_path_factory):
    # Beyond an epoch, a window and the 64 rows that are packed at once, and inside of them. grain draws from few rows
    # slowly, so these are not the fewest.
    before, batch_size = data.draw(st.integers(0, 30)), data.draw(st.integers(1, 9))
    seed, count = data.draw(st.integers(0, 2**32 - 1)), data.draw(st.integers(80, 160))
    check_restart(kind, before, tmp_path_factory.mktemp("states"), batch_size, seed, count)


@pytest.mark.parametrize("before", [0, 1, 7, 8, 9, 15, 16, 17, 40])
def test_a_restart_amid_packing(before, tmp_path):
    check_restart("packed", before, tmp_path, batch_size=8, seed=5)


@EVERY
def test_a_state_serves_any_number_of_shards(kind, tmp_path):
    make, rows = MAKERS[kind]
    whole = iter(make(rows(), batch_size=4, seed=0))
    take(whole, 7)
    save_state(whole, tmp_path / "state.json")
    half = iter(make(rows(), batch_size=4, seed=0, shard=(1, 2)))
    restore_state(half, tmp_path / "state.json")
    same(take(half, 5), [type(batch)(*(part[2:] for part in batch)) for batch in take(whole, 5)])


@EVERY
def test_a_state_goes_through_what_a_user_puts_behind(kind, tmp_path):
    make, rows = MAKERS[kind]
    made = [iter(make(rows(), batch_size=np.int64(4), seed=0).map(lambda batch: batch.tokens)) for _ in range(2)]
    take(made[0], 5)
    save_state(made[0], tmp_path / "state.json")
    restore_state(made[1], tmp_path / "state.json")
    for one, other in zip(*(take(each, 5) for each in made), strict=True):
        np.testing.assert_array_equal(one, other)


@EVERY
def test_a_state_of_something_else_is_refused(kind, tmp_path):
    make, rows = MAKERS[kind]
    path = tmp_path / "state.json"
    save_state(iter(make(rows(), batch_size=4, seed=0)), path)
    changed = rows()
    changed[3] = rows(24)[23]
    for other, message in [
        (make(rows(), batch_size=8, seed=0), r"state\.json: .*\(batch_size was 4 and is 8\)"),
        (make(rows(), batch_size=4, seed=2), r"\(seed was 0 and is 2\)"),
        (make(changed, batch_size=4, seed=0), r"\(rows was \w+ and is \w+\)"),
        (make(rows()[::-1], batch_size=4, seed=0), r"\(rows was \w+ and is \w+\)"),
    ]:
        with pytest.raises(DataError, match=message):
            restore_state(iter(other), path)
    named = {"packed": "packed demonstrations"}.get(kind, f"padded_{kind}")
    other = (
        pair_batches(pairs(), batch_size=4, seed=0)
        if kind != "pairs"
        else prompt_batches(prompts(), batch_size=4, seed=0)
    )
    with pytest.raises(DataError, match=f"pipeline was {named} and is"):
        restore_state(iter(other), path)


def test_what_is_no_state_is_refused(tmp_path):
    iterator = iter(pair_batches(pairs(), batch_size=4, seed=0))
    state = iterator.get_state()
    path = tmp_path / "state.json"
    with pytest.raises(DataError, match="is not the state of a data pipeline"):
        restore_state(iterator, path)
    broken = [{}, [], 3, {"settings": 3}, {"settings": state["settings"]}, {**state, "position": {"next_index": -1}}]
    for content in ["", "{", *map(json.dumps, broken)]:
        path.write_text(content)
        with pytest.raises(DataError, match="is not the state of a data pipeline"):
            restore_state(iterator, path)


def test_a_state_is_written_in_one_piece(tmp_path, monkeypatch):
    iterator = iter(pair_batches(pairs(), batch_size=4, seed=0))
    path = tmp_path / "state.json"
    save_state(iterator, path)
    kept = path.read_text()
    next(iterator)
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("no room")))
    with pytest.raises(OSError, match="no room"):
        save_state(iterator, path)
    assert path.read_text() == kept


@EVERY
def test_bad_arguments(kind):
    make, rows = MAKERS[kind]
    for arguments, message in [
        ({"batch_size": 4, "shard": (0, 3)}, "3 shards do not divide a batch of 4 rows"),
        ({"batch_size": 0}, "do not divide a batch of 0 rows"),
        ({"batch_size": 4, "shard": (2, 2)}, "one of 0 to 1 of 2, got 2"),
    ]:
        with pytest.raises(ValueError, match=message):
            make(rows(), seed=0, **arguments)
    with pytest.raises(ValueError, match="There are no rows"):
        make([], batch_size=1, seed=0)
    if kind != "packed":
        for name in ("multiple", "window"):
            with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
                make(rows(), batch_size=4, seed=0, **{name: 0})
        with pytest.raises(ValueError, match="must be at least 1, got 0"):
            in_order(rows(), PADDED[kind], batch_size=4, multiple=0)
