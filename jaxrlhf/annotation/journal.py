"""Labels cost money: a journal on disk keeps each answer from the moment it comes, so that it is paid for once.

    annotate = journaled(annotate, pathlib.Path("labels.sqlite"), "our annotators, 2nd round")

Only what is not in the journal is asked for. After a restart a training step samples the same pairs from the same key, so
its questions are found.

No answer leads to another question before it is on the disk; `journal_file` says how.
"""

import collections
import contextlib
import hashlib
import math
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from jaxrlhf.annotation.journal_file import Answer, Journal

Answers = Sequence[Answer] | Iterator[tuple[int, Answer]]


class Counts(NamedTuple):
    """What came of the questions that were put to a journaled annotator.

    Attributes:
        asked: answered by the annotator, and so paid for.
        found: answered by the journal, or by another answer of the same call.
        skipped: of those asked, the ones that the annotator would not answer.
    """

    asked: int = 0
    found: int = 0
    skipped: int = 0


def question_key(name: str, prompt: str, first: str, second: str, draw: int = 0) -> bytes:
    """Returns the SHA-256 digest of a question, its fields told apart by their lengths.

    Args:
        name: of the annotator: whatever would change its answers should change its name.
        prompt: text.
        first: the answer that is shown first.
        second: the one that is shown second.
        draw: how often this same question was put before in the same call.
    """
    digest = hashlib.sha256()
    for field in (name, prompt, first, second, str(draw)):
        # Texts of people may hold lone surrogates, which plain UTF-8 refuses.
        written = field.encode("utf-8", "surrogatepass")
        digest.update(len(written).to_bytes(8, "big") + written)
    return digest.digest()


class Journaled:
    """An annotator of texts that asks only for what is not in its journal.

    Attributes:
        journal: where answers are.
        counts: what came of all questions so far.
    """

    def __init__(
        self, annotate: Callable[..., Answers], journal: Journal, name: str, *, num_draws: bool, at_once: int | None
    ):
        """See `journaled`."""
        if at_once is not None and at_once < 1:
            raise ValueError(f"At least one question is put at once, not {at_once}.")
        self.journal, self.counts = journal, Counts()
        self._annotate, self._name, self._draws, self._at_once = annotate, name, num_draws, at_once

    def __call__(self, prompts: Sequence[str], firsts: Sequence[str], seconds: Sequence[str]) -> list[Answer]:
        """Returns an answer for each question; what is missing is asked for, once.

        Raises:
            ValueError: answers are too few, or no labels.
            Exception: whatever the annotator raises; the answers before it are kept.
        """
        questions = list(zip(prompts, firsts, seconds, strict=True))
        keys = self._keys(questions)
        answers = self.journal.find(set(keys))
        missing = {key: question for key, question in zip(keys, questions, strict=True) if key not in answers}
        self._add(found=len(keys) - len(missing))
        wanted = list(missing)
        width = self._at_once or max(1, len(wanted))
        for start in range(0, len(wanted), width):
            part = wanted[start : start + width]
            columns = [list(column) for column in zip(*(missing[key] for key in part), strict=True)]
            given = self._annotate(*columns)
            # Closed at once where an answer cannot be kept, so that none is bought in vain.
            with contextlib.ExitStack() as end:
                end.callback(getattr(given, "close", lambda: None))
                for index, answer in _one_by_one(given, len(part), self._name):
                    answers[part[index]] = self.journal.keep(part[index], answer)
                    self._add(asked=1, skipped=int(answer is None))
        return [answers[key] for key in keys]

    def known(self, prompts: Sequence[str], firsts: Sequence[str], seconds: Sequence[str]) -> list[bool]:
        """Returns for each question whether the journal holds its answer; asks nothing."""
        keys = self._keys(list(zip(prompts, firsts, seconds, strict=True)))
        held = self.journal.find(set(keys))
        return [key in held for key in keys]

    def _keys(self, questions: list[tuple[str, str, str]]) -> list[bytes]:
        before, keys = collections.Counter(), []
        for question in questions:
            keys.append(question_key(self._name, *question, before[question] if self._draws else 0))
            before[question] += 1
        return keys

    def _add(self, **more: int) -> None:
        self.counts = self.counts._replace(**{name: getattr(self.counts, name) + by for name, by in more.items()})


def journaled(
    annotate: Callable[..., Answers],
    journal: Journal | str | pathlib.Path | None,
    name: str,
    *,
    num_draws: bool = True,
    at_once: int | None = None,
) -> Journaled:
    """Returns the annotator `(prompts, firsts, seconds) -> answers` with a journal before it.

    Args:
        annotate: returns all answers together; or an iterator of `(index, answer)` in any order, each of which is kept
            before the next is drawn, so that what came before an exception stays.
        journal: or its path; None is one in memory.
        name: of the annotator, a part of every key. Two that may differ must not share a name.
        draws: whether a question that is put again in one call is another draw, with an answer of its own, as one asks
            several people. False for an annotator that answers alike, which is then asked once.
        at_once: questions that are put together, otherwise all; a smaller number loses less where an annotator that
            returns all answers together fails.

    Raises:
        ValueError: the journal cannot be opened.
    """
    opened = journal if isinstance(journal, Journal) else Journal(journal)
    return Journaled(annotate, opened, name, num_draws=num_draws, at_once=at_once)


def _one_by_one(given: Any, count: int, name: str) -> Iterator[tuple[int, Answer]]:
    """Yields each answer with its index, whether they came together or one by one."""
    if not isinstance(given, Iterator):
        try:
            together = list(given)
        except TypeError:
            raise ValueError(f"{name} did not give a list of answers but {given!r:.100}.") from None
        if len(together) != count:
            raise ValueError(f"{name} gave {len(together)} answers to {count} questions; give one to each.")
        yield from ((index, _label(answer, name)) for index, answer in enumerate(together))
        return
    left = set(range(count))
    for item in given:
        if not (isinstance(item, tuple) and len(item) == 2 and item[0] in left):
            raise ValueError(f"{name} gave {item!r:.100}; one by one, each answer is (index, answer), and comes once.")
        left.remove(item[0])
        yield int(item[0]), _label(item[1], name)
    if left:
        raise ValueError(f"{name} gave {count - len(left)} answers to {count} questions; give one to each.")


def _label(answer: Any, name: str) -> Answer:
    try:
        label = None if answer is None else float(answer)
    except (TypeError, ValueError):
        raise ValueError(f"{name} answered {answer!r:.100}; a label is 1, 0, 1/2 or None.") from None
    # Not a number is no answer, as it is to `host_annotator`.
    if label is None or math.isnan(label):
        return None
    if not 0 <= label <= 1:
        raise ValueError(f"{name} answered {label:g}; a label is 1, 0, 1/2 or None.")
    return label
