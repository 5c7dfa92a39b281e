"""How well rewards predict preferences: accuracy, likelihood, calibration, and one-feature baselines.

All in numpy on the host, on reward differences `d = r(first) - r(second)` and labels (1: the first is better; 1/2: a tie).
The predicted probability is `p = sigmoid(d)` and the confidence `max(p, 1 - p)`, so the order of the two texts does not
matter.
"""

from typing import NamedTuple

import numpy as np

from jaxrlhf.evaluation.statistics import normal_interval, wilson


class Reliability(NamedTuple):
    """By bin of confidence, `[bins]` each: mean confidence, accuracy, number of pairs; empty bins are NaN."""

    confidence: np.ndarray
    accuracy: np.ndarray
    count: np.ndarray


class PreferenceAccuracy(NamedTuple):
    """How well rewards predict preferences.

    Attributes:
        pairs: number of pairs without ties; ties enter the likelihood only.
        accuracy: fraction of pairs whose better text has the larger reward; equal rewards count 1/2.
        low, high: 95% interval of the accuracy (Wilson).
        log_loss: mean negative log-likelihood in nats; log 2 is chance.
        calibration_error: `sum_b count_b / n |accuracy_b - confidence_b|` over bins of confidence in [1/2, 1].
        reliability: the bins.
    """

    pairs: int
    accuracy: float
    low: float
    high: float
    log_loss: float
    calibration_error: float
    reliability: Reliability


def preference_accuracy(differences: np.ndarray, labels: np.ndarray, *, bins: int = 10) -> PreferenceAccuracy:
    """Returns the accuracy, likelihood and calibration of reward differences `[N]`, given labels `[N]` in [0, 1].

    Raises:
        ValueError: all pairs are ties, or a difference is not finite.
    """
    differences, labels = np.asarray(differences, np.float64), np.asarray(labels, np.float64)
    if not np.all(np.isfinite(differences)):
        raise ValueError(f"{int(np.sum(~np.isfinite(differences)))} rewards are not finite; the model has diverged.")
    if np.all(labels == 0.5):
        raise ValueError("No pair is decided; there is nothing to measure.")
    signed = _signed(differences, labels)
    correct = _correct(signed)
    confidence = 1 / (1 + np.exp(-np.abs(signed)))
    reliability = _reliability(confidence, correct, bins)
    fractions = reliability.count / len(correct)
    gaps = np.abs(reliability.accuracy - reliability.confidence)
    loss = labels * np.logaddexp(0, -differences) + (1 - labels) * np.logaddexp(0, differences)
    low, high = wilson(float(correct.sum()), len(correct))
    return PreferenceAccuracy(
        pairs=len(correct),
        accuracy=float(correct.mean()),
        low=low,
        high=high,
        log_loss=float(loss.mean()),
        calibration_error=float(np.nansum(np.where(fractions > 0, fractions * gaps, 0.0))),
        reliability=reliability,
    )


def accuracy_gain(differences: np.ndarray, baseline: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Returns the accuracy gain of one predictor over a baseline on the same pairs, and its 95% interval's half-width."""
    labels = np.asarray(labels)
    return normal_interval(_correct(_signed(differences, labels)) - _correct(_signed(baseline, labels)))


def fit_one_feature(features: np.ndarray, labels: np.ndarray, *, steps: int = 50) -> float:
    """Returns the maximum-likelihood w of `P(first is better) = sigmoid(w feature)`: a baseline such as length.

    Args:
        features: `[N]`, the first text's minus the second's.
        labels: `[N]`.
        steps: Newton steps, each clipped to 5 / (the feature's root mean square).
    """
    scale = float(np.sqrt(np.mean(np.square(features)))) or 1.0
    unit, w = np.asarray(features, np.float64) / scale, 0.0
    for _ in range(steps):
        p = 1 / (1 + np.exp(-w * unit))
        gradient, curvature = np.sum((labels - p) * unit), np.sum(p * (1 - p) * unit * unit) + 1e-9
        w += float(np.clip(gradient / curvature, -5, 5))
    return w / scale


def _signed(differences: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Returns the better text's reward minus the worse one's, without ties."""
    return np.where(labels > 0.5, differences, -np.asarray(differences))[labels != 0.5]


def _correct(signed: np.ndarray) -> np.ndarray:
    return np.where(signed == 0, 0.5, signed > 0)


def _reliability(confidence: np.ndarray, correct: np.ndarray, bins: int) -> Reliability:
    bin_index = np.minimum((2 * (confidence - 0.5) * bins).astype(int), bins - 1)
    count = np.bincount(bin_index, minlength=bins)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean_confidence, accuracy = (
            np.bincount(bin_index, weights=values, minlength=bins) / count for values in (confidence, correct)
        )
    return Reliability(mean_confidence, accuracy, count)
