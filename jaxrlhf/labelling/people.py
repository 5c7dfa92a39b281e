"""What votes say together: majorities, and how far people agree with each other, with themselves and with a model."""

import collections
import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from jaxrlhf.annotation.journal_file import Label
from jaxrlhf.labelling.store import Vote

CLEAR_PAIRS = 10
"""What is believed of people before they labelled any pair twice: that they labelled so many clear ones alike."""


def majority(labels: Sequence[Label]) -> Label:
    """Returns 1 or 0 by which completion more people preferred, 1/2 if as many preferred either, None without labels."""
    given = [label for label in labels if label is not None]
    if not given:
        return None
    mean = statistics.fmean(given)
    return 0.5 if mean == 0.5 else float(mean > 0.5)


def agrees(vote: Vote) -> bool | None:
    """Returns whether a decided label agrees with the forecast; None where either says nothing."""
    if vote.forecast is None or vote.forecast == 0.5 or vote.label in (None, 0.5):
        return None
    return (vote.forecast > 0.5) == (vote.label > 0.5)


def agreement(votes: Iterable[Vote]) -> dict[str, int]:
    """Returns how many decided labels had a forecast (`forecast`), and on how many of them it agreed (`agreed`)."""
    known = [agrees(vote) for vote in votes if not vote.repeat]
    return {"forecast": sum(each is not None for each in known), "agreed": sum(each is True for each in known)}


def consistency(votes: Iterable[Vote]) -> dict[str, int]:
    """Returns how many pairs a person labelled again (`repeated`), and how many of them alike (`same`).

    Args:
        votes: of one person, in order.
    """
    first: dict[bytes, Label] = {}
    repeated = same = 0
    for vote in votes:
        if vote.label is None:
            continue
        if vote.repeat and vote.pair in first:
            repeated, same = repeated + 1, same + int(first[vote.pair] == vote.label)
        elif not vote.repeat:
            first[vote.pair] = vote.label
    return {"repeated": repeated, "same": same}


def mistake_rate(votes: Iterable[Vote]) -> float:
    """Returns the probability that a person's preference is a mistake, from the pairs that they labelled twice.

    A person who errs with probability m prefers the first of a pair with q = m + (1 - 2 m) p, where p is the reward
    model's forecast, and labels it alike with q^2 + (1 - q)^2. The m in [0, 0.45] of highest likelihood is taken, as if
    `CLEAR_PAIRS` clear pairs had been labelled alike before: few repetitions move it little, and those of pairs that the
    reward model thinks close say nothing. All people count together; ties are left out.

    Args:
        votes: of everybody, in order.
    """
    first: dict[tuple[str, bytes], Vote] = {}
    seen: list[tuple[float, bool]] = [(1.0, True)] * CLEAR_PAIRS
    for vote in votes:
        if vote.label in (None, 0.5):
            continue
        before = first.setdefault((vote.person, vote.pair), vote)
        if vote.repeat and before is not vote and vote.forecast is not None:
            seen.append((vote.forecast, before.label == vote.label))

    def log_likelihood(rate: float) -> float:
        total = 0.0
        for forecast, alike in seen:
            q = rate + (1 - 2 * rate) * forecast
            same = q * q + (1 - q) ** 2
            total += math.log(max(same if alike else 1 - same, 1e-12))
        return total

    return max((step / 100 for step in range(46)), key=log_likelihood)


def summary(votes: Sequence[Vote]) -> list[dict[str, Any]]:
    """Returns a row for each person, in the order of their first votes.

    `others` counts the votes of other people on the same pairs, `with_others` those of them that are alike.
    """
    by_person, by_pair = collections.defaultdict(list), collections.defaultdict(list)
    for vote in votes:
        by_person[vote.person].append(vote)
        if not vote.repeat and vote.label is not None:
            by_pair[vote.pair].append(vote)
    rows = []
    for number, own in enumerate(by_person.values(), 1):
        fresh = [vote for vote in own if not vote.repeat]
        others = [
            (vote.label, other.label)
            for vote in fresh
            if vote.label is not None
            for other in by_pair[vote.pair]
            if other.person != vote.person
        ]
        row: dict[str, Any] = {"person": f"person {number}", "labels": len(fresh)}
        row |= {"ties": sum(vote.label == 0.5 for vote in fresh), "skipped": sum(vote.label is None for vote in fresh)}
        row |= {"seconds": statistics.median(vote.seconds for vote in own)}
        row |= {**consistency(own), "others": len(others), "with_others": sum(a == b for a, b in others)}
        rows.append(row | agreement(own))
    return rows


def describe(votes: Sequence[Vote]) -> list[str]:
    """Returns a sentence on each person, and one on how far all of them agree with the reward model."""
    sentences = []
    for row in summary(votes):
        clauses = [f"{row['labels']} labels ({row['ties']} ties, {row['skipped']} skipped)"]
        clauses.append(f"{row['seconds']:.1f} s a label (median)")
        for count, same, words in (
            ("repeated", "same", "repeated pairs labelled alike"),
            ("others", "with_others", "labels of others on the same pairs alike"),
            ("forecast", "agreed", "labels as the reward model expected"),
        ):
            if row[count]:
                clauses.append(f"{row[same]} of {row[count]} {words}")
        sentences.append(f"{row['person'].capitalize()}: {', '.join(clauses)}.")
    return sentences + _halves(votes)


def _halves(votes: Sequence[Vote]) -> list[str]:
    """Returns a sentence on how far the reward model came to expect what people said."""
    known = [agreed for vote in votes if not vote.repeat and (agreed := agrees(vote)) is not None]
    if len(known) < 2:
        return []
    parts = known[: len(known) // 2], known[len(known) // 2 :]
    early, late = (f"{sum(part)} of {len(part)}" for part in parts)
    return [
        f"The reward model at hand expected {sum(known)} of {len(known)} decided labels "
        f"({sum(known) / len(known):.0%}): {early} in the first half, {late} in the second."
    ]
