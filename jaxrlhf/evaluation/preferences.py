"""How well rewards predict preferences: accuracy, likelihood, calibration, and what simpler predictions reach.

All in numpy on the host, on differences `d = r(first) - r(second)` and labels (1: the first is better; 1/2: a tie). The
predicted probability is `p = sigmoid(d)`, the confidence `max(p, 1 - p)`: which text stands first changes nothing.
"""

import math
from typing import NamedTuple

import numpy as np

NORMAL_95 = 1.959963984540054


class Reliability(NamedTuple):
    """By bin of confidence, `[bins]` each: mean confidence, share that was right, number of pairs; empty bins are NaN."""

    confidence: np.ndarray
    accuracy: np.ndarray
    count: np.ndarray


class PreferenceAccuracy(NamedTuple):
    """What a predictor of preferences is worth.

    Attributes:
        pairs: number that were decided; ties are left out of everything but the likelihood.
        accuracy: share whose better text has the larger reward; equal rewards count half.
        low, high: 95% interval of the accuracy (Wilson).
        log_loss: mean negative log-likelihood in nats; log 2 knows nothing.
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
    """Returns the verdict on differences of reward `[N]`, given labels `[N]` in [0, 1].

    Raises:
        ValueError: no pair is decided, or a difference is not finite.
    """
    differences, labels = np.asarray(differences, np.float64), np.asarray(labels, np.float64)
    if not np.all(np.isfinite(differences)):
        raise ValueError(f"{int(np.sum(~np.isfinite(differences)))} rewards are not finite; the model has diverged.")
    decided = labels != 0.5
    if not decided.any():
        raise ValueError("No pair is decided; there is nothing to measure.")
    signed = np.where(labels > 0.5, differences, -differences)[decided]
    right = np.where(signed == 0, 0.5, signed > 0)
    confidence = 1 / (1 + np.exp(-np.abs(signed)))
    reliability = _reliability(confidence, right, bins)
    shares = reliability.count / len(right)
    gaps = np.abs(reliability.accuracy - reliability.confidence)
    loss = labels * np.logaddexp(0, -differences) + (1 - labels) * np.logaddexp(0, differences)
    low, high = wilson(float(right.sum()), len(right))
    return PreferenceAccuracy(
        pairs=len(right),
        accuracy=float(right.mean()),
        low=low,
        high=high,
        log_loss=float(loss.mean()),
        calibration_error=float(np.nansum(np.where(shares > 0, shares * gaps, 0.0))),
        reliability=reliability,
    )


def wilson(successes: float, count: int, *, z: float = NORMAL_95) -> tuple[float, float]:
    """Returns the interval of a share, 95% by default (Wilson 1927, without continuity correction)."""
    share, extra = successes / count, z * z / count
    middle = (share + extra / 2) / (1 + extra)
    half = z * math.sqrt(share * (1 - share) / count + extra / (4 * count)) / (1 + extra)
    return middle - half, middle + half


def gain(differences: np.ndarray, others: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Returns by how much one predictor's accuracy exceeds another's on the same pairs, and half of its 95% interval."""
    labels = np.asarray(labels)
    decided = labels != 0.5

    def right(values):
        signed = np.where(labels > 0.5, values, -np.asarray(values))[decided]
        return np.where(signed == 0, 0.5, signed > 0)

    each = right(differences) - right(others)
    return float(each.mean()), NORMAL_95 * float(each.std(ddof=1)) / math.sqrt(len(each))


def fit_one_feature(features: np.ndarray, labels: np.ndarray, *, steps: int = 50) -> float:
    """Returns w of `P(first is better) = sigmoid(w feature)`, the most likely one: a baseline such as length.

    Args:
        features: `[N]`, of the first text less the second's.
        labels: `[N]`.
        steps: Newton steps, each at most 5 long in units of 1 / (the feature's root mean square).
    """
    scale = float(np.sqrt(np.mean(np.square(features)))) or 1.0
    unit, w = np.asarray(features, np.float64) / scale, 0.0
    for _ in range(steps):
        p = 1 / (1 + np.exp(-w * unit))
        slope, curvature = np.sum((labels - p) * unit), np.sum(p * (1 - p) * unit * unit) + 1e-9
        w += float(np.clip(slope / curvature, -5, 5))
    return w / scale


def _reliability(confidence: np.ndarray, right: np.ndarray, bins: int) -> Reliability:
    place = np.minimum((2 * (confidence - 0.5) * bins).astype(int), bins - 1)
    count = np.bincount(place, minlength=bins)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean_confidence, mean_right = (
            np.bincount(place, weights=values, minlength=bins) / count for values in (confidence, right)
        )
    return Reliability(mean_confidence, mean_right, count)
