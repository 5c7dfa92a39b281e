"""Comparisons with a reference: how often its completions are sampled."""

import numpy as np
import pytest

from jaxrlhf.commands import comparison
from jaxrlhf.commands.annotators import ComparisonAnnotator
from jaxrlhf.commands.models import open_model

PROMPTS = [np.asarray([3 + number % 3, 10]) for number in range(5)]


@pytest.fixture
def comparer_of(make_world, tmp_path, monkeypatch):
    """`(number of prompts, largest batch) -> ` `(params) -> Comparison`, the base, and the rows of each sampling."""
    base, inner = open_model(make_world(tmp_path) / "base", "policy"), comparison._completer

    def build(count, size):
        sampled = []

        def counted(*args, **keywords):
            complete = inner(*args, **keywords)
            return lambda *given: sampled.append(len(given[-1].tokens)) or complete(*given)

        monkeypatch.setattr(comparison, "_completer", counted)
        monkeypatch.setattr(comparison, "BATCH_SIZE", size)
        annotator = ComparisonAnnotator(None, lambda key, sample: np.full((len(sample[0].tokens), 1, 1), 0.5))
        return comparison.policy_comparer(base, PROMPTS[:count], annotator, max_new_tokens=6, seed=3), base, sampled

    return build


def test_the_reference_completes_each_batch_once(comparer_of):
    compare, base, rows = comparer_of(5, 2)
    first, again = compare(base.params), compare(base.params)
    assert rows == [2] * 9, "three batches of the policy, of the reference, and of the policy again"
    assert first.samples == again.samples and len(first.samples) == 5
    np.testing.assert_array_equal(first.lengths, again.lengths)
