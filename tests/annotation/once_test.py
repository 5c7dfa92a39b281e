"""Labels that are kept before anything is learned from them."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.annotation.functions import bounded
from jaxrlhf.annotation.once import once
from jaxrlhf.base.problem import Sample
from jaxrlhf.lm.problem import Prompts, Responses


def sample_of(seed):
    tokens = jax.random.randint(jax.random.key(seed), (2, 3, 2, 4), 0, 9)
    prompts = Prompts(jnp.arange(4).reshape(2, 2), jnp.ones((2, 2), bool))
    nothing = jnp.zeros((2, 3, 2, 1))
    pairs = Responses(tokens, jnp.ones(tokens.shape, bool))
    return Sample(prompts, pairs, nothing, nothing, nothing, jnp.ones((2, 3)), jnp.ones(2), jnp.ones(()))


class Dice:
    """An annotator who never says the same twice."""

    def __init__(self):
        self.random, self.asked = np.random.default_rng(), 0

    def __call__(self, key, sample):
        self.asked += 1
        return self.random.uniform(size=(2, 3, 1)).astype(np.float32)


def test_a_sample_is_labelled_once_even_by_another_process(tmp_path):
    dice, path = Dice(), tmp_path / "labels.jsonl"
    ask, key = once(dice, path), jax.random.key(0)
    first, second = ask(key, sample_of(0)), ask(key, sample_of(1))
    other = ask(jax.random.key(1), sample_of(0))
    assert dice.asked == 3 and not np.array_equal(first, other)
    again = once(dice, path)
    for labels, found in ((first, again(key, sample_of(0))), (second, again(key, sample_of(1)))):
        np.testing.assert_array_equal(labels, found)
        assert found.dtype == np.float32
    assert dice.asked == 3


@pytest.mark.parametrize(
    "damage", [b"", b'{"sample": "12', b"\xff\xfe\n", b'{"sample": "a", "labels": [[1], 2], "dtype": "f4"}']
)
def test_a_line_that_was_being_written_is_asked_for_again(tmp_path, damage):
    dice, path = Dice(), tmp_path / "labels.jsonl"
    key = jax.random.key(0)
    kept = once(dice, path)(key, sample_of(0))
    path.write_bytes(path.read_bytes() + damage)
    ask = once(dice, path)
    ask(key, sample_of(1))
    assert dice.asked == 2
    last = once(dice, path)
    np.testing.assert_array_equal(last(key, sample_of(0)), kept)
    last(key, sample_of(1))
    assert dice.asked == 2


def test_an_annotator_who_hangs_is_named():
    gate = threading.Event()
    slow = bounded(lambda *texts: gate.wait(60), 0.05, "module:slow")
    with pytest.raises(ValueError, match=r"module:slow has not answered 2 questions within 0.05 s"):
        slow(["a", "b"], ["c", "d"], ["e", "f"])
    gate.set()
    assert bounded(lambda texts: texts, None, "quick")(["a"]) == ["a"]
    assert bounded(lambda texts: texts, 5.0, "quick")(["a"]) == ["a"]
    for seconds in (5.0, None):
        with pytest.raises(ValueError, match=r"^broken failed with KeyError: 0 \(.*once_test.py, line \d+\)"):
            bounded(lambda texts: {}[0], seconds, "broken")(["a"])
