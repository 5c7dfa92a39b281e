"""Batches of token rows, as the losses and the sampler read them, and padding.

Shapes: N rows, T tokens, P prompt tokens.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxrlhf.data.encode import Encoded
from jaxrlhf.data.tokenization import PairRow


class Demonstrations(NamedTuple):
    """Demonstrations for supervised fine-tuning, one or several (packed) in a row.

    Attributes:
        tokens: `[N, T]` int32.
        segments: `[N, T]` int32, k (from 1) on the k-th text of a row, 0 on padding; texts must not attend to each other.
        loss_mask: `[N, T]` bool, True on the tokens whose prediction counts in the loss, never on a text's first token.
    """

    tokens: np.ndarray
    segments: np.ndarray
    loss_mask: np.ndarray


class Pairs(NamedTuple):
    """Pairs of texts to compare, padded on the right.

    Attributes:
        tokens: `[N, 2, T]` int32.
        mask: `[N, 2, T]` bool, False on padding.
        completion_mask: `[N, 2, T]` bool, True on the completion.
        labels: `[N]` float32, 1 if the first text is better, 1/2 for a tie.
        margins: `[N]` float32, 0 if the data has none.
        weight: `[N]` float32, 1, or 0 on a row that only fills the batch.
    """

    tokens: np.ndarray
    mask: np.ndarray
    completion_mask: np.ndarray
    labels: np.ndarray
    margins: np.ndarray
    weight: np.ndarray


class PromptRows(NamedTuple):
    """Prompts, padded on the left: tokens `[N, P]` int32, and mask `[N, P]` bool, False on padding."""

    tokens: np.ndarray
    mask: np.ndarray


def padded_demonstrations(rows: Sequence[Encoded], length: int) -> Demonstrations:
    """Returns a batch of one text a row, padded to `length` tokens.

    Raises:
        ValueError: a row is longer.
    """
    tokens, mask = rectangle([row.tokens for row in rows], length)
    loss_mask, _ = rectangle([loss_mask_of(row) for row in rows], length)
    return Demonstrations(tokens, mask.astype(np.int32), loss_mask)


def padded_pairs(rows: Sequence[PairRow], length: int) -> Pairs:
    """Returns a batch of pairs, each text padded to `length` tokens.

    Raises:
        ValueError: a text is longer.
    """
    texts = [text for row in rows for text in (row.first, row.second)]
    tokens, mask = rectangle([text.tokens for text in texts], length)
    completion_mask, _ = rectangle([text.completion_mask for text in texts], length)
    tokens, mask, completion_mask = (part.reshape(len(rows), 2, length) for part in (tokens, mask, completion_mask))
    labels, margins = (np.array(values, np.float32) for values in zip(*(row[2:] for row in rows), strict=True))
    return Pairs(tokens, mask, completion_mask, labels, margins, np.ones(len(rows), np.float32))


def padded_prompts(rows: Sequence[np.ndarray], length: int) -> PromptRows:
    """Returns a batch of prompts, padded to `length` tokens.

    Raises:
        ValueError: a prompt is longer.
    """
    return PromptRows(*rectangle(rows, length, left=True))


def loss_mask_of(row: Encoded) -> np.ndarray:
    """Returns the mask `[T]` of tokens in the loss: the completion's, except a text's first, which nothing predicts."""
    return row.completion_mask & (np.arange(len(row.tokens)) > 0)


def rectangle(rows: Sequence[np.ndarray], length: int, *, left: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Returns arrays `[T_n]`, padded with zeros on the right (or `left`) to `[N, length]`, and their mask."""
    longest = max(map(len, rows))
    if longest > length:
        raise ValueError(f"A row has {longest} tokens, more than {length}.")
    padded, mask = np.zeros((len(rows), length), rows[0].dtype), np.zeros((len(rows), length), bool)
    for index, row in enumerate(rows):
        start = length - len(row) if left else 0
        padded[index, start : start + len(row)] = row
        mask[index, start : start + len(row)] = True
    return padded, mask
