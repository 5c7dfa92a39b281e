"""The reward-KL frontier: what a run gained at its KL from the reference, and the most that could be gained.

All in numpy on the host. `kl` is `KL(policy || reference)` in nats per completion, averaged over prompts. The gold reward
is the ground truth, the proxy is the reward that training sees; a gain is the mean gold reward minus the reference
policy's. Every interval has a level of 95%.

Every function raises ValueError for shapes that do not match, non-finite numbers (except where NaN has a meaning), numbers
out of range, and empty input.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxrlhf.evaluation.statistics import NORMAL_95, refuse_non_finite, same_length


class BestOfN(NamedTuple):
    """By size n, `[sizes]` each: the sizes, the expected gold reward of best-of-n, and the upper bound of its KL."""

    sizes: np.ndarray
    gold: np.ndarray
    kl: np.ndarray


class ControlledWinRate(NamedTuple):
    """A length-controlled win rate.

    Attributes:
        rate: `sigmoid(a)`, the win rate at equal length.
        low, high: its interval; NaN if all outcomes agree, or if length separates wins from losses perfectly.
        length_coefficient: `b`, the increase in log-odds from equal length to a far longer text of the policy.
        raw_rate: mean label, the win rate without length control.
        labelled, unlabelled: number of labels used, and number of NaNs.
    """

    rate: float
    low: float
    high: float
    length_coefficient: float
    raw_rate: float
    labelled: int
    unlabelled: int


class OverOptimisation(NamedTuple):
    """Where along a run the gold reward peaks; all rewards are moving averages of width 3.

    Attributes:
        step, kl, peak: step and KL of the largest gold reward, and that reward; the first if several are equal.
        fall: the peak minus the final gold reward, never negative.
        proxy_rose: whether the final proxy reward exceeds that at the peak. A fall with a rising proxy is
            over-optimisation; a fall without it means that the run broke.
        onset: `kl` if the gold reward has fallen since; NaN if it is largest at the end.
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
    """Returns the best-of-n baseline: the expected gold reward of the best of n completions of the reference.

    Averages over all n-subsets of the pool, which is unbiased for n independent samples. In ascending order of the proxy,
    the completion of rank r is the best of a subset with probability `C(r-1, n-1) / C(pool, n)`; equal proxies split
    theirs evenly, as if ties were broken at random. The weights start at the largest, `w[pool] = n / pool`, and follow
    `w[r-1] = w[r] (r-n) / (r-1)`: every factor is at most 1, so they can underflow but not overflow.

    The KL is `log n - (n-1)/n`: exact for continuous scores, where no two are equal, and otherwise an upper bound
    (Beirami et al., arXiv 2401.01879). It holds whichever score selects.

    Args:
        pool_scores: `[prompts, pool]`, gold rewards of the reference's completions.
        proxy_scores: `[prompts, pool]`, the selection score; the gold rewards by default.
        sizes: `[sizes]`, each n from 1 to the pool size; powers of two by default.

    Examples:
        >>> import numpy as np
        >>> from jaxrlhf.evaluation.frontier import best_of_n
        >>> result = best_of_n(np.array([[0.0, 1.0, 2.0, 3.0]]), sizes=[1, 2, 4])
        >>> result.gold.tolist(), result.kl.tolist()
        ([1.5, 2.33, 3.0], [0.0, 0.19, 0.64])
    """
    gold = np.asarray(pool_scores, np.float64)
    proxy = gold if proxy_scores is None else np.asarray(proxy_scores, np.float64)
    if gold.ndim != 2 or gold.size == 0 or proxy.shape != gold.shape:
        raise ValueError(f"Scores must both be [prompts, pool]; they are {gold.shape} and {proxy.shape}.")
    refuse_non_finite(pool_scores=gold, proxy_scores=proxy)
    pool = gold.shape[1]
    n = np.asarray([2**power for power in range(pool.bit_length())] if sizes is None else sizes)
    if n.ndim != 1 or n.dtype.kind not in "iu" or np.any(n < 1) or np.any(n > pool):
        raise ValueError(f"Sizes must be whole numbers from 1 to the pool of {pool}; they are {n.tolist()}.")
    gold_by_rank = np.mean([_sorted_by(*scores) for scores in zip(proxy, gold, strict=True)], axis=0)
    rewards = np.array([_rank_weights(pool, int(size)) @ gold_by_rank for size in n])
    return BestOfN(n, rewards, np.log(n) - (n - 1) / n)


def ideal_gain(kl: np.ndarray | float, spread: np.ndarray | float) -> np.ndarray:
    """Returns `spread sqrt(2 kl)`, the largest gain that a Gaussian reward allows at a KL.

    An exponential tilt attains the largest gain at a given KL; `N(m, s^2)` tilted by `exp(a r)` is `N(m + a s^2, s^2)`:
    gain `a s^2`, KL `a^2 s^2 / 2`. Hence distance is measured as sqrt KL (Gao, Schulman, Hilton, arXiv 2210.10760).
    A non-Gaussian reward may allow more.

    Args:
        kl: at least 0, any shape.
        spread: standard deviation of the reference's reward given the prompt; its root mean square over prompts, since
            all prompts have the same tilt a.
    """
    if np.any(np.asarray(kl) < 0) or np.any(np.asarray(spread) < 0):
        raise ValueError("Neither a KL nor a spread can be negative.")
    return np.asarray(spread, np.float64) * np.sqrt(2 * np.asarray(kl, np.float64))


def length_controlled_win_rate(
    wins: np.ndarray, length_differences: np.ndarray, *, ridge: float = 1e-3
) -> ControlledWinRate:
    """Returns the length-controlled win rate of a policy against a reference: that at equal length.

    Fits `P(win) = sigmoid(a + b tanh(difference / deviation))`, with the standard deviation of the differences, by
    maximising the likelihood minus `ridge / 2 (a^2 + b^2)`; the penalty matters only where the likelihood has no maximum.
    The win rate at equal length is `sigmoid(a)`: AlpacaEval 2 (Dubois et al., arXiv 2404.04475) with one model and
    without the instruction difficulty term. The interval is `sigmoid(a) -+ 1.96 sigmoid'(a) sd(a)` (delta method),
    clipped to [0, 1], with the sandwich variance `H^-1 (sum_i g_i g_i^T) H^-1` of observed information H and scores g,
    which also holds for labels strictly between 0 and 1.

    Args:
        wins: `[N]` in [0, 1]: 1 for a win of the policy, 1/2 for a tie; NaNs (no label) are left out.
        length_differences: `[N]`, length of the policy's text minus the reference's, in tokens.
        ridge: positive; the information of one label is at most 1 / 4.

    Raises:
        ValueError: also if all differences have the same non-zero value, which says nothing about equal length.
    """
    wins, differences = same_length(wins=wins, length_differences=length_differences)
    labelled = ~np.isnan(wins)
    labels, differences = wins[labelled], differences[labelled]
    if not len(labels):
        raise ValueError("No label was given; there is nothing to measure.")
    if np.any((labels < 0) | (labels > 1)):
        raise ValueError("Labels must lie in [0, 1].")
    refuse_non_finite(length_differences=differences)
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
    half_width = math.nan if _separated(feature, labels) else NORMAL_95 * rate * (1 - rate) * deviation
    low, high = np.clip([rate - half_width, rate + half_width], 0, 1)
    return ControlledWinRate(
        rate=rate,
        low=float(low),
        high=float(high),
        length_coefficient=float(b),
        raw_rate=float(labels.mean()),
        labelled=len(labels),
        unlabelled=int(np.sum(~labelled)),
    )


def at_kl(kl: np.ndarray, gold: np.ndarray, target: np.ndarray | float) -> np.ndarray:
    """Returns a method's gain at a KL, with the target's shape: interpolated linearly in sqrt KL between evaluations.

    The curve starts at a gain of 0 at KL 0, replacing anything measured there, and visits evaluations in order of KL;
    those of equal KL are averaged. Beyond the largest KL measured the gain is NaN.

    Args:
        kl: `[evaluations]`, at least 0, in any order.
        gold: `[evaluations]`, gains in gold reward.
        target: `[...]`, the KL to interpolate at.
    """
    kl, gold = same_length(kl=kl, gold=gold)
    if not len(kl):
        raise ValueError("There is no evaluation to read a gain from.")
    refuse_non_finite(kl=kl, gold=gold)
    if np.any(kl < 0):
        raise ValueError("A KL cannot be negative; a noisy estimate of one that is must be raised to 0 first.")
    knots, inverse, counts = np.unique(kl[kl > 0], return_inverse=True, return_counts=True)
    gains = np.bincount(inverse, weights=gold[kl > 0], minlength=len(knots)) / counts
    target = np.asarray(target, np.float64)
    distance = np.sqrt(np.where(target < 0, np.nan, target))
    return np.interp(distance, np.sqrt([0, *knots]), [0, *gains], left=np.nan, right=np.nan)


def over_optimisation(
    kl: np.ndarray, proxy: np.ndarray, gold: np.ndarray, *, steps: np.ndarray | None = None
) -> OverOptimisation:
    """Returns where along a run the gold reward peaks and what happens after (Gao et al., arXiv 2210.10760).

    Rewards are first averaged with their neighbours; the two ends have one neighbour each. Noise gives every plateau some
    peak: a fall is meaningful only if it exceeds the evaluation's error.

    Args:
        kl, proxy, gold: `[evaluations]`, at least 3, in the order of steps.
        steps: `[evaluations]`, 0, 1, ... by default.
    """
    steps = np.arange(np.size(kl)) if steps is None else steps
    kl, proxy, gold, steps = same_length(kl=kl, proxy=proxy, gold=gold, steps=steps)
    if len(kl) < 3:
        raise ValueError(f"A peak needs at least 3 evaluations; there are {len(kl)}.")
    refuse_non_finite(kl=kl, proxy=proxy, gold=gold, steps=steps)
    if np.any(np.diff(steps) <= 0):
        raise ValueError("Evaluations must be in the order of their steps.")
    smooth_gold, smooth_proxy = _moving_average(gold), _moving_average(proxy)
    best = int(np.argmax(smooth_gold))
    peak, end = float(smooth_gold[best]), float(smooth_gold[-1])
    fell = not math.isclose(peak, end, rel_tol=1e-12, abs_tol=1e-12)  # values on a plateau differ by rounding only
    return OverOptimisation(
        step=float(steps[best]),
        kl=float(kl[best]),
        peak=peak,
        fall=peak - end if fell else 0.0,
        proxy_rose=bool(smooth_proxy[-1] > smooth_proxy[best]),
        onset=float(kl[best]) if fell else math.nan,
    )


def _sorted_by(proxy: np.ndarray, gold: np.ndarray) -> np.ndarray:
    """Returns gold rewards in ascending order of the proxy, averaged over ties."""
    _, inverse, counts = np.unique(proxy, return_inverse=True, return_counts=True)
    return np.repeat(np.bincount(inverse, weights=gold) / counts, counts)


def _rank_weights(pool: int, n: int) -> np.ndarray:
    """Returns, by ascending rank, the probability of being the best of an n-subset."""
    ranks = np.arange(pool, 1, -1)
    ratios = np.maximum(ranks - n, 0) / (ranks - 1)
    return n / pool * np.cumprod(np.concatenate([[1.0], ratios]))[::-1]


def _fit_logistic(design: np.ndarray, labels: np.ndarray, ridge: float) -> tuple[np.ndarray, np.ndarray]:
    """Returns the weights and the observed information at them, by Newton's method with step halving."""

    def loss(weights):
        logits = design @ weights
        return np.sum(np.logaddexp(0, logits) - labels * logits) + ridge / 2 * weights @ weights

    def information(weights):
        p = _sigmoid(design @ weights)
        return (design.T * (p * (1 - p))) @ design + ridge * np.eye(len(weights))

    weights = np.zeros(design.shape[1])
    for _ in range(100):
        gradient = design.T @ (labels - _sigmoid(design @ weights)) - ridge * weights
        step = np.linalg.solve(information(weights), gradient)
        while np.abs(step).max() > 1e-8 and loss(weights + step) > loss(weights):
            step = step / 2
        weights = weights + step
        if np.abs(step).max() <= 1e-8:
            break
    return weights, information(weights)


def _separated(feature: np.ndarray, labels: np.ndarray) -> bool:
    """Returns whether a threshold on the feature separates wins from losses, so that the likelihood has no maximum."""
    won, lost = feature[labels > 0], feature[labels < 1]
    if not len(won) or not len(lost):
        return True
    return bool(np.ptp(feature) > 0 and (won.min() >= lost.max() or won.max() <= lost.min()))


def _sigmoid(logits: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(0.5 * np.asarray(logits)))


def _moving_average(values: np.ndarray) -> np.ndarray:
    return np.convolve(values, np.ones(3), "same") / np.convolve(np.ones_like(values), np.ones(3), "same")
