"""Annotators: label frequencies against their likelihoods, and a reward model from a directory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf import bandit, objectives, preferences
from jaxrlhf.bilevel import SKIPPED, Sample, uniform_measure
from jaxrlhf.lm.annotators import reward_model_annotator
from jaxrlhf.lm.hugging_face.weights import WeightsError, save_reward_model
from jaxrlhf.lm.pairing import Prompts, Responses
from jaxrlhf.lm.problem import LanguageFrozen
from jaxrlhf.lm.reward import reward_model
from jaxrlhf.lm.transformer.model import DecoderConfig, decoder


def test_labels_follow_bradley_terry():
    scores = jnp.array([[1.0, 0.0], [0.0, 0.0], [-2.0, 1.0]])
    labels = preferences.draw_labels(jax.random.key(0), scores, labels=20_000)
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
    tokens = np.random.default_rng(2).integers(1, 9, (2, 3, 2, 4), np.int32)
    mask = np.ones(tokens.shape, bool)
    mask[0, 0, 0, 2:] = False
    prompts = Prompts(np.array([[0, 3], [4, 5]], np.int32), np.array([[False, True], [True, True]]))
    measure, num_draws = uniform_measure(2, 3)
    blank = jnp.zeros((2, 3, 2, 1))
    sample = Sample(
        prompts, Responses(tokens, mask), blank, blank, blank + 1, measure, jnp.array([1.0, 0.0]), num_draws
    )
    labels = np.asarray(jax.jit(annotate)(jax.random.key(3), sample, LanguageFrozen((), loaded)))
    assert labels.shape == (2, 3, 4000)

    scored = jax.jit(model.score)

    def score(prompt, pair, response):
        length = int(mask[prompt, pair, response].sum())
        real = [*prompts.tokens[prompt][prompts.mask[prompt]], *tokens[prompt, pair, response, :length]]
        return np.asarray(scored(params, np.array([real]), np.ones((1, len(real)), bool)))[0]

    for prompt in range(2):
        for pair in range(3):
            expected = 1 / (1 + np.exp(score(prompt, pair, 1) - score(prompt, pair, 0)))
            assert abs(labels[prompt, pair].mean() - expected) < 5 * 0.5 / np.sqrt(4000)
    with pytest.raises(WeightsError, match="needs the policy's tokenizer"):
        reward_model_annotator(tmp_path, vocabulary_size=10)


CHOICES = {
    "cold": preferences.Choice(temperature=0.5),
    "mistakes": preferences.Choice(mistake=0.2),
    "ties": preferences.Choice(tie=0.7),
    "a favoured position": preferences.Choice(position=0.6),
    "all": preferences.Choice(temperature=2.0, mistake=0.1, tie=0.4, position=-0.3),
}


@pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES)
def test_drawn_labels_follow_the_likelihood_of_the_choice(choice, x64):
    scores = jnp.array([[1.0, 0.0], [0.0, 0.0], [-2.0, 1.0]])
    count = 40_000
    labels = preferences.draw_labels(jax.random.key(0), scores, labels=count, choice=choice)
    outcomes = jnp.exp(preferences.log_outcomes(scores, choice))
    np.testing.assert_allclose(outcomes.sum(axis=-1), 1.0, rtol=1e-12)
    for column, label in enumerate((0.0, 0.5, 1.0)):
        np.testing.assert_allclose((labels == label).mean(axis=-1), outcomes[:, column], atol=5 * 0.5 / np.sqrt(count))
    np.testing.assert_allclose(labels.mean(axis=-1), preferences.preference(scores, choice), atol=2.5 / np.sqrt(count))


def test_without_peculiarities_a_choice_is_bradley_terry(x64):
    scores = jax.random.normal(jax.random.key(0), (7, 2))
    outcomes = preferences.log_outcomes(scores)
    np.testing.assert_allclose(outcomes[:, 2], jax.nn.log_sigmoid(scores[:, 0] - scores[:, 1]), rtol=1e-12)
    assert jnp.all(jnp.exp(outcomes[:, 1]) == 0)
    near = preferences.Choice(tie=1e-9, mistake=1e-9)
    np.testing.assert_allclose(preferences.preference(scores, near), preferences.preference(scores), rtol=1e-6)


@pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES)
def test_the_matched_likelihood_recovers_the_scores_and_the_plain_one_does_not(choice, x64):
    """Fit the difference of two returns to many labels: the annotator's own likelihood finds the true difference."""
    true = 1.6
    labels = preferences.draw_labels(
        jax.random.key(1), jnp.array([[true, 0.0]]), labels=100_000, choice=choice
    )[None]  # fmt: skip
    grid = jnp.linspace(-1.0, 3.0, 401)

    def best(objective):
        def cost(difference):
            return objective.at(jnp.stack([difference, 0.0 * difference])[None, None], labels).uncoupled[0, 0]

        return grid[jnp.argmin(jax.lax.map(cost, grid))]

    assert abs(best(objectives.likelihood(coupled=False, choice=choice)) - true) < 0.08 * choice.temperature
    assert abs(best(objectives.likelihood(coupled=False)) - true) > 0.1


def test_a_skipped_pair_costs_nothing_and_is_not_counted():
    choice = preferences.Choice(skip_below=0.5)
    scores = jnp.array([[[0.0, 0.4], [0.0, 0.6]]])
    labels = preferences.draw_labels(jax.random.key(0), scores, labels=2, choice=choice)
    assert jnp.all(labels[0, 0] == SKIPPED) and jnp.all(labels[0, 1] >= 0)
    assert preferences.preference(scores, choice)[0, 0] == SKIPPED
    objective = objectives.add(
        objectives.brier(), objectives.utility(kl_price=0.1), objectives.likelihood(coupled=False)
    )

    def total(returns):
        cost = objective.at(returns, labels)
        return cost.uncoupled.sum(), cost

    gradient, cost = jax.jit(jax.grad(total, has_aux=True))(scores)
    assert cost.coupled[0, 0] == 0 and cost.uncoupled[0, 0] == 0
    assert cost.uncoupled[0, 1] > 0
    assert jnp.all(gradient[0, 0] == 0) and jnp.all(jnp.isfinite(gradient))


def test_a_myopic_annotator_weighs_late_steps_more():
    discount = jnp.array([1.0, 0.9, 0.81, 0.0]).reshape(1, 1, 1, 4) * jnp.ones((1, 1, 2, 1))
    blank = jnp.zeros((1, 1, 2, 4))
    measure, num_draws = uniform_measure(1, 1)
    sample = Sample(jnp.zeros(1), blank, blank, blank, discount, measure, jnp.ones(2), num_draws)
    steps = jnp.array([[1.0, 0.0, 0.0, 9.0], [0.0, 0.0, 1.0, 9.0]])[None, None]
    score = preferences.myopic(lambda sample, frozen: steps, decay=0.5)(sample, None)
    np.testing.assert_allclose(score, [[[0.25, 1.0]]])
    np.testing.assert_allclose(preferences.myopic(lambda *_: steps, decay=1.0)(sample, None), [[[1.0, 1.0]]])


@pytest.mark.slow
def test_counted_pairs_and_labels_have_the_right_means():
    """Ten draws at a time, many times over: shares and labels against the probabilities."""
    frozen = bandit.Bandit(
        features=jnp.zeros((2, 3, 1)),
        gold=jnp.array([[0.0, 1.0, -1.0], [2.0, 0.0, 0.5]]),
        reference=jax.nn.log_softmax(jnp.array([[0.0, 1.0, 0.5], [1.0, 0.0, -1.0]])),
    )
    problem = bandit.bandit_problem(lambda upper, features: features[..., 0], objectives.likelihood(), counts=True)
    listing = bandit.bandit_problem(lambda upper, features: features[..., 0], objectives.likelihood())
    annotate = preferences.counted_annotator(bandit.gold_score)
    logits = jnp.array([[0.5, 0.0, -0.5], [0.0, 0.0, 0.0]])

    def one(key):
        sample = problem.sample(key, logits, 10, frozen)
        return sample.measure, annotate(key, sample, frozen)[..., 0]

    measures, labels = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), 20_000))
    np.testing.assert_allclose(measures.sum(axis=(1, 2)), 1.0, rtol=1e-5)
    np.testing.assert_allclose(measures * 20, jnp.round(measures * 20), atol=1e-4)
    exact = listing.sample(jax.random.key(0), logits, None, frozen)
    np.testing.assert_allclose(measures.mean(axis=0), exact.measure, atol=5 * 0.16 / 2 / np.sqrt(20_000))
    wins = (measures * labels).mean(axis=0) / exact.measure
    np.testing.assert_allclose(wins, preferences.preference(bandit.gold_score(exact, frozen)), atol=0.03)
    assert bool(jnp.all((labels >= 0) & (labels <= 1)))


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: preferences.gold_annotator(bandit.gold_score, choice=preferences.Choice(temperature=0.0)),
            "temperature",
        ),
        (lambda: preferences.gold_annotator(bandit.gold_score, choice=preferences.Choice(mistake=0.7)), "mistake"),
        (lambda: objectives.likelihood(choice=preferences.Choice(tie=-0.1)), "tie"),
        (lambda: preferences.myopic(bandit.gold_score, decay=0.0), "decay"),
        (lambda: preferences.counted_annotator(bandit.gold_score, choice=preferences.Choice(tie=1.0)), "no ties"),
    ],
)
def test_errors_name_the_thing_and_the_remedy(call, message):
    with pytest.raises(ValueError, match=message):
        call()
