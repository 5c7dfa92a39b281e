"""Batches of token rows: what the losses and the sampler read, and how rows become one rectangle.

Shapes: N rows, T tokens, P tokens of a prompt.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxrlhf.data.encode import Encoded
from jaxrlhf.data.fitted import PairRow


class Demonstrations(NamedTuple):
    """Texts to imitate.

    Attributes:
        tokens: `[N, T]` int32.
        segments: `[N, T]` int32, k from 1 on the k-th text of a row, 0 on padding; texts must not see each other.
        learned: `[N, T]` bool, True on tokens whose prediction is to be learned, never on the first of a text.
    """

    tokens: np.ndarray
    segments: np.ndarray
    learned: np.ndarray


class Pairs(NamedTuple):
    """Pairs of texts, padded on the right.

    Attributes:
        tokens: `[N, 2, T]` int32.
        mask: `[N, 2, T]` bool, False on padding.
        completion: `[N, 2, T]` bool, True on the completion.
        labels: `[N]` float32, 1 where the first text is better, 1/2 in a tie.
        margins: `[N]` float32, 0 where none is told.
        weight: `[N]` float32, 1, and 0 on a row that only fills the batch.
    """

    tokens: np.ndarray
    mask: np.ndarray
    completion: np.ndarray
    labels: np.ndarray
    margins: np.ndarray
    weight: np.ndarray


class PromptRows(NamedTuple):
    """Prompts, padded on the left: tokens `[N, P]` int32, and mask `[N, P]` bool, False on padding."""

    tokens: np.ndarray
    mask: np.ndarray


def padded_demonstrations(rows: Sequence[Encoded], length: int) -> Demonstrations:
    """Returns rows of one text each, `length` tokens long.

    Raises:
        ValueError: a row is longer.
    """
    tokens, mask = rectangle([row.tokens for row in rows], length)
    return Demonstrations(tokens, mask.astype(np.int32), rectangle([learned_of(row) for row in rows], length)[0])


def padded_pairs(rows: Sequence[PairRow], length: int) -> Pairs:
    """Returns pairs of texts, each `length` tokens long.

    Raises:
        ValueError: a text is longer.
    """
    texts = [text for row in rows for text in (row.first, row.second)]
    tokens, mask = rectangle([text.tokens for text in texts], length)
    completion, _ = rectangle([text.completion for text in texts], length)
    tokens, mask, completion = (each.reshape(len(rows), 2, length) for each in (tokens, mask, completion))
    labels, margins = (np.array(values, np.float32) for values in zip(*(row[2:] for row in rows), strict=True))
    return Pairs(tokens, mask, completion, labels, margins, np.ones(len(rows), np.float32))


def padded_prompts(rows: Sequence[np.ndarray], length: int) -> PromptRows:
    """Returns prompts, `length` tokens long.

    Raises:
        ValueError: a prompt is longer.
    """
    return PromptRows(*rectangle(rows, length, left=True))


def learned_of(row: Encoded) -> np.ndarray:
    """Returns which tokens `[T]` of a text are to be learned: its completion's, but not the first, which nothing tells."""
    return row.completion & (np.arange(len(row.tokens)) > 0)


def rectangle(rows: Sequence[np.ndarray], length: int, *, left: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Returns arrays `[T_n]` as one `[N, length]`, zeros behind each (before, if `left`), and True on what is theirs."""
    longest = max(map(len, rows))
    if longest > length:
        raise ValueError(f"A row has {longest} tokens, more than {length}.")
    found, mask = np.zeros((len(rows), length), rows[0].dtype), np.zeros((len(rows), length), bool)
    for number, row in enumerate(rows):
        place = length - len(row) if left else 0
        found[number, place : place + len(row)] = row
        mask[number, place : place + len(row)] = True
    return found, mask
