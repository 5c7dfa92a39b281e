"""The report on predicted preferences against numbers known beforehand."""

import numpy as np
import pytest

from jaxrlhf.evaluation.preferences import fit_one_feature, gain, preference_accuracy, wilson


def test_a_few_pairs_by_hand():
    verdict = preference_accuracy(np.array([2.0, -1.0, 0.0, 3.0]), np.array([1.0, 1.0, 0.0, 0.5]))
    assert verdict.pairs == 3
    assert verdict.accuracy == pytest.approx((1 + 0 + 0.5) / 3)
    loss = [*np.log1p(np.exp([-2.0, 1.0, 0.0])), (np.log1p(np.exp(-3.0)) + np.log1p(np.exp(3.0))) / 2]
    assert verdict.log_loss == pytest.approx(np.mean(loss))
    confidence = 1 / (1 + np.exp([-2.0, -1.0, 0.0]))
    error = np.abs(np.array([1, 0, 0.5]) - confidence).sum() / 3  # each in a bin of its own
    assert verdict.calibration_error == pytest.approx(error)


def test_the_order_of_texts_changes_nothing():
    source = np.random.default_rng(0)
    differences, labels = source.normal(size=200), source.choice([0.0, 0.5, 1.0], 200)
    flip = source.random(200) < 0.5
    one = preference_accuracy(differences, labels)
    other = preference_accuracy(np.where(flip, -differences, differences), np.where(flip, 1 - labels, labels))
    assert one.accuracy == other.accuracy
    assert one.log_loss == pytest.approx(other.log_loss)
    assert one.calibration_error == pytest.approx(other.calibration_error)


def test_rewards_that_are_the_truth_are_calibrated_and_louder_ones_are_not():
    source = np.random.default_rng(1)
    truth = source.normal(size=40_000)
    labels = (source.random(40_000) < 1 / (1 + np.exp(-truth))).astype(float)
    calibrated, loud = preference_accuracy(truth, labels), preference_accuracy(5 * truth, labels)
    assert calibrated.calibration_error < 0.01
    assert loud.calibration_error > 0.15
    assert loud.accuracy == calibrated.accuracy
    assert loud.log_loss > calibrated.log_loss
    assert fit_one_feature(truth, labels) == pytest.approx(1.0, abs=0.05)
    assert fit_one_feature(-20 * truth, labels) == pytest.approx(-0.05, abs=0.003)


def test_the_interval_covers_as_often_as_it_says():
    source = np.random.default_rng(2)
    successes = source.binomial(200, 0.63, 4_000)
    intervals = np.array([wilson(each, 200) for each in successes])
    assert np.mean((intervals[:, 0] < 0.63) & (intervals[:, 1] > 0.63)) == pytest.approx(0.95, abs=0.015)
    assert wilson(0, 10)[0] == pytest.approx(0.0, abs=1e-12)


def test_a_gain_is_measured_on_the_same_pairs():
    labels = np.ones(100)
    better, worse = np.where(np.arange(100) < 80, 1.0, -1.0), np.where(np.arange(100) < 60, 1.0, -1.0)
    middle, half = gain(better, worse, labels)
    assert middle == pytest.approx(0.2)
    assert half == pytest.approx(1.96 * np.sqrt(0.2 * 0.8 / 99), rel=1e-2)


def test_what_cannot_be_judged_is_refused():
    with pytest.raises(ValueError, match="No pair is decided"):
        preference_accuracy(np.array([1.0]), np.array([0.5]))
    with pytest.raises(ValueError, match="1 rewards are not finite"):
        preference_accuracy(np.array([1.0, np.nan]), np.array([1.0, 1.0]))
