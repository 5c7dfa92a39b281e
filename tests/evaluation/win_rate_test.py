"""Win rates: the regression on length against scipy, and intervals that know which completions share a prompt."""

import numpy as np
import pytest
from scipy.optimize import minimize

from jaxrlhf.evaluation.win_rate import LENGTH_PRIOR, length_controlled, over_prompts, summarise


def labels(count, constant, slope, seed=0):
    """Labels whose log-odds are `constant + slope tanh(difference / sd)`, and the differences."""
    source = np.random.default_rng(seed)
    differences = np.round(source.normal(3.0, 10.0, count))
    odds = constant + slope * np.tanh(differences / differences.std())
    return (source.uniform(size=count) < 1 / (1 + np.exp(-odds))).astype(float), differences


def test_the_regression_is_the_maximum_that_scipy_finds():
    wins, differences = labels(300, 0.4, 1.5)
    wins[:20] = 0.5
    weights = np.random.default_rng(1).integers(0, 4, (3, 300)).astype(float)
    x = np.tanh(differences / differences.std())
    for weight, value in zip(weights, length_controlled(wins, differences, weights), strict=True):

        def cost(parameters, weight=weight):
            odds = parameters[0] + parameters[1] * x
            return weight @ (np.logaddexp(0, odds) - wins * odds) + LENGTH_PRIOR / 2 * parameters[1] ** 2

        best = minimize(cost, np.zeros(2), tol=1e-10).x
        assert value == pytest.approx(1 / (1 + np.exp(-best[0])), abs=1e-4)


def test_a_preference_for_length_alone_is_taken_out():
    wins, differences = labels(4000, 0.0, 2.0)
    assert wins.mean() > 0.57
    assert length_controlled(wins, differences) == pytest.approx(0.5, abs=0.03)
    wins, differences = labels(4000, 0.8, 0.0)
    assert length_controlled(wins, differences) == pytest.approx(wins.mean(), abs=0.01)


@pytest.mark.parametrize("label", [0.0, 0.5, 1.0])
def test_labels_that_all_agree_and_equal_lengths_have_a_win_rate(label):
    for differences in (np.zeros(50), np.arange(50.0)):
        assert length_controlled(np.full(50, label), differences) == pytest.approx(label, abs=2e-3)


def test_an_interval_is_as_wide_as_the_prompts_allow():
    source = np.random.default_rng(0)
    by_prompt = (source.uniform(size=(200, 1)) < 0.6).astype(float)
    alike, single = np.repeat(by_prompt, 8, axis=1), by_prompt
    apart = (source.uniform(size=(200, 8)) < 0.6).astype(float)
    widths = {}
    for name, wins in (("alike", alike), ("single", single), ("apart", apart)):
        zeros = np.zeros(wins.shape)
        interval = summarise(wins, np.stack([zeros, zeros], axis=-1), zeros, seed=0)["win_rate"]
        assert interval.value == pytest.approx(wins.mean())
        assert interval.low < interval.value < interval.high
        widths[name] = interval.high - interval.low
    normal = 2 * 1.96 * by_prompt.std() / np.sqrt(200)
    assert widths["single"] == pytest.approx(normal, rel=0.1)
    # Eight completions of a prompt that all agree say no more than one; eight that do not, much more.
    assert widths["alike"] == pytest.approx(widths["single"], rel=1e-6)
    assert widths["apart"] == pytest.approx(normal / np.sqrt(8), rel=0.2)


def test_pairs_without_a_label_count_in_neither_win_rate():
    wins = np.array([[1.0, np.nan], [0.0, 1.0], [np.nan, np.nan]])
    lengths = np.stack([np.array([[4, 9], [2, 2], [3, 5]]), np.full((3, 2), 4)], axis=-1)
    summary = summarise(wins, lengths, np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]), seed=0)
    assert [summary[name].value for name in ("win_rate", "kl", "length")] == pytest.approx([2 / 3, 3.5, 25 / 6])
    nothing = summarise(np.full((3, 2), np.nan), lengths, np.zeros((3, 2)), seed=0)
    assert np.isnan(nothing["win_rate"]).all() and np.isnan(nothing["length_controlled"]).all()


def test_a_statistic_without_a_value_in_some_draws_keeps_its_interval():
    value, low, high = over_prompts(lambda counts: np.where(counts[..., 0] > 0, counts[..., 0], np.nan), 3, seed=0)
    assert (value, low) == (1.0, 1.0) and high > 1
