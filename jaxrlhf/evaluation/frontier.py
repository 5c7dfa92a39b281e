"""The frontier of reward against KL: what a run gained for its distance from the reference, and what could be gained.

All in numpy on the host. `kl` is `KL(policy || reference)` in nats a completion, averaged over prompts. A gold reward
judges, a proxy is what training sees; a gain is a mean gold reward less the reference's. Every interval is of 95%.

Every function raises ValueError for shapes that do not match, numbers that are not finite (but where NaN has a meaning),
numbers outside of their range, and where nothing is given.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import scipy.stats

from jaxrlhf.evaluation.preferences import NORMAL_95


class BestOfN(NamedTuple):
    """By size n, `[sizes]` each: the sizes, the expected gold reward of the best of n, the upper bound of its KL."""

    sizes: np.ndarray
    gold: np.ndarray
    kl: np.ndarray


class ControlledWinRate(NamedTuple):
    """How often a policy wins at equal length.

    Attributes:
        rate: `sigmoid(a)`, the win rate at equal length.
        low, high: its interval; NaN where the lengths, or one outcome for all, separate wins from losses entirely.
        slope: `b`, by how much the log-odds rise as the policy's text grows from equal length to far longer.
        plain: mean label, the win rate as it stands.
        answered, unanswered: number of labels that counted, and of those that were NaN.
    """

    rate: float
    low: float
    high: float
    slope: float
    plain: float
    answered: int
    unanswered: int


class Correlation(NamedTuple):
    """Pearson's correlation and its interval."""

    value: float
    low: float
    high: float


class OverOptimisation(NamedTuple):
    """Where along a run the gold reward peaks, all rewards being moving averages of width 3.

    Attributes:
        step, kl, peak: step and KL of the largest gold reward, and that reward; the first one if there are several.
        fall: the peak less the gold reward at the end, never negative.
        proxy_rose: whether the proxy is larger at the end than at the peak: with a fall, over-optimisation; a fall
            without it is a run that broke.
        onset: `kl` where the gold reward has fallen since; NaN where it is at its largest at the end.
    """

    step: float
    kl: float
    peak: float
    fall: float
    proxy_rose: bool
    onset: float


def best_of_n(
    pool_scores: np.ndarray, proxy_scores: np.ndarray | None = None, sizes: Sequence[int] | np.ndarray | None = None
) -> BestOfN:
    """Returns the yardstick: the expected gold reward of the best of n completions of the reference.

    The mean over all n-subsets of the pool, which is unbiased for n independent draws. In ascending order of the proxy
    the completion of rank r is the best of a subset with probability `C(r-1, n-1) / C(pool, n)`; equal proxies share
    theirs evenly, as if ties were broken at random. The weights follow from the largest, `w[pool] = n / pool`, by
    `w[r-1] = w[r] (r-n) / (r-1)`, products of numbers at most 1 that can only vanish.

    The KL is `log n - (n-1)/n`: exact where scores are continuous, so that no two are equal, and otherwise an upper
    bound (Beirami et al., arXiv 2401.01879). It holds for whichever score chooses.

    Args:
        pool_scores: `[prompts, pool]`, gold rewards of the reference's completions.
        proxy_scores: `[prompts, pool]`, by which the best is chosen; the gold rewards by default.
        sizes: `[sizes]`, each n from 1 to the pool; powers of two by default.
    """
    gold = np.asarray(pool_scores, np.float64)
    proxy = gold if proxy_scores is None else np.asarray(proxy_scores, np.float64)
    if gold.ndim != 2 or gold.size == 0 or proxy.shape != gold.shape:
        raise ValueError(f"Scores must both be [prompts, pool]; they are {gold.shape} and {proxy.shape}.")
    _refuse_not_finite(pool_scores=gold, proxy_scores=proxy)
    pool = gold.shape[1]
    chosen = np.asarray([2**power for power in range(pool.bit_length())] if sizes is None else sizes)
    if chosen.ndim != 1 or chosen.dtype.kind not in "iu" or np.any(chosen < 1) or np.any(chosen > pool):
        raise ValueError(f"Sizes must be whole numbers from 1 to the pool of {pool}; they are {chosen.tolist()}.")
    by_rank = np.mean([_in_order_of(*pair) for pair in zip(proxy, gold, strict=True)], axis=0)
    rewards = np.array([_rank_weights(pool, int(n)) @ by_rank for n in chosen])
    return BestOfN(chosen, rewards, np.log(chosen) - (chosen - 1) / chosen)


def ideal_gain(kl: np.ndarray | float, spread: np.ndarray | float) -> np.ndarray:
    """Returns `spread sqrt(2 kl)`, the largest gain that a Gaussian reward allows at a KL.

    The largest gain at a KL is that of an exponential tilt; `N(m, s^2)` tilted by `exp(a r)` is `N(m + a s^2, s^2)`:
    gain `a s^2`, KL `a^2 s^2 / 2`. Hence distance is measured as sqrt KL (Gao, Schulman, Hilton, arXiv 2210.10760).
    A reward that is not Gaussian may allow more.

    Args:
        kl: at least 0, any shape.
        spread: standard deviation of the reference's reward given the prompt; over prompts its root mean square, as
            one tilt a serves them all.
    """
    if np.any(np.asarray(kl) < 0) or np.any(np.asarray(spread) < 0):
        raise ValueError("Neither a KL nor a spread can be negative.")
    return np.asarray(spread, np.float64) * np.sqrt(2 * np.asarray(kl, np.float64))


def length_controlled_win_rate(
    wins: np.ndarray, length_differences: np.ndarray, *, ridge: float = 1e-3
) -> ControlledWinRate:
    """Returns the win rate of a policy against a reference at equal length.

    Fits `P(win) = sigmoid(a + b tanh(difference / deviation))`, with the standard deviation of the differences, by
    maximum likelihood less `ridge / 2 (a^2 + b^2)`, which matters only where the likelihood has no maximum. At equal
    length it is `sigmoid(a)`: AlpacaEval 2 (Dubois et al., arXiv 2404.04475) with one model and without the difficulty
    of each instruction. The interval is `sigmoid(a) -+ 1.96 sigmoid'(a) sd(a)`, cut to [0, 1] (delta method), with the
    sandwich variance `H^-1 (sum_i g_i g_i^T) H^-1` of observed information H and scores g, right for labels between 0
    and 1 as well.

    Args:
        wins: `[N]` in [0, 1]: 1 where the policy won, 1/2 for a tie; NaN (no answer) is left out.
        length_differences: `[N]`, tokens of the policy's text less the reference's.
        ridge: positive; the information of one label is at most 1 / 4.

    Raises:
        ValueError: also where all differences are the same other than 0: nothing follows from them for equal length.
    """
    wins, differences = _same_length(wins=wins, length_differences=length_differences)
    given = ~np.isnan(wins)
    labels, differences = wins[given], differences[given]
    if not len(labels):
        raise ValueError("No label was given; there is nothing to measure.")
    if np.any((labels < 0) | (labels > 1)):
        raise ValueError("Labels must lie in [0, 1].")
    _refuse_not_finite(length_differences=differences)
    if ridge <= 0:
        raise ValueError(f"The ridge must be positive; it is {ridge}.")
    if np.ptp(differences) == 0 and differences[0] != 0:
        raise ValueError("All length differences are the same; the win rate at equal length cannot be known.")
    feature = np.tanh(differences / (np.std(differences) or 1.0))
    design = np.stack([np.ones_like(feature), feature], axis=1)
    (a, b), information = _fit_logistic(design, labels, ridge)
    scores = design * (labels - _sigmoid(design @ np.array([a, b])))[:, None]
    bread = np.linalg.inv(information)
    deviation = math.sqrt((bread @ (scores.T @ scores) @ bread)[0, 0])
    rate = float(_sigmoid(a))
    half = math.nan if _separated(feature, labels) else NORMAL_95 * rate * (1 - rate) * deviation
    low, high = np.clip([rate - half, rate + half], 0, 1)
    return ControlledWinRate(
        rate, float(low), float(high), float(b), float(labels.mean()), len(labels), int(np.sum(~given))
    )


def correlation(scores: np.ndarray, lengths: np.ndarray) -> Correlation:
    """Returns Pearson's correlation of `[N]` scores and lengths: NaN where one of them is constant.

    The interval is `tanh(artanh(r) -+ 1.96 / sqrt(N - 3))` (Fisher 1921), NaN where N is at most 3.
    """
    scores, lengths = _same_length(scores=scores, lengths=lengths)
    _refuse_not_finite(scores=scores, lengths=lengths)
    if len(scores) < 2 or np.ptp(scores) == 0 or np.ptp(lengths) == 0:
        return Correlation(math.nan, math.nan, math.nan)
    one, other = scores - scores.mean(), lengths - lengths.mean()
    value = float(np.clip(one @ other / (np.linalg.norm(one) * np.linalg.norm(other)), -1, 1))
    half = NORMAL_95 / math.sqrt(len(scores) - 3) if len(scores) > 3 else math.nan
    with np.errstate(divide="ignore"):
        low, high = np.tanh(np.arctanh(value) + np.array([-half, half]))
    return Correlation(value, float(low), float(high))


def at_kl(kl: np.ndarray, gold: np.ndarray, target: np.ndarray | float) -> np.ndarray:
    """Returns a method's gain at a KL, `[...]` as the target: piecewise linear in sqrt KL through its evaluations.

    The curve starts with no gain at a KL of 0, in place of anything measured there, and takes evaluations in the order
    of their KL; those of the same KL count by their mean. Outside of what was reached the gain is NaN.

    Args:
        kl: `[evaluations]`, at least 0, in any order.
        gold: `[evaluations]`, gains in gold reward.
        target: `[...]`, the KL at which to read.
    """
    kl, gold = _same_length(kl=kl, gold=gold)
    if not len(kl):
        raise ValueError("There is no evaluation to read a gain from.")
    _refuse_not_finite(kl=kl, gold=gold)
    if np.any(kl < 0):
        raise ValueError("A KL cannot be negative; a noisy estimate of one that is must be raised to 0 first.")
    places, inverse, counts = np.unique(kl[kl > 0], return_inverse=True, return_counts=True)
    gains = np.bincount(inverse, weights=gold[kl > 0], minlength=len(places)) / counts
    wanted = np.asarray(target, np.float64)
    distance = np.sqrt(np.where(wanted < 0, np.nan, wanted))
    return np.interp(distance, np.sqrt([0, *places]), [0, *gains], left=np.nan, right=np.nan)


def student_interval(values: np.ndarray) -> tuple[float, float]:
    """Returns the mean of `[seeds]` and half of its interval, `t sd / sqrt(seeds)`: NaN for one seed.

    t is the quantile 0.975 of Student's distribution (1908) with `seeds - 1` degrees of freedom. A NaN stays one.
    """
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"Values must be [seeds], at least one; they are {values.shape}.")
    count = len(values)
    if count == 1:
        return float(values[0]), math.nan
    half = float(scipy.stats.t.ppf(0.975, count - 1) * values.std(ddof=1)) / math.sqrt(count)
    return float(values.mean()), half


def paired_gain(values: np.ndarray, others: np.ndarray) -> tuple[float, float]:
    """Returns the mean of `values - others`, `[seeds]` each and seed by seed, and half of its interval."""
    values, others = _same_length(values=values, others=others)
    return student_interval(values - others)


def over_optimisation(
    kl: np.ndarray, proxy: np.ndarray, gold: np.ndarray, *, steps: np.ndarray | None = None
) -> OverOptimisation:
    """Returns where along a run the gold reward peaks and what happens after (Gao et al., arXiv 2210.10760).

    Rewards are averaged with their neighbours first; the two ends have one neighbour each. Noise makes some peak of
    every plateau: a fall means something where it exceeds the error of an evaluation.

    Args:
        kl, proxy, gold: `[evaluations]`, at least 3, in the order of steps.
        steps: `[evaluations]`, 0, 1, ... by default.
    """
    steps = np.arange(np.size(kl)) if steps is None else steps
    kl, proxy, gold, steps = _same_length(kl=kl, proxy=proxy, gold=gold, steps=steps)
    if len(kl) < 3:
        raise ValueError(f"A peak needs at least 3 evaluations; there are {len(kl)}.")
    _refuse_not_finite(kl=kl, proxy=proxy, gold=gold, steps=steps)
    if np.any(np.diff(steps) <= 0):
        raise ValueError("Evaluations must be in the order of their steps.")
    smooth_gold, smooth_proxy = _moving_average(gold), _moving_average(proxy)
    place = int(np.argmax(smooth_gold))
    peak, end = float(smooth_gold[place]), float(smooth_gold[-1])
    fell = not math.isclose(peak, end, rel_tol=1e-12, abs_tol=1e-12)  # a plateau differs by rounding alone
    return OverOptimisation(
        step=float(steps[place]),
        kl=float(kl[place]),
        peak=peak,
        fall=peak - end if fell else 0.0,
        proxy_rose=bool(smooth_proxy[-1] > smooth_proxy[place]),
        onset=float(kl[place]) if fell else math.nan,
    )


def _in_order_of(proxy: np.ndarray, gold: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(proxy, return_inverse=True, return_counts=True)
    return np.repeat(np.bincount(inverse, weights=gold) / counts, counts)


def _rank_weights(pool: int, n: int) -> np.ndarray:
    ranks = np.arange(pool, 1, -1)
    ratios = np.maximum(ranks - n, 0) / (ranks - 1)
    return n / pool * np.cumprod(np.concatenate([[1.0], ratios]))[::-1]


def _fit_logistic(design: np.ndarray, labels: np.ndarray, ridge: float) -> tuple[np.ndarray, np.ndarray]:
    """Returns the weights and the observed information there, by Newton's method with steps halved as needed."""

    def loss(weights):
        logits = design @ weights
        return np.sum(np.logaddexp(0, logits) - labels * logits) + ridge / 2 * weights @ weights

    def information(weights):
        p = _sigmoid(design @ weights)
        return (design.T * (p * (1 - p))) @ design + ridge * np.eye(len(weights))

    weights = np.zeros(design.shape[1])
    for _ in range(100):
        slope = design.T @ (labels - _sigmoid(design @ weights)) - ridge * weights
        move = np.linalg.solve(information(weights), slope)
        while np.abs(move).max() > 1e-8 and loss(weights + move) > loss(weights):
            move = move / 2
        weights = weights + move
        if np.abs(move).max() <= 1e-8:
            break
    return weights, information(weights)


def _separated(feature: np.ndarray, labels: np.ndarray) -> bool:
    """Returns whether a threshold of the feature parts wins from losses, so that the likelihood has no maximum."""
    won, lost = feature[labels > 0], feature[labels < 1]
    if not len(won) or not len(lost):
        return True
    return bool(np.ptp(feature) > 0 and (won.min() >= lost.max() or won.max() <= lost.min()))


def _sigmoid(logits: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(0.5 * np.asarray(logits)))


def _moving_average(values: np.ndarray) -> np.ndarray:
    return np.convolve(values, np.ones(3), "same") / np.convolve(np.ones_like(values), np.ones(3), "same")


def _same_length(**arrays: np.ndarray) -> list[np.ndarray]:
    rows = [np.asarray(array, np.float64) for array in arrays.values()]
    if any(row.ndim != 1 or row.shape != rows[0].shape for row in rows):
        shapes = ", ".join(f"{name} {row.shape}" for name, row in zip(arrays, rows, strict=True))
        raise ValueError(f"Arrays must be rows of one length; they are {shapes}.")
    return rows


def _refuse_not_finite(**arrays: np.ndarray) -> None:
    for name, array in arrays.items():
        if not np.all(np.isfinite(array)):
            raise ValueError(f"{int(np.sum(~np.isfinite(array)))} of {name} are not finite.")
