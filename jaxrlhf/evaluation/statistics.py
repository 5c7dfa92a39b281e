"""Confidence intervals and correlations, in numpy on the host. Every interval has a level of 95%.

Every function raises ValueError for shapes that do not match, and for an empty or non-finite input unless it says
otherwise.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

NORMAL_95 = 1.959963984540054
"""The 0.975 quantile of the standard normal: half the width of a two-sided 95% interval in standard errors."""


class Correlation(NamedTuple):
    """Pearson's correlation and its interval."""

    value: float
    low: float
    high: float


def wilson(successes: float, count: int, *, z: float = NORMAL_95) -> tuple[float, float]:
    """Returns the interval of a proportion, 95% by default (Wilson 1927, without continuity correction).

    Examples:
        >>> from jaxrlhf.evaluation.statistics import wilson
        >>> [round(bound, 3) for bound in wilson(70, 100)]  # a win rate of 0.7 in 100 pairs
        [0.604, 0.781]
    """
    proportion, extra = successes / count, z * z / count
    middle = (proportion + extra / 2) / (1 + extra)
    half_width = z * math.sqrt(proportion * (1 - proportion) / count + extra / (4 * count)) / (1 + extra)
    return middle - half_width, middle + half_width


def student_interval(values: np.ndarray) -> tuple[float, float]:
    """Returns the mean of `[seeds]` and the half-width of its interval, `t sd / sqrt(seeds)`: NaN for one seed.

    t is the 0.975 quantile of Student's distribution (1908) with `seeds - 1` degrees of freedom. NaNs propagate.
    """
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"Values must be [seeds], at least one; they are {values.shape}.")
    count = len(values)
    if count == 1:
        return float(values[0]), math.nan
    # Imported here: scipy would take longer to import than all of this package.
    from scipy.special import stdtrit

    half_width = float(stdtrit(count - 1, 0.975) * values.std(ddof=1)) / math.sqrt(count)
    return float(values.mean()), half_width


def paired_gain(values: np.ndarray, baseline: np.ndarray) -> tuple[float, float]:
    """Returns the mean of `values - baseline`, `[seeds]` each and paired by seed, and its interval's half-width."""
    values, baseline = same_length(values=values, baseline=baseline)
    return student_interval(values - baseline)


def normal_interval(values: np.ndarray) -> tuple[float, float]:
    """Returns the mean of `[N]` and the half-width of its normal interval, `1.96 sd / sqrt(N)`."""
    return float(values.mean()), NORMAL_95 * float(values.std(ddof=1)) / math.sqrt(len(values))


def clustered_interval(values: np.ndarray, clusters: Sequence[Any]) -> tuple[float, float]:
    """Returns the mean of `[N]` and the half-width of its interval where values of one cluster depend on each other.

    `t sqrt(G / (G - 1) sum over clusters g of (sum of the residuals in g)^2) / N` for G clusters, with the t of
    `student_interval` for G - 1 degrees of freedom (Liang and Zeger 1986, for a mean). With a single cluster the values
    are taken as independent, and the interval holds for that cluster alone.

    Args:
        values: `[N]`.
        clusters: `[N]`, what each value belongs to, such as its prompt.
    """
    values = np.asarray(values, np.float64)
    if len(values) != len(clusters):
        raise ValueError(f"Each value needs its cluster: there are {len(values)} values and {len(clusters)} clusters.")
    numbers = {cluster: number for number, cluster in enumerate(dict.fromkeys(clusters))}
    count = len(numbers)
    if count < 2:
        return student_interval(values)
    sums = np.bincount([numbers[cluster] for cluster in clusters], weights=values - values.mean())
    # That of G independent values with the same sum of squares.
    _, half_width = student_interval(sums * count / len(values))
    return float(values.mean()), half_width


def correlation(scores: np.ndarray, lengths: np.ndarray) -> Correlation:
    """Returns Pearson's correlation of `[N]` scores and lengths: NaN if either is constant.

    The interval is `tanh(artanh(r) -+ 1.96 / sqrt(N - 3))` (Fisher 1921), NaN for N of at most 3.
    """
    scores, lengths = same_length(scores=scores, lengths=lengths)
    refuse_non_finite(scores=scores, lengths=lengths)
    if len(scores) < 2 or np.ptp(scores) == 0 or np.ptp(lengths) == 0:
        return Correlation(math.nan, math.nan, math.nan)
    x, y = scores - scores.mean(), lengths - lengths.mean()
    value = float(np.clip(x @ y / (np.linalg.norm(x) * np.linalg.norm(y)), -1, 1))
    half_width = NORMAL_95 / math.sqrt(len(scores) - 3) if len(scores) > 3 else math.nan
    with np.errstate(divide="ignore"):
        low, high = np.tanh(np.arctanh(value) + np.array([-half_width, half_width]))
    return Correlation(value, float(low), float(high))


def same_length(**arrays: np.ndarray) -> list[np.ndarray]:
    """Returns the arrays in float64; raises ValueError unless all are vectors of one length."""
    vectors = [np.asarray(array, np.float64) for array in arrays.values()]
    if any(vector.ndim != 1 or vector.shape != vectors[0].shape for vector in vectors):
        shapes = ", ".join(f"{name} {vector.shape}" for name, vector in zip(arrays, vectors, strict=True))
        raise ValueError(f"Arrays must be vectors of one length; they are {shapes}.")
    return vectors


def refuse_non_finite(**arrays: np.ndarray) -> None:
    """Raises ValueError where an array holds NaN or infinity; the message names it."""
    for name, array in arrays.items():
        if not np.all(np.isfinite(array)):
            raise ValueError(f"{int(np.sum(~np.isfinite(array)))} of {name} are not finite.")
