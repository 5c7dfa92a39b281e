"""Win rates of a policy whose completions were compared with a reference's: by length, and with intervals over prompts.

Shapes: P prompts, K completions of each; all in numpy on the host.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from jaxrlhf.evaluation.statistics import refuse_non_finite

LENGTH_PRIOR = 1.0
"""Precision of the prior on the length's effect in `length_controlled`: a Gaussian of standard deviation 1."""
CONSTANT_PRIOR = 1e-3
"""The same for the constant, which only keeps it finite where all labels are wins or all are losses."""


class Interval(NamedTuple):
    """An estimate and its 95% interval."""

    value: float
    low: float
    high: float


def length_controlled(wins: np.ndarray, differences: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Returns the win rate that a policy would have if its completions were as long as those it is compared with.

        P(win of pair i) = sigmoid(a + b tanh(d_i / s)),    s^2 = mean of (d_i - mean d)^2,    win rate = sigmoid(a)

    a and b are fitted by maximum likelihood, with a prior of precision `LENGTH_PRIOR` on b: AlpacaEval 2's regression
    (arXiv 2404.04475) without its third term, an instruction's difficulty, which needs other models' labels on the same
    prompts, and with lengths in tokens.

    Args:
        wins: `[N]` labels in [0, 1].
        differences: `[N]`, tokens of the policy's completion minus tokens of the other.
        weights: `[..., N]`, how often each pair counts; by default once.

    Returns:
        `[...]`.
    """
    wins, differences = (np.asarray(values, np.float64) for values in (wins, differences))
    refuse_non_finite(wins=wins, differences=differences)
    weights = np.ones(len(wins)) if weights is None else np.asarray(weights, np.float64)
    spread = differences.std()
    x = np.tanh(differences / spread) if spread > 0 else np.zeros(len(wins))
    a, b = np.zeros(weights.shape[:-1]), np.zeros(weights.shape[:-1])
    for _ in range(50):
        p = 1 / (1 + np.exp(-(a[..., None] + b[..., None] * x)))
        error, curve = weights * (p - wins), weights * p * (1 - p)
        first, second = error.sum(-1) + CONSTANT_PRIOR * a, (error * x).sum(-1) + LENGTH_PRIOR * b
        aa, ab = curve.sum(-1) + CONSTANT_PRIOR, (curve * x).sum(-1)
        bb = (curve * x * x).sum(-1) + LENGTH_PRIOR
        determinant = aa * bb - ab * ab
        # Newton's steps, bounded: far out the likelihood is nearly flat.
        step_a = np.clip((bb * first - ab * second) / determinant, -1, 1)
        step_b = np.clip((aa * second - ab * first) / determinant, -1, 1)
        a, b = a - step_a, b - step_b
        if max(np.max(np.abs(step_a)), np.max(np.abs(step_b))) < 1e-9:
            break
    return 1 / (1 + np.exp(-a))


def over_prompts(
    statistic: Callable[[np.ndarray], np.ndarray], prompts: int, *, seed: int, draws: int = 1000
) -> Interval:
    """Returns a statistic with the percentile interval of its bootstrap over prompts.

    A draw takes as many prompts as there are, with replacement, each with all its completions: completions of one prompt
    are alike, so that drawing them one by one would give intervals that are too narrow.

    Args:
        statistic: `(counts [..., P]) -> [...]`, of data in which each prompt is taken so often.
        prompts: P.
        seed: of the draws.
        draws: of the bootstrap.
    """
    counts = np.random.default_rng(seed).multinomial(prompts, np.full(prompts, 1 / prompts), size=draws)
    values = statistic(counts.astype(np.float64))
    finite = values[np.isfinite(values)]
    value = float(statistic(np.ones(prompts)))
    if not len(finite):
        return Interval(value, float("nan"), float("nan"))
    low, high = np.quantile(finite, [0.025, 0.975])
    return Interval(value, float(low), float(high))


def summarise(wins: np.ndarray, lengths: np.ndarray, log_ratio: np.ndarray, *, seed: int) -> dict[str, Interval]:
    """Returns a policy's win rate, the same controlled for length, KL in nats, and tokens per completion.

    Args:
        wins: `[P, K]` labels in [0, 1], NaN where there is none; those count in neither win rate.
        lengths: `[P, K, 2]` tokens of the policy's and of the reference's completions.
        log_ratio: `[P, K]`, log policy / reference of the policy's completions, nats.
        seed: of the bootstrap; the same for all policies, so that their intervals are over the same draws of prompts.
    """
    prompts, per_prompt = wins.shape
    labelled = np.isfinite(wins)
    label = np.where(labelled, wins, 0.0)
    difference = (lengths[..., 0] - lengths[..., 1])[labelled]

    def mean_of(values, counted):
        def mean(counts):
            with np.errstate(invalid="ignore"):
                return counts @ (values * counted).sum(1) / (counts @ counted.sum(1))

        return mean

    def controlled(counts):
        repeated = np.repeat(counts, per_prompt, axis=-1)[..., labelled.ravel()]
        if not len(difference):
            return np.full(counts.shape[:-1], np.nan)
        return np.where(repeated.sum(-1) > 0, length_controlled(wins[labelled], difference, repeated), np.nan)

    every = np.ones(wins.shape)
    statistics = {
        "win_rate": mean_of(label, labelled),
        "length_controlled": controlled,
        "kl": mean_of(log_ratio, every),
        "length": mean_of(lengths[..., 0], every),
    }
    return {name: over_prompts(statistic, prompts, seed=seed) for name, statistic in statistics.items()}
