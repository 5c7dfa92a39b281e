"""The queue of pairs that wait for people: who is shown which pair next, and what they said.

    queue = Queue(LabelStore("labels.sqlite"))
    queue.add(pairs)
    shown = queue.next("person", "tab")            # the tab holds the pair, also over a reload or a restart
    queue.give("person", shown.lease.lease, "left")

A pair is shown to `people_per_pair` people, and to one tab at a time. A tab that is silent for `lease_seconds` loses its
pair to the next who asks; its label still counts if it comes. All changes are in the store before a method returns.
"""

import collections
import random
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple

from jaxrlhf.annotation.journal_file import Label
from jaxrlhf.labelling.pairs import Pair
from jaxrlhf.labelling.people import agreement, consistency
from jaxrlhf.labelling.store import LabelStore, Lease, Vote

Choice = Literal["left", "right", "tie", "skip"]
CHOICES = ("left", "right", "tie", "skip")
REPEAT_AFTER = 8
"""Labels that a person gives between a pair and its repetition, at least."""
SPEED_SECONDS = 300.0
"""Length of the window over which the speed is taken."""


class Shown(NamedTuple):
    """A pair and the lease under which it is shown."""

    lease: Lease
    pair: Pair


class QueueError(ValueError):
    """A request that cannot be carried out; the page shows the message."""


class Queue:
    """Pairs that wait for labels; safe for concurrent threads.

    Attributes:
        store: of everything.
        people_per_pair: number of people who are shown each pair.
        changes: labels given or withdrawn so far in this process.
    """

    def __init__(
        self,
        store: LabelStore,
        *,
        people_per_pair: int = 1,
        lease_seconds: float = 120.0,
        repeats: float = 0.05,
        clock: Callable[[], float] = time.time,
        chance: random.Random | None = None,
    ):
        """Takes up the votes and leases that are in the store.

        Args:
            store: of everything.
            people_per_pair: number of people who are shown each pair.
            lease_seconds: after which a silent tab loses its pair.
            repeats: fraction of a person's pairs that they have labelled before.
            clock: Unix time.
            chance: random source of orders and repeats.

        Raises:
            ValueError: a number is out of range, or the store cannot be read.
        """
        if people_per_pair < 1 or not lease_seconds > 0 or not 0 <= repeats < 1:
            raise ValueError("people_per_pair must be at least 1, lease_seconds positive and repeats in [0, 1).")
        self.store, self.people_per_pair = store, people_per_pair
        self._lease_seconds, self._repeats, self._clock = lease_seconds, repeats, clock
        self._random = random.SystemRandom() if chance is None else chance
        self._changed = threading.Condition(threading.RLock())
        self.changes = 0
        self._pairs: dict[bytes, Pair] = {}
        # Beside those that wait, those whose labels are used, which may be shown again.
        self._known: dict[bytes, Pair] = {}
        self._counted: dict[bytes, int] = {}
        self._given = 0
        # Pairs that need one more person, in the order in which they are shown.
        self._open: dict[bytes, None] = {}
        self._votes: dict[str, Vote] = {}
        self._by_pair: dict[bytes, list[Vote]] = collections.defaultdict(list)
        self._by_person: dict[str, list[Vote]] = collections.defaultdict(list)
        self._recent: collections.deque[float] = collections.deque()
        self._leases: dict[str, Lease] = {}
        self._held: dict[tuple[str, str], str] = {}
        self._expires: dict[str, float] = {}
        self._holders: dict[bytes, set[str]] = collections.defaultdict(set)
        for lease in store.leases():
            self._hold(lease)
        for vote in store.votes():
            self._remember(vote)

    def add(self, pairs: Iterable[Pair]) -> None:
        """Adds pairs to be labelled; those that are there, or were labelled before, are not asked for again."""
        pairs = list(pairs)
        self.store.add_pairs(pairs)
        with self._changed:
            for pair in pairs:
                self._pairs[pair.key] = self._known[pair.key] = pair
                self._refresh(pair.key)
            self._changed.notify_all()

    def close(self, keys: Iterable[bytes]) -> None:
        """Takes pairs out: their labels are used, and can no longer be withdrawn."""
        with self._changed:
            for key in keys:
                self._pairs.pop(key, None)
                self._refresh(key)
            gone = [lease for lease in self._leases.values() if not self._shows(lease)]
            self._end(gone)
        self.store.release([lease.lease for lease in gone])

    def next(self, person: str, tab: str) -> Shown | None:
        """Returns the pair that a tab holds, or grants it the next one; None where none waits for this person."""
        with self._changed:
            held = self._current(person, tab)
            if held is not None:
                return held
            self._expire()
            key, repeat = self._repetition(person), True
            if key is None:
                key, repeat = self._waiting(person), False
            if key is None:
                return None
            lease = self._lease(key, person, tab, repeat=repeat, swapped=self._random.random() < 0.5)
            self.store.grant(lease)
            self._hold(lease)
            return Shown(lease, self._known[key])

    def give(self, person: str, lease: str, choice: Choice, *, note: str = "", seconds: float = 0.0) -> Vote:
        """Stores what a person says of the pair held under a lease; said again, the first label stays.

        Raises:
            QueueError: there is no such lease.
        """
        with self._changed:
            known = self._votes.get(lease)
            if known is not None and known.person == person:
                return known
            held = self._leases.get(lease)
            if held is None or held.person != person or not self._shows(held):
                raise QueueError("This pair is no longer waiting for your label; here is another.")
            vote = Vote(
                *(held.lease, held.pair, person, held.tab),
                label=_label(choice, held.swapped),
                swapped=held.swapped,
                # Of two tabs that showed a person the same pair, one after its time, the second counts as asked again.
                repeat=held.repeat or any(vote.person == person for vote in self._by_pair[held.pair]),
                note=note,
                seconds=seconds,
                at=self._clock(),
                forecast=self._known[held.pair].forecast,
            )
            self.store.give(vote)
            self._end([held])
            self._remember(vote)
            self._recent.append(vote.at)
            self.changes += 1
            self._changed.notify_all()
            return vote

    def undo(self, person: str, tab: str, lease: str) -> Shown:
        """Withdraws the label given under a lease, and returns its pair, which the tab now holds.

        Raises:
            QueueError: there is no such label, or it has been used.
        """
        with self._changed:
            vote = self._votes.get(lease)
            if vote is None or vote.person != person:
                held = self._current(person, tab)
                if held is None:
                    raise QueueError("There is no such label of yours to undo.")
                # The request was repeated: it has been carried out.
                return held
            if not self._shows(vote):
                raise QueueError("Your last label has been used already; it can no longer be undone.")
            return self._take_back(vote, tab)

    def renew(self, person: str, lease: str) -> None:
        """Keeps a lease alive."""
        with self._changed:
            held = self._leases.get(lease)
            if held is not None and held.person == person:
                self._current(person, held.tab)

    def finished(self, keys: Sequence[bytes]) -> bool:
        """Returns whether each of the pairs has all its labels."""
        with self._changed:
            return all(self._settled(key) for key in keys)

    def wait(self, seconds: float) -> None:
        """Waits until something changes, or for some seconds."""
        with self._changed:
            self._changed.wait(seconds)

    def labels(self, key: bytes) -> list[Label]:
        """Returns the labels of a pair by the first `people_per_pair` people who gave one."""
        with self._changed:
            return [vote.label for vote in self._by_pair[key][: self.people_per_pair]]

    def counts(self, person: str | None = None) -> dict[str, Any]:
        """Returns the labels given and left, by all, and what a person did, for the page."""
        with self._changed:
            now = self._clock()
            while self._recent and self._recent[0] < now - SPEED_SECONDS:
                self._recent.popleft()
            window = min(SPEED_SECONDS, now - self._recent[0]) if self._recent else 0.0
            wanted, given = len(self._pairs) * self.people_per_pair, self._given
            counts: dict[str, Any] = {"pairs": len(self._pairs), "given": given, "left": wanted - given}
            counts["total"] = len(self._votes)
            counts["per_minute"] = 60 * len(self._recent) / max(window, 30.0)
            if person is not None:
                own = self._by_person[person]
                counts |= {"own": sum(not vote.repeat for vote in own), **consistency(own), **agreement(own)}
            return counts

    def votes(self) -> list[Vote]:
        """Returns all votes that stand, in the order in which they came."""
        with self._changed:
            return sorted(self._votes.values(), key=lambda vote: vote.at)

    def undoable(self, person: str, tab: str) -> str:
        """Returns the lease of a tab's last label, if it can be withdrawn; else an empty text."""
        with self._changed:
            vote = next((vote for vote in reversed(self._by_person[person]) if vote.tab == tab), None)
            return vote.lease if vote is not None and self._shows(vote) else ""

    def _take_back(self, vote: Vote, tab: str) -> Shown:
        person = vote.person
        held = self._leases.get(self._held.get((person, tab), ""))
        lease = self._lease(vote.pair, person, tab, repeat=vote.repeat, swapped=vote.swapped)
        self.store.withdraw(vote.lease, lease, released=None if held is None else held.lease)
        self._forget(vote)
        self._hold(lease)
        if held is not None:
            self._end([held])
            if held.pair in self._open:
                # The pair that was on the screen comes next.
                self._open = {held.pair: None, **self._open}
        self.changes += 1
        self._changed.notify_all()
        return Shown(lease, self._known[vote.pair])

    def _shows(self, of: Lease | Vote) -> bool:
        """Returns whether the pair of a lease or a vote may still be labelled."""
        return of.pair in (self._known if of.repeat else self._pairs)

    def _current(self, person: str, tab: str) -> Shown | None:
        """Returns what a tab holds, and keeps it alive; a pair that went to others in the meantime is lost to it."""
        lease = self._leases.get(self._held.get((person, tab), ""))
        if lease is None or not self._shows(lease):
            return None
        if self._expires[lease.lease] < self._clock() and not lease.repeat:
            self._refresh(lease.pair)
            if lease.pair not in self._open:
                return None
        self._hold(lease)
        return Shown(lease, self._known[lease.pair])

    def _waiting(self, person: str) -> bytes | None:
        done = {vote.pair for vote in self._by_person[person]} if self.people_per_pair > 1 else set()
        now = self._clock()
        own = (lease for lease in self._leases.values() if lease.person == person)
        done |= {lease.pair for lease in own if self._expires[lease.lease] >= now}
        return next((key for key in self._open if key not in done), None)

    def _repetition(self, person: str) -> bytes | None:
        """Returns a pair that the person labelled some time ago, now and then."""
        if not self._repeats or self._random.random() >= self._repeats or not self._open:
            return None
        own = self._by_person[person]
        again = {vote.pair for vote in own if vote.repeat} | {lease.pair for lease in self._leases.values()}
        known = [v.pair for v in own[:-REPEAT_AFTER] if v.label is not None and v.pair in self._known]
        fresh = [key for key in known if key not in again]
        return self._random.choice(fresh) if fresh else None

    def _lease(self, key: bytes, person: str, tab: str, *, repeat: bool, swapped: bool) -> Lease:
        return Lease(secrets.token_urlsafe(12), key, person, tab, swapped, repeat, self._clock())

    def _hold(self, lease: Lease) -> None:
        self._leases[lease.lease] = lease
        if not lease.repeat:
            self._holders[lease.pair].add(lease.lease)
        self._held[lease.person, lease.tab] = lease.lease
        self._expires[lease.lease] = self._clock() + self._lease_seconds
        self._refresh(lease.pair)

    def _end(self, leases: Iterable[Lease]) -> None:
        for lease in leases:
            self._leases.pop(lease.lease, None)
            self._expires.pop(lease.lease, None)
            self._holders[lease.pair].discard(lease.lease)
            if self._held.get((lease.person, lease.tab)) == lease.lease:
                del self._held[lease.person, lease.tab]
            self._refresh(lease.pair)

    def _expire(self) -> None:
        now = self._clock()
        for name, when in self._expires.items():
            lease = self._leases[name]
            # An expired lease still admits its label, but no longer keeps others from the pair.
            if when < now and not lease.repeat:
                self._refresh(lease.pair)

    def _refresh(self, key: bytes) -> None:
        """Brings up to date whether a pair needs one more person, and the number of labels given."""
        now = self._clock()
        holders = sum(self._expires[lease] >= now for lease in self._holders[key])
        if key in self._pairs and len(self._by_pair[key]) + holders < self.people_per_pair:
            self._open.setdefault(key)
        else:
            self._open.pop(key, None)
        given = min(len(self._by_pair[key]), self.people_per_pair) if key in self._pairs else 0
        self._given += given - self._counted.get(key, 0)
        self._counted[key] = given

    def _settled(self, key: bytes) -> bool:
        return len(self._by_pair[key]) >= self.people_per_pair

    def _remember(self, vote: Vote) -> None:
        self._votes[vote.lease] = vote
        self._by_person[vote.person].append(vote)
        if not vote.repeat:
            self._by_pair[vote.pair].append(vote)
        self._refresh(vote.pair)

    def _forget(self, vote: Vote) -> None:
        del self._votes[vote.lease]
        self._by_person[vote.person].remove(vote)
        if not vote.repeat:
            self._by_pair[vote.pair].remove(vote)
        self._refresh(vote.pair)


def _label(choice: Choice, swapped: bool) -> Label:
    if choice in ("tie", "skip"):
        return 0.5 if choice == "tie" else None
    return float((choice == "left") != swapped)
