"""Labels cost money: a journal on disk stores each one as it arrives, so that none is paid for twice.

    annotate = journaled(annotate, pathlib.Path("labels.sqlite"), "our annotators, 2nd round")

Only pairs that are not in the journal are sent to the annotator. A restarted training step samples the same pairs from the
same key, so its labels are found.

Each label is on disk before the next pair is sent; `journal_file` says how.
"""

import collections
import contextlib
import hashlib
import math
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from jaxrlhf.annotation.journal_file import Journal, Label

Labels = Sequence[Label] | Iterator[tuple[int, Label]]


class Counts(NamedTuple):
    """Where a journaled annotator's labels came from.

    Attributes:
        asked: pairs sent to the annotator, and so paid for.
        found: pairs whose label was in the journal, or that repeat a pair of the same call.
        skipped: of those asked, pairs that the annotator returned None for.
    """

    asked: int = 0
    found: int = 0
    skipped: int = 0


def question_key(name: str, prompt: str, first: str, second: str, draw: int = 0) -> bytes:
    """Returns the SHA-256 digest of a question: a pair in an order, with every field prefixed by its length.

    Args:
        name: of the annotator; change it whenever the annotator's labels may change.
        prompt: text.
        first: the completion shown first.
        second: the completion shown second.
        draw: how many times the same question occurs earlier in the same call.
    """
    digest = hashlib.sha256()
    for field in (name, prompt, first, second, str(draw)):
        # User text may contain lone surrogates, which plain UTF-8 rejects.
        encoded = field.encode("utf-8", "surrogatepass")
        digest.update(len(encoded).to_bytes(8, "big") + encoded)
    return digest.digest()


class Journaled:
    """An annotator of texts that asks only for labels missing from its journal.

    Attributes:
        journal: where labels are stored.
        counts: where the labels came from so far.
    """

    def __init__(
        self,
        annotate: Callable[..., Labels],
        journal: Journal,
        name: str,
        *,
        independent_repeats: bool,
        batch_size: int | None,
        keep_none: bool,
    ):
        """See `journaled`."""
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
        self.journal, self.counts = journal, Counts()
        self._annotate, self._name, self._batch_size = annotate, name, batch_size
        self._independent_repeats, self._keep_none = independent_repeats, keep_none

    def __call__(self, prompts: Sequence[str], firsts: Sequence[str], seconds: Sequence[str]) -> list[Label]:
        """Returns a label for each pair; those not in the journal are asked for, once.

        Raises:
            ValueError: there are too few labels, or values that are no labels.
            Exception: whatever the annotator raises; labels obtained before it are kept.
        """
        questions = list(zip(prompts, firsts, seconds, strict=True))
        keys = self._keys(questions)
        labels = self._find(set(keys))
        missing = {key: question for key, question in zip(keys, questions, strict=True) if key not in labels}
        self._add(found=len(keys) - len(missing))
        missing_keys = list(missing)
        batch_size = self._batch_size or max(1, len(missing_keys))
        for start in range(0, len(missing_keys), batch_size):
            batch = missing_keys[start : start + batch_size]
            columns = [list(column) for column in zip(*(missing[key] for key in batch), strict=True)]
            result = self._annotate(*columns)
            # Closes the iterator as soon as a label cannot be stored, so that no more are bought in vain.
            with contextlib.ExitStack() as stack:
                stack.callback(getattr(result, "close", lambda: None))
                for index, label in _indexed_labels(result, len(batch), self._name):
                    kept = label is not None or self._keep_none
                    labels[batch[index]] = self.journal.keep(batch[index], label) if kept else None
                    self._add(asked=1, skipped=int(label is None))
        return [labels[key] for key in keys]

    def known(self, prompts: Sequence[str], firsts: Sequence[str], seconds: Sequence[str]) -> list[bool]:
        """Returns for each pair whether the journal has its label; asks for none."""
        keys = self._keys(list(zip(prompts, firsts, seconds, strict=True)))
        found = self._find(set(keys))
        return [key in found for key in keys]

    def _find(self, keys: set[bytes]) -> dict[bytes, Label]:
        found = self.journal.find(keys)
        return found if self._keep_none else {key: label for key, label in found.items() if label is not None}

    def _keys(self, questions: list[tuple[str, str, str]]) -> list[bytes]:
        repeats, keys = collections.Counter(), []
        for question in questions:
            keys.append(question_key(self._name, *question, repeats[question] if self._independent_repeats else 0))
            repeats[question] += 1
        return keys

    def _add(self, **counts: int) -> None:
        self.counts = self.counts._replace(**{name: getattr(self.counts, name) + n for name, n in counts.items()})


def journaled(
    annotate: Callable[..., Labels],
    journal: Journal | str | pathlib.Path | None,
    name: str,
    *,
    independent_repeats: bool = True,
    batch_size: int | None = None,
    keep_none: bool = True,
) -> Journaled:
    """Returns the annotator `(prompts, firsts, seconds) -> labels` with a journal in front of it.

    Args:
        annotate: returns all labels together; or an iterator of `(index, label)` in any order, each of which is stored
            before the next is requested, so that labels obtained before an exception are kept.
        journal: or its path; None is one in memory.
        name: of the annotator, part of every key. Annotators that may disagree must not share a name.
        independent_repeats: whether a pair repeated within one call gets a label of its own for each repeat, as when
            several people are asked. False for a deterministic annotator, which is then asked once.
        batch_size: pairs per call of `annotate`, by default all; with a smaller number less is lost when an annotator
            that returns all labels together fails.
        keep_none: whether None is an answer that was paid for. False for an annotator whose None may be mended: it is
            neither stored nor, where an earlier version stored it, found.

    Raises:
        ValueError: the journal cannot be opened.
    """
    opened = journal if isinstance(journal, Journal) else Journal(journal)
    return Journaled(
        annotate,
        opened,
        name,
        independent_repeats=independent_repeats,
        batch_size=batch_size,
        keep_none=keep_none,
    )


def _indexed_labels(result: Any, count: int, name: str) -> Iterator[tuple[int, Label]]:
    """Yields each label with its index, whether the annotator returned a list or an iterator."""
    if not isinstance(result, Iterator):
        try:
            labels = list(result)
        except TypeError:
            raise ValueError(f"{name} did not give a list of answers but {result!r:.100}.") from None
        if len(labels) != count:
            raise ValueError(f"{name} gave {len(labels)} answers to {count} questions; give one to each.")
        yield from ((index, _label(label, name)) for index, label in enumerate(labels))
        return
    remaining = set(range(count))
    for item in result:
        if not (isinstance(item, tuple) and len(item) == 2 and item[0] in remaining):
            raise ValueError(f"{name} gave {item!r:.100}; one by one, each answer is (index, answer), and comes once.")
        remaining.remove(item[0])
        yield int(item[0]), _label(item[1], name)
    if remaining:
        raise ValueError(f"{name} gave {count - len(remaining)} answers to {count} questions; give one to each.")


def _label(value: Any, name: str) -> Label:
    try:
        label = None if value is None else float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name} answered {value!r:.100}; a label is 1, 0, 1/2 or None.") from None
    # NaN is no label, as in `host_annotator`.
    if label is None or math.isnan(label):
        return None
    if not 0 <= label <= 1:
        raise ValueError(f"{name} answered {label:g}; a label is 1, 0, 1/2 or None.")
    return label
