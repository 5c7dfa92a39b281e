"""Sentences on diagnostics of a finished run that lie where `docs/diagnostics.md` says to worry."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

FEWEST_STEPS = 10
"""Shorter runs are trials: their diagnostics are those of the warm-up."""


class Worry(NamedTuple):
    """When to worry about a diagnostic, what it then means, and what to do.

    Attributes:
        field: of a step's diagnostics.
        above: whether values above the bound are worrying, else those below.
        bound: of the median over the last half of the steps.
        meaning, remedy: for the sentence.
    """

    field: str
    above: bool
    bound: float
    meaning: str
    remedy: str


WORRIES = (
    Worry(
        "coupling_fraction",
        True,
        0.9,
        "the policy's response to the reward is drowned in noise",
        "lower --tangent-learning-rate tenfold, or raise --pairs",
    ),
    Worry(
        "ess_fraction",
        False,
        0.5,
        "within a step the policies move too far from the one that was sampled",
        "lower --policy-learning-rate",
    ),
    Worry(
        "collision_rate",
        True,
        0.3,
        "pairs of equal completions say nothing",
        "raise --kl-price, so that the policy keeps its variety",
    ),
    Worry(
        "value_gap",
        False,
        -0.05,
        "perturbed policies are ahead of the policy itself, which lags behind its reward",
        "raise --policy-learning-rate",
    ),
)
"""Of `align --method bilevel`, as in `docs/diagnostics.md`."""


def worries(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Returns a sentence for each diagnostic that was where to worry, by its median over the last half of the steps.

    Args:
        rows: diagnostics by step, of a run of `align --method bilevel`.
    """
    if len(rows) < FEWEST_STEPS:
        return []
    sentences = []
    for field, above, bound, meaning, remedy in WORRIES:
        values = [row[field] for row in rows[len(rows) // 2 :] if field in row]
        # Of kept labels it is the share of pairs that still count, which has a sentence of its own.
        if not values or (field == "ess_fraction" and "age" in rows[-1]):
            continue
        median = float(np.median(values))
        if np.isfinite(median) and (median > bound if above else median < bound):
            where = "above" if above else "below"
            sentences.append(
                f"{field} was {median:.3g} in the last half of the steps (median), {where} {bound:g}: {meaning}; {remedy} "
                "(docs/diagnostics.md)."
            )
    return sentences
