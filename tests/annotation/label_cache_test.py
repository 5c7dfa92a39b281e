"""Labels are written to disk before the update that uses them."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.annotation.functions import with_timeout
from jaxrlhf.annotation.label_cache import cached_annotator
from jaxrlhf.base.problem import Sample
from jaxrlhf.lm.pairing import Prompts, Responses


def sample_of(seed):
    tokens = jax.random.randint(jax.random.key(seed), (2, 3, 2, 4), 0, 9)
    prompts = Prompts(jnp.arange(4).reshape(2, 2), jnp.ones((2, 2), bool))
    nothing = jnp.zeros((2, 3, 2, 1))
    pairs = Responses(tokens, jnp.ones(tokens.shape, bool))
    return Sample(prompts, pairs, nothing, nothing, nothing, jnp.ones((2, 3)), jnp.ones(2), jnp.ones(()))


class Dice:
    """An annotator whose labels are random."""

    def __init__(self):
        self.random, self.calls = np.random.default_rng(), 0

    def __call__(self, key, sample):
        self.calls += 1
        return self.random.uniform(size=(2, 3, 1)).astype(np.float32)


def test_a_sample_is_labelled_once_across_restarts(tmp_path):
    dice, path = Dice(), tmp_path / "labels.jsonl"
    annotate, key = cached_annotator(dice, path), jax.random.key(0)
    first, second = annotate(key, sample_of(0)), annotate(key, sample_of(1))
    other = annotate(jax.random.key(1), sample_of(0))
    assert dice.calls == 3 and not np.array_equal(first, other)
    again = cached_annotator(dice, path)
    for labels, found in ((first, again(key, sample_of(0))), (second, again(key, sample_of(1)))):
        np.testing.assert_array_equal(labels, found)
        assert found.dtype == np.float32
    assert dice.calls == 3


@pytest.mark.parametrize(
    "damage", [b"", b'{"sample": "12', b"\xff\xfe\n", b'{"sample": "a", "labels": [[1], 2], "dtype": "f4"}']
)
def test_damaged_lines_are_ignored(tmp_path, damage):
    dice, path = Dice(), tmp_path / "labels.jsonl"
    key = jax.random.key(0)
    labels = cached_annotator(dice, path)(key, sample_of(0))
    path.write_bytes(path.read_bytes() + damage)
    annotate = cached_annotator(dice, path)
    annotate(key, sample_of(1))
    assert dice.calls == 2
    reopened = cached_annotator(dice, path)
    np.testing.assert_array_equal(reopened(key, sample_of(0)), labels)
    reopened(key, sample_of(1))
    assert dice.calls == 2


def test_errors_name_an_annotator_that_hangs_or_raises():
    gate = threading.Event()
    slow = with_timeout(lambda *texts: gate.wait(60), 0.05, "module:slow")
    with pytest.raises(ValueError, match=r"module:slow has not answered 2 questions within 0.05 s"):
        slow(["a", "b"], ["c", "d"], ["e", "f"])
    gate.set()
    assert with_timeout(lambda texts: texts, None, "quick")(["a"]) == ["a"]
    assert with_timeout(lambda texts: texts, 5.0, "quick")(["a"]) == ["a"]
    for seconds in (5.0, None):
        with pytest.raises(ValueError, match=r"^broken failed with KeyError: 0 \(.*label_cache_test.py, line \d+\)"):
            with_timeout(lambda texts: {}[0], seconds, "broken")(["a"])


def test_a_changed_label_is_asked_for_again(tmp_path):
    dice, path, key = Dice(), tmp_path / "labels.jsonl", jax.random.key(0)
    labels = cached_annotator(dice, path)(key, sample_of(0))
    path.write_text(path.read_text().replace(str(labels.ravel()[0].item()), "0.125"))
    assert not np.array_equal(cached_annotator(dice, path)(key, sample_of(0)), labels)
    assert dice.calls == 2
    # Of two lines of a sample the last counts; lines of earlier versions have no seal.
    path.write_text(path.read_text().splitlines()[-1].replace('"seal"', '"other"') + "\n")
    cached_annotator(dice, path)(key, sample_of(0))
    assert dice.calls == 2


@pytest.mark.parametrize(("complete", "calls"), [(False, 1), (True, 2)])
def test_missing_labels_of_a_judge_are_asked_for_again(tmp_path, complete, calls):
    asked = []

    def annotate(key, sample):
        asked.append(key)
        labels = np.ones((2, 3, 1), np.float32)
        labels[0, 0] = -1 if len(asked) == 1 else 0
        return labels

    for _ in range(3):
        found = cached_annotator(annotate, tmp_path / "labels.jsonl", complete=complete)(
            jax.random.key(0), sample_of(0)
        )
    assert len(asked) == calls
    assert found[0, 0, 0] == (0 if complete else -1)
