"""From records to token rows of bounded length; what is cut or left out is counted.

    fitted = fit_pairs(codec, records, max_length=512)
    print(described(fitted))    # 2,300 rows of 5 to 512 tokens; 10 cut to fit; 2 dropped (prompt of 512 tokens or more)

What is too long loses its end, and with it the end of text, so that nothing learns to stop there.
"""

import collections
import itertools
from collections.abc import Iterator
from typing import Generic, NamedTuple, Protocol, TypeVar

import numpy as np

from jaxrlhf.data.encode import Codec, Encoded, encode, encode_prompt
from jaxrlhf.data.records import DataError, Demonstration, Judged, Preference, Prompt, Ranked, Record, Text


class Source(Protocol):
    """Records by number: a list, or a split of `builders.Prepared`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Record: ...


class Dropped(NamedTuple):
    """The number of a record, from 0, and why it makes no row; of a pair, the record of its first text."""

    number: int
    reason: str


class PairRow(NamedTuple):
    """Two completions of a prompt; `label` is 1 where the first is better, 1/2 in a tie; `margin` is 0 if none is told."""

    first: Encoded
    second: Encoded
    label: float
    margin: float


Row = TypeVar("Row", Encoded, PairRow, np.ndarray)


class Fitted(NamedTuple, Generic[Row]):
    """Rows in the order of the records, how many of them lost tokens, and what makes no row."""

    rows: list[Row]
    shortened: int
    dropped: list[Dropped]


def fit_demonstrations(codec: Codec, records: Source, *, max_length: int) -> Fitted[Encoded]:
    """Returns texts to imitate: of demonstrations, the chosen ones of preferences, and completions that were called good.

    A record makes one row or one entry of `dropped`. A text is cut at its end. A text's first token cannot be learned, as
    nothing stands before it; where no other is left to learn, the record is dropped.

    Raises:
        DataError: a record is of another kind, or no row is left.
        ValueError: `max_length` is below 2.
    """
    _check(max_length)
    rows, shortened, dropped = [], 0, []
    for number, record in _numbered(records, (Demonstration, Preference, Judged), "demonstrations"):
        try:
            whole = _good(codec, record)
            rows.append(_demonstration(whole, max_length))
        except ValueError as error:
            dropped.append(Dropped(number, str(error)))
        else:
            shortened += len(whole.tokens) > max_length
    return _nonempty(Fitted(rows, shortened, dropped), "demonstrations")


def fit_pairs(codec: Codec, records: Source, *, max_length: int, cut_prompts: bool = False) -> Fitted[PairRow]:
    """Returns pairs of completions, the better one first.

    A preference is one pair. A ranking is every pair of its completions, equal ranks with the label 1/2. Of judged
    completions, every good one stands against every bad one of the same prompt; these pairs come last, and a record that
    has no opponent is dropped. Every pair makes one row or one entry of `dropped`.

    Completions are cut at their end, prompts are not. A pair is dropped where no token of a completion is left, or where
    the two are the same.

    Args:
        codec: of the model.
        records: preferences, rankings or judged completions.
        max_length: of a text, in tokens.
        cut_prompts: takes tokens from the beginning of a prompt, behind the token that begins a text and as many in both
            rows, until a completion keeps its tokens or `max_length // 2` of them.

    Raises:
        DataError: a record is of another kind, or no row is left.
        ValueError: `max_length` is below 2.
    """
    _check(max_length)
    rows, shortened, dropped = [], 0, []
    for contest in _contests(records, dropped):
        texts = [_tried(codec, contest.prompt, completion) for _, completion in contest.completions]
        for one, other, label, margin in contest.pairs:
            try:
                whole = _compared(texts[one], texts[other])
                fitted = _pair(whole, max_length, codec.bos, cut_prompts)
            except ValueError as error:
                dropped.append(Dropped(contest.completions[one][0], str(error)))
            else:
                rows.append(PairRow(*fitted, label, margin))
                shortened += any(len(text.tokens) > max_length for text in whole)
    return _nonempty(Fitted(rows, shortened, dropped), "pairs")


def fit_prompts(codec: Codec, records: Source, *, max_length: int, cut_prompts: bool = False) -> Fitted[np.ndarray]:
    """Returns the prompts of records of any kind, each an array `[P]` int32, for sampling.

    A record makes one row or one entry of `dropped`. A prompt that is kept already is dropped as one that occurs again;
    a whole text, which has no prompt, is dropped. A prompt that is too long is dropped, or with `cut_prompts` loses its
    beginning, behind the token that begins a text.

    Raises:
        DataError: no row is left.
        ValueError: `max_length` is below 2.
    """
    _check(max_length)
    rows, shortened, dropped, kept = [], 0, [], set()
    for number, record in _numbered(records, (Prompt, Demonstration, Preference, Ranked, Judged), "prompts"):
        try:
            if record.prompt in kept:
                raise ValueError("prompt occurs again")
            if isinstance(record, Demonstration) and not record.prompt:
                raise ValueError("a whole text without a prompt")
            tokens = encode_prompt(codec, record.prompt)
            if not len(tokens):
                raise ValueError("prompt without tokens")
            if len(tokens) > max_length and not cut_prompts:
                raise ValueError(f"prompt of more than {max_length} tokens")
        except ValueError as error:
            dropped.append(Dropped(number, str(error)))
            continue
        begin, surplus = _begins(tokens, codec.bos), max(0, len(tokens) - max_length)
        kept.add(record.prompt)
        rows.append(np.delete(tokens, np.s_[begin : begin + surplus]))
        shortened += surplus > 0
    return _nonempty(Fitted(rows, shortened, dropped), "prompts")


def described(fitted: Fitted) -> str:
    """Returns one line on how many rows there are, of which lengths in tokens, and what was cut and dropped."""
    lengths = [row_length(row) for row in fitted.rows]
    parts = [
        f"{len(lengths):,} {'row' if len(lengths) == 1 else 'rows'} of {min(lengths):,} to {max(lengths):,} tokens"
    ]
    if fitted.shortened:
        parts.append(f"{fitted.shortened:,} cut to fit")
    if fitted.dropped:
        parts.append(f"{len(fitted.dropped):,} dropped ({_reasons(fitted.dropped)})")
    return "; ".join(parts)


def row_length(row: Encoded | PairRow | np.ndarray) -> int:
    """Returns the tokens of a row, of a pair those of the longer text."""
    if isinstance(row, PairRow):
        return max(len(row.first.tokens), len(row.second.tokens))
    return len(row.tokens) if isinstance(row, Encoded) else len(row)


class _Contest(NamedTuple):
    """Completions of one prompt with their records' numbers, and pairs of them: places, label and margin."""

    prompt: Text
    completions: list[tuple[int, Text]]
    pairs: list[tuple[int, int, float, float]]


def _contests(records: Source, dropped: list[Dropped]) -> Iterator[_Contest]:
    """Yields what is to be compared, and appends the judged records that have no opponent to `dropped`."""
    judged: dict[Text, list[tuple[int, Judged]]] = {}
    for number, record in _numbered(records, (Preference, Ranked, Judged), "pairs"):
        if isinstance(record, Preference):
            texts = [(number, record.chosen), (number, record.rejected)]
            yield _Contest(record.prompt, texts, [(0, 1, 1.0, record.margin or 0.0)])
        elif isinstance(record, Ranked):
            ranked = sorted(zip(record.ranks, record.completions, strict=True), key=lambda entry: entry[0])
            places = itertools.combinations(range(len(ranked)), 2)
            pairs = [(one, other, 1.0 if ranked[one][0] < ranked[other][0] else 0.5, 0.0) for one, other in places]
            yield _Contest(record.prompt, [(number, text) for _, text in ranked], pairs)
        elif isinstance(record, Judged):
            judged.setdefault(record.prompt, []).append((number, record))
    for prompt, group in judged.items():
        good, bad = ([place for place, (_, each) in enumerate(group) if each.good is kind] for kind in (True, False))
        if not good or not bad:
            reason = f"no {'bad' if good else 'good'} completion of the same prompt"
            dropped.extend(Dropped(number, reason) for number, _ in group)
        pairs = [(one, other, 1.0, 0.0) for one in good for other in bad]
        yield _Contest(prompt, [(number, each.completion) for number, each in group] if pairs else [], pairs)


# What follows raises ValueError with the reason for which a record or a pair is dropped.


def _good(codec: Codec, record: Record) -> Encoded:
    if isinstance(record, Preference):
        return encode(codec, record.prompt, record.chosen)
    assert isinstance(record, Demonstration | Judged)
    if isinstance(record, Judged) and not record.good:
        raise ValueError("called bad")
    return encode(codec, record.prompt, record.completion)


def _demonstration(whole: Encoded, max_length: int) -> Encoded:
    if not whole.completion[1:].any():
        raise ValueError("nothing to learn")
    row = _cut(whole, max_length)
    if not row.completion[1:].any():
        raise ValueError(f"prompt of {max_length} tokens or more")
    return row


def _tried(codec: Codec, prompt: Text, completion: Text) -> Encoded | ValueError:
    # The error is kept: every pair of this text is to be counted.
    try:
        found = encode(codec, prompt, completion)
        return found if found.completion.any() else ValueError("a completion without tokens")
    except ValueError as error:
        return error


def _compared(*texts: Encoded | ValueError) -> tuple[Encoded, Encoded]:
    for text in texts:
        if isinstance(text, ValueError):
            raise text
    first, second = (text for text in texts if isinstance(text, Encoded))
    if np.array_equal(first.tokens, second.tokens):
        raise ValueError("both completions are the same")
    return first, second


def _pair(whole: tuple[Encoded, Encoded], max_length: int, bos: int | None, cut_prompts: bool):
    begin = _begins(whole[0].tokens, bos)
    surplus = _surplus(whole, begin, max_length) if cut_prompts else 0
    first, second = (_cut(text, max_length, begin, surplus) for text in whole)
    if not (first.completion.any() and second.completion.any()):
        raise ValueError(f"prompt of {max_length} tokens or more")
    if np.array_equal(first.tokens, second.tokens):
        raise ValueError(f"both completions are the same in the first {max_length} tokens")
    return first, second


def _surplus(whole: tuple[Encoded, Encoded], begin: int, max_length: int) -> int:
    """Returns how many tokens of the prompt must go, behind `begin`."""
    # A tokenizer may join the end of a prompt to what follows, otherwise in each text: only what is before the first
    # token of both completions, and the same in both, is a prompt that they share.
    starts = [int(text.completion.argmax()) for text in whole]
    half = max_length // 2
    ends = [start + min(len(text.tokens) - start, half) for start, text in zip(starts, whole, strict=True)]
    surplus = max(0, max(ends) - max_length)
    first, second = (text.tokens[: begin + surplus] for text in whole)
    if begin + surplus > min(starts) or not np.array_equal(first, second):
        raise ValueError(
            f"prompt of {max_length} tokens or more, with too few to take away from both completions alike"
        )
    return surplus


def _cut(text: Encoded, max_length: int, begin: int = 0, surplus: int = 0) -> Encoded:
    """Takes `surplus` tokens away behind the first `begin`, and then what is behind `max_length`."""
    return Encoded(*(np.delete(part, np.s_[begin : begin + surplus])[:max_length] for part in text))


def _begins(tokens: np.ndarray, bos: int | None) -> int:
    return int(bos is not None and len(tokens) > 0 and tokens[0] == bos)


def _numbered(records: Source, kinds: tuple[type, ...], wanted: str) -> Iterator[tuple[int, Record]]:
    for number in range(len(records)):
        record = records[number]
        if not isinstance(record, kinds):
            names = " or ".join(kind.__name__ for kind in kinds)
            raise DataError(f"Record {number} is of the kind {type(record).__name__}; {wanted} are made of {names}.")
        yield number, record


def _nonempty(fitted: Fitted[Row], wanted: str) -> Fitted[Row]:
    if not fitted.rows:
        reasons = _reasons(fitted.dropped) or "there is no record"
        raise DataError(f"No {wanted} are left of the records ({reasons}); bring others, or raise the longest length.")
    return fitted


def _reasons(dropped: list[Dropped]) -> str:
    """Returns the reasons, the most frequent first, with their counts where there are several."""
    counts = collections.Counter(entry.reason for entry in dropped)
    if len(counts) == 1:
        return next(iter(counts))
    told = [f"{count:,} × {reason}" for reason, count in counts.most_common(3)]
    others = sum(count for _, count in counts.most_common()[3:])
    return "; ".join(told + ([f"{others:,} for other reasons"] if others else []))


def _check(max_length: int) -> None:
    if max_length < 2:
        raise ValueError(f"max_length must be at least 2, got {max_length}.")
