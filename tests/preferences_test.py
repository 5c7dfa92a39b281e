"""Annotators: label frequencies against Bradley-Terry, and a reward model from a directory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf import preferences
from jaxrlhf.bilevel import Sample, drawn
from jaxrlhf.lm.annotators import reward_model_annotator
from jaxrlhf.lm.model import DecoderConfig, decoder
from jaxrlhf.lm.problem import LanguageFrozen, Prompts, Responses
from jaxrlhf.lm.reward import reward_model
from jaxrlhf.lm.weights import WeightsError, save_reward_model


def test_labels_follow_bradley_terry():
    scores = jnp.array([[1.0, 0.0], [0.0, 0.0], [-2.0, 1.0]])
    labels = preferences.bradley_terry(jax.random.key(0), scores, labels=20_000)
    assert labels.shape == (3, 20_000)
    assert set(np.unique(labels)) == {0.0, 1.0}
    expected = 1 / (1 + np.exp([-1.0, 0.0, 3.0]))
    np.testing.assert_allclose(labels.mean(axis=-1), expected, atol=5 * 0.5 / np.sqrt(20_000))
    # Two labels of one pair are independent draws.
    halves = labels.reshape(3, 2, 10_000)
    assert abs(np.corrcoef(halves[0])[0, 1]) < 0.05


def test_order_of_the_responses_is_the_order_of_the_label():
    swapped = preferences.preference(jnp.array([[2.0, 0.5], [0.5, 2.0]]))
    np.testing.assert_allclose(swapped[0] + swapped[1], 1.0, rtol=1e-6)
    assert swapped[0] > 0.5


def test_a_reward_model_directory_labels_by_its_score(tmp_path):
    shape = DecoderConfig(9, 16, 1, 2, 1, 8, 16, context_length=16)
    model = reward_model(decoder(shape))
    params = model.init(jax.random.key(0)) | {"head": jax.random.normal(jax.random.key(1), (16,))}
    save_reward_model(tmp_path, shape, params)
    annotate, loaded = reward_model_annotator(tmp_path, vocabulary_size=9, labels=4000)
    tokens = jax.random.randint(jax.random.key(2), (2, 3, 2, 4), 1, 9)
    mask = jnp.ones_like(tokens, bool).at[0, 0, 0, 2:].set(False)
    prompts = Prompts(jnp.array([[0, 3], [4, 5]]), jnp.array([[False, True], [True, True]]))
    measure, draws = drawn(2, 3)
    blank = jnp.zeros((2, 3, 2, 1))
    sample = Sample(prompts, Responses(tokens, mask), blank, blank, blank + 1, measure, jnp.array([1.0, 0.0]), draws)
    labels = annotate(jax.random.key(3), sample, LanguageFrozen((), loaded))
    assert labels.shape == (2, 3, 4000)

    def score(prompt, pair, response):
        length = int(mask[prompt, pair, response].sum())
        real = [*prompts.tokens[prompt][prompts.mask[prompt]], *tokens[prompt, pair, response, :length]]
        return model.score(params, jnp.array([real]), jnp.ones((1, len(real)), bool))[0]

    for prompt in range(2):
        for pair in range(3):
            expected = jax.nn.sigmoid(score(prompt, pair, 0) - score(prompt, pair, 1))
            assert abs(labels[prompt, pair].mean() - expected) < 5 * 0.5 / np.sqrt(4000)
    with pytest.raises(WeightsError, match="needs the policy's tokenizer"):
        reward_model_annotator(tmp_path, vocabulary_size=10)
