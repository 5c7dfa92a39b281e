"""How well rewards predict preferences, on examples with known results."""

import numpy as np
import pytest

from jaxrlhf.evaluation.preferences import accuracy_gain, fit_one_feature, preference_accuracy
from jaxrlhf.evaluation.statistics import NORMAL_95


def test_a_few_pairs_computed_by_hand():
    result = preference_accuracy(np.array([2.0, -1.0, 0.0, 3.0]), np.array([1.0, 1.0, 0.0, 0.5]))
    assert result.pairs == 3
    assert result.accuracy == pytest.approx((1 + 0 + 0.5) / 3)
    loss = [*np.log1p(np.exp([-2.0, 1.0, 0.0])), (np.log1p(np.exp(-3.0)) + np.log1p(np.exp(3.0))) / 2]
    assert result.log_loss == pytest.approx(np.mean(loss))
    confidence = 1 / (1 + np.exp([-2.0, -1.0, 0.0]))
    error = np.abs(np.array([1, 0, 0.5]) - confidence).sum() / 3  # each in a bin of its own
    assert result.calibration_error == pytest.approx(error)


def test_the_order_of_texts_changes_nothing():
    source = np.random.default_rng(0)
    differences, labels = source.normal(size=200), source.choice([0.0, 0.5, 1.0], 200)
    flip = source.random(200) < 0.5
    ordered = preference_accuracy(differences, labels)
    flipped = preference_accuracy(np.where(flip, -differences, differences), np.where(flip, 1 - labels, labels))
    assert ordered.accuracy == flipped.accuracy
    assert ordered.log_loss == pytest.approx(flipped.log_loss)
    assert ordered.calibration_error == pytest.approx(flipped.calibration_error)


def test_true_rewards_are_calibrated_and_scaled_ones_are_not():
    source = np.random.default_rng(1)
    truth = source.normal(size=40_000)
    labels = (source.random(40_000) < 1 / (1 + np.exp(-truth))).astype(float)
    calibrated, scaled = preference_accuracy(truth, labels), preference_accuracy(5 * truth, labels)
    assert calibrated.calibration_error < 0.01
    assert scaled.calibration_error > 0.15
    assert scaled.accuracy == calibrated.accuracy
    assert scaled.log_loss > calibrated.log_loss
    assert fit_one_feature(truth, labels) == pytest.approx(1.0, abs=0.05)
    assert fit_one_feature(-20 * truth, labels) == pytest.approx(-0.05, abs=0.003)


def test_a_gain_is_measured_on_the_same_pairs():
    labels = np.ones(100)
    better, worse = np.where(np.arange(100) < 80, 1.0, -1.0), np.where(np.arange(100) < 60, 1.0, -1.0)
    mean, half_width = accuracy_gain(better, worse, labels)
    assert mean == pytest.approx(0.2)
    assert half_width == pytest.approx(NORMAL_95 * np.sqrt(0.2 * 0.8 / 99), rel=1e-2)


def test_ties_only_and_non_finite_rewards_are_refused():
    with pytest.raises(ValueError, match="No pair is decided"):
        preference_accuracy(np.array([1.0]), np.array([0.5]))
    with pytest.raises(ValueError, match="1 rewards are not finite"):
        preference_accuracy(np.array([1.0, np.nan]), np.array([1.0, 1.0]))
