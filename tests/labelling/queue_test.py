"""The queue: who is shown which pair, what is undone, repeated and kept, with clocks and chance of our own."""

import collections
import pathlib
import random
import sqlite3
import threading

import pytest

from jaxrlhf.annotation.journal_file import Journal
from jaxrlhf.labelling.pairs import make_pair
from jaxrlhf.labelling.people import agreement, consistency, describe, majority, mistake_rate, summary
from jaxrlhf.labelling.queue import Queue, QueueError
from jaxrlhf.labelling.store import LabelStore, Vote


class World:
    """A queue of pairs over a file, with a clock that is moved by hand; `restart` opens it again."""

    def __init__(self, path, count=4, **settings):
        self.path, self.settings, self.now = path, {"repeats": 0.0} | settings, 1000.0
        self.pairs = [make_pair("people", f"prompt {n}", f"first {n}", f"second {n}") for n in range(count)]
        self.restart()

    def restart(self):
        chance = random.Random(0)
        self.queue = Queue(LabelStore(self.path), clock=lambda: self.now, chance=chance, **self.settings)
        self.queue.add(self.pairs)

    def give(self, person, tab, choice="left", **more):
        shown = self.queue.next(person, tab)
        assert shown is not None
        return self.queue.give(person, shown.lease.lease, choice, **more)


@pytest.fixture
def make(tmp_path):
    return lambda **settings: World(tmp_path / "labels.sqlite", **settings)


@pytest.mark.parametrize("choice", ["left", "right", "tie", "skip"])
def test_a_choice_on_the_screen_is_a_label_of_the_pair(make, choice):
    world = make(count=30)
    orders = set()
    for _ in range(30):
        vote = world.give("ann", "1", choice, note="because", seconds=2.0)
        orders.add(vote.swapped)
        left = 0.0 if vote.swapped else 1.0
        assert vote.label == {"left": left, "right": 1 - left, "tie": 0.5, "skip": None}[choice]
    assert orders == {True, False}
    assert world.queue.next("ann", "1") is None
    world.restart()
    assert [vote.note for vote in world.queue.votes()] == ["because"] * 30
    assert world.queue.finished([pair.key for pair in world.pairs])


def test_a_tab_keeps_its_pair_and_its_order_over_reloads_and_restarts(make):
    world = make()
    shown = [world.queue.next("ann", "1"), world.queue.next("ann", "2"), world.queue.next("bob", "1")]
    assert len({each.pair.key for each in shown}) == 3
    assert world.queue.next("ann", "1") == shown[0]
    world.restart()
    assert [world.queue.next(*who) for who in (("ann", "1"), ("ann", "2"), ("bob", "1"))] == shown
    assert world.queue.next("eve", "1").pair.key not in {each.pair.key for each in shown}
    assert world.queue.next("eve", "2") is None


def test_a_silent_tab_loses_its_pair_but_not_its_label(make):
    world = make(count=1, lease_seconds=60.0)
    lost = world.queue.next("ann", "1")
    assert world.queue.next("ann", "2") is None
    world.now += 50
    world.queue.renew("ann", lost.lease.lease)
    world.now += 50
    assert world.queue.next("ann", "2") is None
    world.now += 11
    taken = world.queue.next("ann", "2")
    assert taken.pair == lost.pair
    world.queue.renew("ann", lost.lease.lease)  # too late: it does not come back
    assert world.queue.next("ann", "1") is None
    first = world.queue.give("ann", lost.lease.lease, "tie")
    second = world.queue.give("ann", taken.lease.lease, "skip")
    assert world.queue.labels(lost.pair.key) == [0.5]
    assert not first.repeat and second.repeat
    assert len(world.queue.votes()) == 2


def test_a_label_that_is_sent_twice_is_given_once(make):
    world = make()
    shown = world.queue.next("ann", "1")
    first = world.queue.give("ann", shown.lease.lease, "left")
    assert world.queue.give("ann", shown.lease.lease, "right") == first
    world.restart()
    assert world.queue.give("ann", shown.lease.lease, "right").label == first.label
    assert len(world.queue.votes()) == 1


@pytest.mark.parametrize("lease", ["", "unknown", "of another"])
def test_a_label_without_a_lease_is_refused(make, lease):
    world = make()
    other = world.queue.next("bob", "1").lease.lease
    with pytest.raises(QueueError, match="no longer waiting"):
        world.queue.give("ann", other if lease == "of another" else lease, "left")
    assert not world.queue.votes()


def test_undo_shows_the_pair_again_and_goes_back_further(make):
    world = make()
    votes = [world.give("ann", "1") for _ in range(2)]
    pending = world.queue.next("ann", "1")
    world.give("ann", "2")
    for vote in reversed(votes):
        assert world.queue.undoable("ann", "1") == vote.lease
        shown = world.queue.undo("ann", "1", vote.lease)
        assert (shown.pair.key, shown.lease.swapped) == (vote.pair, vote.swapped)
        # The request came twice: nothing further is undone.
        assert world.queue.undo("ann", "1", vote.lease) == shown
    assert world.queue.undoable("ann", "1") == ""
    world.restart()
    assert world.queue.next("ann", "1").pair.key == votes[0].pair
    again = {world.give("ann", "1").pair for _ in range(3)}
    assert again == {votes[0].pair, votes[1].pair, pending.pair.key}


def test_what_was_on_the_screen_follows_the_undone_pair(make):
    world = make(count=9)
    vote = world.give("ann", "1")
    pending = world.queue.next("ann", "1")
    shown = world.queue.undo("ann", "1", vote.lease)
    world.queue.give("ann", shown.lease.lease, "right")
    assert world.queue.next("ann", "1").pair == pending.pair


def test_a_used_label_is_not_undone_and_others_cannot_undo(make):
    world = make()
    vote = world.give("ann", "1")
    with pytest.raises(QueueError, match="no such label of yours"):
        world.queue.undo("bob", "1", vote.lease)
    held = world.queue.next("ann", "1")
    world.queue.close([vote.pair, held.pair.key])
    assert world.queue.undoable("ann", "1") == ""
    with pytest.raises(QueueError, match="has been used"):
        world.queue.undo("ann", "1", vote.lease)
    with pytest.raises(QueueError, match="no longer waiting"):
        world.queue.give("ann", held.lease.lease, "left")
    assert world.queue.next("ann", "1").pair.key not in (vote.pair, held.pair.key)
    assert world.queue.counts()["pairs"] == 2


def test_each_pair_is_shown_to_k_people(make):
    world = make(count=3, people_per_pair=2)
    seen = collections.defaultdict(list)
    for person in ("ann", "bob", "eve"):
        while (shown := world.queue.next(person, "1")) is not None:
            seen[shown.pair.key].append(person)
            world.queue.give(person, shown.lease.lease, "left")
    assert sorted(map(len, seen.values())) == [2, 2, 2]
    assert all(len(set(people)) == 2 for people in seen.values())
    assert world.queue.counts()["left"] == 0


def test_repetitions_measure_consistency_and_are_no_further_labels(make):
    world = make(count=60, repeats=0.3)
    flips = {}
    while (shown := world.queue.next("ann", "1")) is not None:
        # Consistent on the pair, whatever side it stands on, but for every third pair.
        number = int(shown.pair.prompt[0].text.split()[1])
        label = 1.0 if number % 3 or not shown.lease.repeat else 0.0
        choice = "left" if (label == 1.0) != shown.lease.swapped else "right"
        world.queue.give("ann", shown.lease.lease, choice)
        flips[number] = flips.get(number, 0) + 1
    repeated = [number for number, times in flips.items() if times > 1]
    assert len(repeated) >= 8 and max(flips.values()) == 2
    counts = world.queue.counts("ann")
    assert counts["own"] == 60 and counts["given"] == 60
    assert counts["repeated"] == len(repeated)
    assert counts["same"] == sum(number % 3 > 0 for number in repeated)


def test_two_hundred_tabs_at_once_share_the_pairs_without_loss(tmp_path):
    queue = Queue(LabelStore(tmp_path / "labels.sqlite"), repeats=0.0)
    pairs = [make_pair("people", f"prompt {n}", "a", "b") for n in range(600)]
    queue.add(pairs)
    shown, lock = collections.Counter(), threading.Lock()

    def label(tab):
        while (each := queue.next(f"person {tab % 50}", str(tab))) is not None:
            with lock:
                shown[each.pair.key] += 1
            queue.give(each.lease.person, each.lease.lease, "left")

    threads = [threading.Thread(target=label, args=(tab,)) for tab in range(200)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(shown.values()) == {1} and len(shown) == 600
    queue.store.close()
    assert collections.Counter(vote.pair for vote in LabelStore(tmp_path / "labels.sqlite").votes()) == shown


def test_texts_with_anything_in_them_are_kept(tmp_path):
    texts = "\ud800 half", "\u202eoverride \0 zero", "x" * 1_000_000
    queue = Queue(LabelStore(tmp_path / "labels.sqlite"))
    queue.add([make_pair("people", *texts)])
    shown = queue.next("ann", "1")
    queue.give("ann", shown.lease.lease, "left", note=texts[0])
    assert Queue(LabelStore(tmp_path / "labels.sqlite")).votes()[0].note == texts[0]


def test_a_journal_of_labels_stays_one(tmp_path):
    path: pathlib.Path = tmp_path / "labels.sqlite"
    Journal(path).keep(b"key", 1.0)
    store = LabelStore(path)
    assert store.find([b"key"]) == {b"key": 1.0} and store.votes() == []
    assert Journal(path).find([b"key"]) == {b"key": 1.0}
    other = tmp_path / "other.sqlite"
    with sqlite3.connect(other) as connection:
        connection.execute("CREATE TABLE t (x)")
    with pytest.raises(ValueError, match="no journal of labels"):
        LabelStore(other)


def vote(person, pair, label, forecast=None, repeat=False):
    return Vote(f"{person}{pair}{repeat}", pair.encode(), person, "1", label, False, repeat, "", 2.0, 0.0, forecast)


def test_what_people_say_together():
    votes = [
        *(vote("ann", "p", 1.0, 0.9), vote("ann", "q", 0.0, 0.9), vote("ann", "r", 0.5, 0.9), vote("ann", "s", None)),
        *(vote("ann", "p", 1.0, repeat=True), vote("ann", "q", 1.0, repeat=True)),
        *(vote("bob", "p", 1.0, 0.5), vote("bob", "q", 1.0, 0.2)),
    ]
    ann, bob = summary(votes)
    assert (ann["labels"], ann["ties"], ann["skipped"]) == (4, 1, 1)
    assert (ann["repeated"], ann["same"]) == (2, 1)
    assert (ann["others"], ann["with_others"]) == (2, 1)
    assert (ann["forecast"], ann["agreed"]) == (2, 1)
    assert (bob["forecast"], bob["agreed"]) == (1, 0)
    sentences = describe(votes)
    assert "1 of 2 labels as the reward model expected" in sentences[0]
    assert sentences[-1] == (
        "The reward model at hand expected 1 of 3 decided labels (33%): 1 of 1 in the first half, 0 of 2 in the second."
    )
    assert len(describe(votes[:1])) == 1 and describe([]) == []
    assert consistency([]) == {"repeated": 0, "same": 0} and agreement([]) == {"forecast": 0, "agreed": 0}


def labelled_twice(rate, forecast, count=4000):
    """Votes of a person who errs at a rate, on pairs preferred with the probability `forecast`."""
    chance, votes = random.Random(0), []

    def say():
        better = chance.random() < forecast
        return float(better != (chance.random() < rate))

    for number in range(count):
        pair = f"{forecast} {number}"
        votes += [vote("ann", pair, say(), forecast), vote("ann", pair, say(), forecast, repeat=True)]
    return votes


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.3])
def test_the_rate_of_mistakes_is_found_beside_the_noise_of_close_pairs(rate):
    votes = labelled_twice(rate, 0.9) + labelled_twice(rate, 0.02)
    assert mistake_rate(votes) == pytest.approx(rate, abs=0.02)


def test_few_repetitions_and_close_pairs_say_little_about_mistakes():
    assert mistake_rate([]) == 0.0
    assert mistake_rate(labelled_twice(0.3, 0.5)) == 0.0
    contradiction = [vote("ann", "p", 1.0, 0.99), vote("ann", "p", 0.0, 0.99, repeat=True)]
    assert 0.0 < mistake_rate(contradiction) < 0.1
    tie = [vote("ann", "p", 1.0, 0.99), vote("ann", "p", 0.5, 0.99, repeat=True)]
    other = [vote("ann", "p", 1.0, 0.99), vote("bob", "p", 0.0, 0.99)]
    assert mistake_rate(tie) == mistake_rate(other) == 0.0


@pytest.mark.parametrize(
    ("labels", "expected"),
    [([], None), ([None], None), ([1.0], 1.0), ([1.0, 0.0], 0.5), ([0.5, 1.0], 1.0), ([0.0, 0.0, 1.0, None], 0.0)],
)
def test_the_majority(labels, expected):
    assert majority(labels) == expected
