"""Intervals and correlations against simulation and scipy."""

import math

import numpy as np
import pytest
import scipy.stats

from jaxrlhf.evaluation.statistics import clustered_interval, correlation, paired_gain, student_interval, wilson


def test_the_interval_covers_as_often_as_it_says():
    source = np.random.default_rng(2)
    successes = source.binomial(200, 0.63, 4_000)
    intervals = np.array([wilson(each, 200) for each in successes])
    assert np.mean((intervals[:, 0] < 0.63) & (intervals[:, 1] > 0.63)) == pytest.approx(0.95, abs=0.015)
    assert wilson(0, 10)[0] == pytest.approx(0.0, abs=1e-12)


def test_a_correlation_agrees_with_scipy():
    source = np.random.default_rng(6)
    lengths = source.integers(20, 60, 50)
    scores = 0.05 * lengths + source.normal(size=50)
    ours, theirs = correlation(scores, lengths), scipy.stats.pearsonr(scores, lengths)
    assert ours.value == pytest.approx(theirs.statistic)
    assert ours[1:] == pytest.approx(tuple(theirs.confidence_interval(0.95)))
    assert correlation(lengths, -3 * lengths) == pytest.approx((-1, -1, -1))
    assert all(math.isnan(each) for each in correlation(scores, np.full(50, 12.0)))
    assert math.isnan(correlation(np.arange(3.0), np.array([1.0, 0, 3])).low)


def test_intervals_over_seeds():
    values, others = np.array([1.0, 2.0, 4.0, 5.0]), np.array([0.5, 1.7, 3.0, 4.9])
    mean, half = student_interval(values)
    low, high = scipy.stats.t.interval(0.95, 3, loc=values.mean(), scale=scipy.stats.sem(values))
    assert (mean - half, mean + half) == pytest.approx((low, high))
    mean, half = paired_gain(values, others)
    test = scipy.stats.ttest_rel(values, others).confidence_interval(0.95)
    assert (mean - half, mean + half) == pytest.approx((test.low, test.high))
    mean, half = student_interval([3.0])
    assert mean == 3.0
    assert math.isnan(half)
    assert math.isnan(student_interval([3.0, np.nan])[0])


ROW, NAN = np.arange(4.0), np.array([0.0, np.nan, 1.0, 2.0])
ERRORS = {
    "lengths differ": (lambda: correlation(ROW, ROW[:3]), r"scores \(4,\), lengths \(3,\)"),
    "NaN in a correlation": (lambda: correlation(NAN, ROW), "1 of scores"),
    "no seed": (lambda: student_interval([]), "at least one"),
    "unpaired": (lambda: paired_gain(ROW, ROW[:2]), "vectors of one length"),
}


def test_values_of_one_cluster_count_as_dependent():
    source = np.random.default_rng(3)
    values = source.normal(size=12)
    alone, half_width = student_interval(values)
    np.testing.assert_allclose(clustered_interval(values, range(12)), (alone, half_width), rtol=1e-12)
    # Repeated values say nothing new, in any order.
    order = source.permutation(36)
    repeated = np.repeat(values, 3)[order], np.repeat(np.arange(12), 3)[order]
    np.testing.assert_allclose(clustered_interval(*repeated), (alone, half_width), rtol=1e-12)
    assert student_interval(repeated[0])[1] < 0.6 * half_width
    # Of one cluster there is no other: its values are as they are.
    assert clustered_interval(values, ["a"] * 12) == student_interval(values)
    with pytest.raises(ValueError, match="there are 12 values and 3 clusters"):
        clustered_interval(values, ["a", "b", "c"])


def test_the_interval_over_clusters_of_different_sizes_covers_as_often_as_it_says():
    source, covered = np.random.default_rng(4), 0
    clusters = np.repeat(np.arange(20), [2, 3, 4, 5] * 5)
    for _ in range(2000):
        values = source.normal(size=20)[clusters] + 0.5 * source.normal(size=len(clusters))
        mean, half_width = clustered_interval(values, clusters)
        covered += abs(mean) <= half_width
    assert 0.93 < covered / 2000 < 0.965


@pytest.mark.parametrize(("call", "message"), ERRORS.values(), ids=ERRORS)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
