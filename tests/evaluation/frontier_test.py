"""The reward-KL frontier against enumeration, simulation, closed forms and scipy."""

import itertools
import math

import numpy as np
import pytest
import scipy.optimize
import scipy.stats

from jaxrlhf.evaluation.frontier import (
    at_kl,
    best_of_n,
    ideal_gain,
    length_controlled_win_rate,
    over_optimisation,
)
from jaxrlhf.evaluation.statistics import NORMAL_95

EXPECTED_LARGEST = {
    1: 0.0,
    2: 1 / math.sqrt(math.pi),
    3: 1.5 / math.sqrt(math.pi),
    5: 1.162964,
}  # of n standard normals


def best_by_enumeration(gold, proxy, n):
    rewards = []
    for subset in itertools.combinations(range(len(gold)), n):
        top = max(proxy[i] for i in subset)
        rewards.append(np.mean([gold[i] for i in subset if proxy[i] == top]))
    return np.mean(rewards)


@pytest.mark.parametrize("tied", [False, True])
def test_the_best_of_n_is_the_mean_over_all_subsets(tied):
    source = np.random.default_rng(0)
    gold = source.normal(size=(3, 7))
    proxy = source.integers(0, 3, (3, 7)).astype(float) if tied else source.normal(size=(3, 7))
    result = best_of_n(gold, proxy, sizes=range(1, 8))
    for n, reward, kl in zip(*result, strict=True):
        oracle = np.mean([best_by_enumeration(*row, n) for row in zip(gold, proxy, strict=True)])
        assert reward == pytest.approx(oracle, abs=1e-12)
        assert kl == pytest.approx(math.log(n) - (n - 1) / n)
    by_gold = best_of_n(gold, sizes=[3]).gold[0]
    assert by_gold == pytest.approx(np.mean([best_by_enumeration(row, row, 3) for row in gold]))


def test_the_best_of_n_gaussians_has_its_known_mean():
    source = np.random.default_rng(1)
    gold = source.normal(size=(300, 1_000))
    proxy = 0.6 * gold + 0.8 * source.normal(size=gold.shape)
    sizes = np.array(list(EXPECTED_LARGEST))
    expected = np.array(list(EXPECTED_LARGEST.values()))
    by_gold, by_proxy = best_of_n(gold, sizes=sizes), best_of_n(gold, proxy, sizes=sizes)
    np.testing.assert_allclose(by_gold.gold, expected, atol=0.01)
    np.testing.assert_allclose(by_proxy.gold, 0.6 * expected, atol=0.01)
    assert np.all(expected <= ideal_gain(by_gold.kl, 1.0))


def test_a_large_pool_stays_exact():
    pool = 4096
    ranks = np.random.default_rng(2).permutation(pool)[None] + 1.0
    result = best_of_n(ranks)
    np.testing.assert_array_equal(result.sizes, 2 ** np.arange(13))
    np.testing.assert_allclose(result.gold, result.sizes * (pool + 1) / (result.sizes + 1), rtol=1e-11)


def test_the_bound_of_kl_is_exact_without_ties_and_above_with_them():
    n, outcomes = 4, 2_000
    edges = np.linspace(0, 1, outcomes + 1)
    best = np.diff(edges**n)
    bound = best_of_n(np.zeros((1, n)), sizes=[n]).kl[0]
    assert np.sum(best * np.log(best * outcomes)) == pytest.approx(bound, rel=1e-3)
    coarse = np.diff(np.linspace(0, 1, 4) ** n)  # three outcomes, drawn alike
    assert np.sum(coarse * np.log(coarse * 3)) < 0.9 * bound


def test_an_exponential_tilt_reaches_the_ideal_gain():
    spread, tilt, grid = 1.5, 0.7, np.linspace(-15, 15, 20_001)
    reference = scipy.stats.norm.pdf(grid, scale=spread)
    policy = reference * np.exp(tilt * grid)
    reference, policy = reference / reference.sum(), policy / policy.sum()
    kl = np.sum(policy * (np.log(policy) - np.log(reference)))
    assert policy @ grid == pytest.approx(float(ideal_gain(kl, spread)), rel=1e-6)
    np.testing.assert_allclose(ideal_gain(np.array([0.0, 2.0]), np.array([[1.0], [3.0]])), [[0, 2], [0, 6]])


def wins_by_length(source, count, a, b):
    differences = source.normal(40.0, 60.0, count)
    chance = 1 / (1 + np.exp(-a - b * np.tanh(differences / differences.std())))
    return (source.random(count) < chance).astype(float), differences


def test_the_controlled_win_rate_agrees_with_direct_minimisation():
    source = np.random.default_rng(3)
    wins, differences = wins_by_length(source, 300, 0.4, 1.0)
    wins[:40] = source.random(40)
    feature = np.tanh(differences / differences.std())

    def loss(w):
        logits = w[0] + w[1] * feature
        return np.sum(np.logaddexp(0, logits) - wins * logits)

    a, b = scipy.optimize.minimize(loss, [0.0, 0.0], tol=1e-10).x
    with_unlabelled = np.concatenate([wins, [np.nan, np.nan]]), np.concatenate([differences, [1e6, np.nan]])
    result = length_controlled_win_rate(*with_unlabelled)
    assert result.rate == pytest.approx(1 / (1 + math.exp(-a)), abs=1e-5)
    assert result.length_coefficient == pytest.approx(b, abs=1e-4)
    assert (result.labelled, result.unlabelled, result.raw_rate) == (300, 2, pytest.approx(wins.mean()))
    assert 0 < result.low < result.rate < result.high < 1


def test_wins_that_length_alone_explains_are_worth_one_half():
    source = np.random.default_rng(4)
    result = length_controlled_win_rate(*wins_by_length(source, 20_000, 0.0, 2.0))
    assert result.raw_rate > 0.65
    assert result.rate == pytest.approx(0.5, abs=0.02)
    assert result.low < 0.5 < result.high
    differences = np.array([-30.0, -20.0, -10.0, 10.0, 20.0, 30.0])
    decided_by_length = length_controlled_win_rate((differences > 0).astype(float), differences)
    assert decided_by_length.rate == pytest.approx(0.5)
    assert math.isnan(decided_by_length.low)
    assert math.isnan(length_controlled_win_rate((differences < 0).astype(float), differences).low)
    assert math.isnan(length_controlled_win_rate(np.ones(6), differences).high)


def test_the_interval_of_the_controlled_win_rate_covers_as_often_as_it_says():
    source, truth = np.random.default_rng(5), 1 / (1 + math.exp(-0.5))
    results = [length_controlled_win_rate(*wins_by_length(source, 150, 0.5, 1.0)) for _ in range(800)]
    assert np.mean([result.low < truth < result.high for result in results]) == pytest.approx(0.95, abs=0.025)


def test_equal_lengths_leave_the_plain_win_rate():
    wins = np.array([1.0, 1, 0, 1, 0.5, 1, 0, 1])
    result = length_controlled_win_rate(wins, np.zeros(8))
    assert result.rate == pytest.approx(wins.mean(), abs=1e-3)
    assert result.length_coefficient == 0
    half = NORMAL_95 * wins.std() / math.sqrt(8)  # the sandwich is the plain error of a mean
    assert result.rate - result.low == pytest.approx(half, rel=2e-3)


def test_a_gain_at_a_kl_is_linear_in_its_root_and_never_extrapolated():
    kl, gold = np.array([9.0, 1.0, 4.0, 4.0, 0.0]), np.array([2.0, 1.0, 3.0, 5.0, 0.7])
    target = np.array([[0.0, 0.25, 1.0], [2.25, 4.0, 6.25], [9.0, 9.01, -0.1]])
    expected = [[0.0, 0.5, 1.0], [2.5, 4.0, 3.0], [2.0, np.nan, np.nan]]
    np.testing.assert_allclose(at_kl(kl, gold, target), expected)
    assert float(at_kl(kl, gold, 0.25)) == 0.5
    assert at_kl(np.zeros(1), np.zeros(1), 0.0) == 0.0
    perfect = np.linspace(0.1, 8, 5)
    np.testing.assert_allclose(at_kl(perfect, ideal_gain(perfect, 1.3), 3.3), ideal_gain(3.3, 1.3))


def test_a_peak_of_gold_is_found_where_the_curve_turns():
    kl = np.arange(11.0) ** 2
    gold = -((np.sqrt(kl) - 6) ** 2)
    result = over_optimisation(kl, np.arange(11.0), gold, steps=np.arange(0, 110, 10))
    assert (result.step, result.kl, result.onset) == (60, 36, 36)
    assert result.peak == pytest.approx(-2 / 3)
    assert result.fall == pytest.approx(-2 / 3 + (16 + 9) / 2)
    assert result.proxy_rose
    assert not over_optimisation(kl, gold, gold).proxy_rose
    assert not over_optimisation(kl, np.zeros(11), gold).proxy_rose


def test_gold_that_rises_or_rests_at_the_end_has_no_onset():
    kl = np.linspace(0, 5, 8)
    for gold in (np.sqrt(kl), np.minimum(kl, 2.0), np.full(8, 0.1)):
        result = over_optimisation(kl, kl, gold)
        assert math.isnan(result.onset)
        assert result.fall == 0
    assert over_optimisation(kl, kl, np.sqrt(kl)).step == 7
    assert over_optimisation(kl, kl, -kl).onset == 0


ROW, NAN = np.arange(4.0), np.array([0.0, np.nan, 1.0, 2.0])
ERRORS = {
    "two rows": (lambda: best_of_n(ROW), "must both be"),
    "other shape": (lambda: best_of_n(ROW[None], ROW[None, :2]), "must both be"),
    "NaN score": (lambda: best_of_n(NAN[None]), "1 of pool_scores are not finite"),
    "NaN proxy": (lambda: best_of_n(ROW[None], NAN[None]), "1 of proxy_scores are not finite"),
    "n too large": (lambda: best_of_n(ROW[None], sizes=[5]), "from 1 to the pool of 4"),
    "n of nothing": (lambda: best_of_n(ROW[None], sizes=[0]), "from 1 to the pool of 4"),
    "n in parts": (lambda: best_of_n(ROW[None], sizes=[1.5]), "whole numbers"),
    "KL below 0": (lambda: ideal_gain(-0.1, 1.0), "can be negative"),
    "label above 1": (lambda: length_controlled_win_rate(ROW, ROW), "lie in"),
    "no label": (lambda: length_controlled_win_rate(np.full(4, np.nan), ROW), "No label"),
    "NaN length": (lambda: length_controlled_win_rate(ROW / 3, NAN), "length_differences are not finite"),
    "one length": (lambda: length_controlled_win_rate(ROW / 3, np.full(4, 5.0)), "cannot be known"),
    "no ridge": (lambda: length_controlled_win_rate(ROW / 3, ROW, ridge=0.0), "must be positive"),
    "no evaluation": (lambda: at_kl(ROW[:0], ROW[:0], 1.0), "no evaluation"),
    "NaN evaluation": (lambda: at_kl(ROW, NAN, 1.0), "1 of gold"),
    "negative KL": (lambda: at_kl(-ROW, ROW, 1.0), "cannot be negative"),
    "two evaluations": (lambda: over_optimisation(ROW[:2], ROW[:2], ROW[:2]), "at least 3"),
    "steps fall": (lambda: over_optimisation(ROW, ROW, ROW, steps=-ROW), "in the order"),
}


@pytest.mark.parametrize(("call", "message"), ERRORS.values(), ids=ERRORS)
def test_what_cannot_be_measured_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
