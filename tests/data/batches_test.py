"""Padding of rows to batches."""

import numpy as np
import pytest

from jaxrlhf.data.batches import padded_demonstrations, padded_pairs, padded_prompts
from jaxrlhf.data.encode import Encoded
from jaxrlhf.data.tokenization import PairRow


def text(number, length, prompt=1):
    return Encoded(np.full(length, 100 + number, np.int32), np.arange(length) >= prompt)


def test_padding_by_hand():
    rows = [text(0, 3), text(1, 5, prompt=0)]
    made = padded_demonstrations(rows, 6)
    np.testing.assert_array_equal(made.tokens, [[100] * 3 + [0] * 3, [101] * 5 + [0]])
    np.testing.assert_array_equal(made.segments, [[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0]])
    np.testing.assert_array_equal(made.loss_mask, [[0, 1, 1, 0, 0, 0], [0, 1, 1, 1, 1, 0]])
    left = padded_prompts([row.tokens for row in rows], 6)
    np.testing.assert_array_equal(left.tokens, [[0] * 3 + [100] * 3, [0] + [101] * 5])
    np.testing.assert_array_equal(left.mask, left.tokens > 0)
    both = padded_pairs([PairRow(text(2, 2), text(3, 4), 0.5, 1.5)], 4)
    np.testing.assert_array_equal(both.tokens, [[[102, 102, 0, 0], [103] * 4]])
    np.testing.assert_array_equal(both.mask, both.tokens > 0)
    np.testing.assert_array_equal(both.completion_mask, [[[0, 1, 0, 0], [0, 1, 1, 1]]])
    assert (both.labels, both.margins, both.weight) == (0.5, 1.5, 1.0)
    assert [part.dtype for part in both] == [np.int32, bool, bool] + [np.float32] * 3
    assert [part.dtype for part in left] == [np.int32, bool]
    with pytest.raises(ValueError, match="A row has 5 tokens, more than 4"):
        padded_demonstrations(rows, 4)
