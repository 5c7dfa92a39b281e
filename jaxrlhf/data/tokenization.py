"""Records as token rows of bounded length; what is truncated or dropped is counted.

    tokenized = tokenize_pairs(tokenizer, records, max_length=512)
    print(describe_rows(tokenized))    # 2,300 rows of 5 to 512 tokens; 10 truncated; 2 dropped (duplicate prompt)

Texts that are too long are truncated at their end, which removes the end-of-text token, so that a model does not learn to
stop there.
"""

import collections
from typing import Generic, NamedTuple, TypeVar

import numpy as np

from jaxrlhf.data.encode import ChatTokenizer, Encoded, encode, encode_prompt, up_to_end
from jaxrlhf.data.records import (
    DataError,
    Demonstration,
    Preference,
    Prompt,
    Ranking,
    Record,
    Text,
    UnpairedPreference,
    texts_of,
)
from jaxrlhf.data.sources import Dropped, Source, checked, comparisons
from jaxrlhf.data.unwritten import Unwritten


class PairRow(NamedTuple):
    """Two completions of a prompt; `label` is 1 if the first is better, 1/2 for a tie; `margin` is 0 if there is none."""

    first: Encoded
    second: Encoded
    label: float
    margin: float


Row = TypeVar("Row", Encoded, PairRow, np.ndarray)


class TokenizedRows(NamedTuple, Generic[Row]):
    """Rows in the order of the records, and what became of the rest.

    Attributes:
        rows: of tokens.
        truncated: the number of rows that were truncated.
        dropped: the records without a row.
        unwritten: what records have that the chat template writes for none, such as a key of messages, with their number.
    """

    rows: list[Row]
    truncated: int
    dropped: list[Dropped]
    unwritten: dict[str, int] = {}  # noqa: RUF012


def tokenize_demonstrations(tokenizer: ChatTokenizer, records: Source, *, max_length: int) -> TokenizedRows[Encoded]:
    """Returns demonstrations: those of the data, the chosen texts of preferences, and completions labelled desirable.

    Every record makes one row or one entry of `dropped`. A text is truncated at its end. A text's first token is never in
    the loss, as nothing precedes it; a record without any other token in the loss is dropped.

    Raises:
        DataError: a record is of another kind, or no row is left.
        ValueError: `max_length` is below 2.
    """
    _check_max_length(max_length)
    rows, truncated, dropped, unwritten = [], 0, [], Unwritten(tokenizer.template)
    for index, record in checked(records, (Demonstration, Preference, UnpairedPreference), "demonstrations"):
        unwritten.add(_whole_texts(*texts_of(record)))
        try:
            text = _desirable_text(tokenizer, record)
            rows.append(_truncated_demonstration(text, max_length))
        except ValueError as error:
            dropped.append(Dropped(index, str(error)))
        else:
            truncated += len(text.tokens) > max_length
    return _non_empty(TokenizedRows(rows, truncated, dropped, unwritten.counts()), "demonstrations")


def tokenize_pairs(
    tokenizer: ChatTokenizer, records: Source, *, max_length: int, cut_prompts: bool = False
) -> TokenizedRows[PairRow]:
    """Returns pairs of completions, the better one first.

    A preference is one pair. A ranking makes every pair of its completions, with the label 1/2 for equal ranks. Among
    unpaired preferences, every desirable completion is paired with every undesirable one of the same prompt; these pairs
    come last, and a record without a counterpart is dropped. Every pair makes one row or one entry of `dropped`.

    Completions are truncated at their end, prompts are not. A pair is dropped if a completion has no token left, or if the
    two are equal.

    Args:
        tokenizer: the model's.
        records: preferences, rankings or unpaired preferences.
        max_length: of a text, in tokens.
        cut_prompts: removes tokens from the beginning of a prompt (after BOS; as many in both texts), until each
            completion keeps all its tokens or `max_length // 2` of them.

    Raises:
        DataError: a record is of another kind, or no row is left.
        ValueError: `max_length` is below 2.
    """
    _check_max_length(max_length)
    rows, truncated, dropped, unwritten = [], 0, [], Unwritten(tokenizer.template)
    for group in comparisons(records, dropped):
        for index in {index for index, _ in group.completions}:
            own = [completion for other, completion in group.completions if other == index]
            unwritten.add(_whole_texts(group.prompt, *own))
        encoded = [_encode_or_error(tokenizer, group.prompt, completion) for _, completion in group.completions]
        for first, second, label, margin in group.pairs:
            try:
                texts = _distinct(encoded[first], encoded[second])
                row = PairRow(*_truncated_pair(texts, max_length, tokenizer.bos, cut_prompts), label, margin)
            except ValueError as error:
                dropped.append(Dropped(group.completions[first][0], str(error)))
            else:
                rows.append(row)
                truncated += any(len(text.tokens) > max_length for text in texts)
    return _non_empty(TokenizedRows(rows, truncated, dropped, unwritten.counts()), "pairs")


def tokenize_prompts(
    tokenizer: ChatTokenizer, records: Source, *, max_length: int, cut_prompts: bool = False
) -> TokenizedRows[np.ndarray]:
    """Returns the prompts of records of any kind, each an array `[P]` int32, for sampling.

    Every record makes one row or one entry of `dropped`. Duplicates are dropped, and so are whole texts without a prompt.
    A prompt that is too long is dropped, or with `cut_prompts` truncated at its beginning (after BOS).

    Raises:
        DataError: no row is left.
        ValueError: `max_length` is below 2.
    """
    _check_max_length(max_length)
    rows, truncated, dropped, seen, unwritten = [], 0, [], set(), Unwritten(tokenizer.template)
    kinds = (Prompt, Demonstration, Preference, Ranking, UnpairedPreference)
    for index, record in checked(records, kinds, "prompts"):
        unwritten.add([record.prompt])
        try:
            if record.prompt in seen:
                raise ValueError("duplicate prompt")
            if isinstance(record, Demonstration) and not record.prompt:
                raise ValueError("a whole text without a prompt")
            tokens = encode_prompt(tokenizer, record.prompt)
            if not len(tokens):
                raise ValueError("prompt without tokens")
            if len(tokens) > max_length and not cut_prompts:
                raise ValueError(f"prompt of more than {max_length} tokens")
        except ValueError as error:
            dropped.append(Dropped(index, str(error)))
            continue
        start, excess = _bos_length(tokens, tokenizer.bos), max(0, len(tokens) - max_length)
        seen.add(record.prompt)
        rows.append(np.delete(tokens, np.s_[start : start + excess]))
        truncated += excess > 0
    return _non_empty(TokenizedRows(rows, truncated, dropped, unwritten.counts()), "prompts")


def describe_rows(tokenized: TokenizedRows) -> str:
    """Returns one line: how many rows there are, their lengths in tokens, and what was dropped."""
    lengths = [row_length(row) for row in tokenized.rows]
    parts = [
        f"{len(lengths):,} {'row' if len(lengths) == 1 else 'rows'} of {min(lengths):,} to {max(lengths):,} tokens"
    ]
    if tokenized.truncated:
        parts.append(f"{tokenized.truncated:,} truncated")
    if tokenized.dropped:
        parts.append(f"{len(tokenized.dropped):,} dropped ({_reasons(tokenized.dropped)})")
    if tokenized.unwritten:
        counts = describe_counts(tokenized.unwritten)
        parts.append(f"not written by the chat template: {counts}")
    return "; ".join(parts)


def describe_counts(counts: dict[str, int]) -> str:
    """Returns names with their counts, the most frequent first; beyond twelve only how many there are."""
    parts = [f"{name} ({count:,})" for name, count in sorted(counts.items(), key=lambda entry: (-entry[1], entry[0]))]
    return ", ".join(parts[:12]) + (f" and {len(parts) - 12:,} others" if len(parts) > 12 else "")


def row_length(row: Encoded | PairRow | np.ndarray) -> int:
    """Returns the number of tokens of a row; of a pair, that of the longer text."""
    if isinstance(row, PairRow):
        return max(len(row.first.tokens), len(row.second.tokens))
    return len(row.tokens) if isinstance(row, Encoded) else len(row)


# The functions below raise ValueError with the reason for which a record or a pair is dropped.


def _desirable_text(tokenizer: ChatTokenizer, record: Record) -> Encoded:
    if isinstance(record, Preference):
        return encode(tokenizer, record.prompt, record.chosen)
    assert isinstance(record, Demonstration | UnpairedPreference)
    if isinstance(record, UnpairedPreference) and not record.label:
        raise ValueError("labelled undesirable")
    return encode(tokenizer, record.prompt, record.completion)


def _truncated_demonstration(text: Encoded, max_length: int) -> Encoded:
    if not text.completion_mask[1:].any():
        raise ValueError("nothing to learn")
    row = _truncate(text, max_length)
    if not row.completion_mask[1:].any():
        raise ValueError(f"prompt of {max_length} tokens or more")
    return row


def _encode_or_error(tokenizer: ChatTokenizer, prompt: Text, completion: Text) -> Encoded | ValueError:
    # The error is returned, not raised, so that every pair of this text is counted.
    try:
        text = up_to_end(encode(tokenizer, prompt, completion))
        return text if text.completion_mask.any() else ValueError("a completion without tokens")
    except ValueError as error:
        return error


def _distinct(*texts: Encoded | ValueError) -> tuple[Encoded, Encoded]:
    for text in texts:
        if isinstance(text, ValueError):
            raise text
    first, second = (text for text in texts if isinstance(text, Encoded))
    if np.array_equal(first.tokens, second.tokens):
        raise ValueError("both completions are the same")
    return first, second


def _truncated_pair(
    texts: tuple[Encoded, Encoded], max_length: int, bos: int | None, cut_prompts: bool
) -> tuple[Encoded, Encoded]:
    start = _bos_length(texts[0].tokens, bos)
    excess = _prompt_excess(texts, start, max_length) if cut_prompts else 0
    first, second = (_truncate(text, max_length, start, excess) for text in texts)
    if not (first.completion_mask.any() and second.completion_mask.any()):
        raise ValueError(f"prompt of {max_length} tokens or more")
    if np.array_equal(first.tokens, second.tokens):
        raise ValueError(f"both completions are the same in the first {max_length} tokens")
    return first, second


def _prompt_excess(texts: tuple[Encoded, Encoded], start: int, max_length: int) -> int:
    """Returns how many prompt tokens to remove after `start`."""
    # A tokenizer may merge the end of the prompt with what follows, differently in each text: only tokens that precede
    # both completions and are equal in both texts are a shared prompt.
    completion_starts = [int(text.completion_mask.argmax()) for text in texts]
    half = max_length // 2
    needed = [at + min(len(text.tokens) - at, half) for at, text in zip(completion_starts, texts, strict=True)]
    excess = max(0, max(needed) - max_length)
    first, second = (text.tokens[: start + excess] for text in texts)
    if start + excess > min(completion_starts) or not np.array_equal(first, second):
        raise ValueError(
            f"prompt of {max_length} tokens or more, with too few to take away from both completions alike"
        )
    return excess


def _truncate(text: Encoded, max_length: int, start: int = 0, excess: int = 0) -> Encoded:
    """Removes `excess` tokens after the first `start`, then those beyond `max_length`."""
    return Encoded(*(np.delete(part, np.s_[start : start + excess])[:max_length] for part in text))


def _bos_length(tokens: np.ndarray, bos: int | None) -> int:
    return int(bos is not None and len(tokens) > 0 and tokens[0] == bos)


def _whole_texts(prompt: Text, *completions: Text) -> list[Text]:
    return [prompt + text for text in completions if isinstance(prompt, tuple) and isinstance(text, tuple)]


def _non_empty(tokenized: TokenizedRows[Row], rows: str) -> TokenizedRows[Row]:
    if not tokenized.rows:
        reasons = _reasons(tokenized.dropped) or "there is no record"
        # The lengths are flags of the commands that call this.
        remedy = (
            "raise --max-length (--max-prompt of align), or bring shorter ones"
            if "tokens" in reasons
            else "bring others"
        )
        raise DataError(f"No {rows} are left of the records ({reasons.removesuffix('.')}); {remedy}.")
    return tokenized


def _reasons(dropped: list[Dropped]) -> str:
    """Returns the reasons, the most frequent first, with their counts if there are several."""
    counts = collections.Counter(entry.reason for entry in dropped)
    if len(counts) == 1:
        return next(iter(counts))
    parts = [f"{count:,} × {reason}" for reason, count in counts.most_common(3)]
    others = sum(count for _, count in counts.most_common()[3:])
    return "; ".join(parts + ([f"{others:,} for other reasons"] if others else []))


def _check_max_length(max_length: int) -> None:
    if max_length < 2:
        raise ValueError(
            f"max_length must be at least 2, got {max_length}; raise --max-length (--max-prompt of align)."
        )
