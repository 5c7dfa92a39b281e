"""Which pairs to ask about, and recent pairs kept for the policy.

A query is chosen from many candidates by a score per candidate, from the win probabilities `[E, M]` that the members of
an ensemble predict (arXiv 1706.03741, 2106.05091):

    disagreement    standard deviation over the members
    entropy         of the label as the ensemble's mean predicts it, in nats
"""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

from jaxrlhf.base.problem import SKIPPED, Labelled, Sample
from jaxrlhf.base.types import Key
from jaxrlhf.preferences.objectives import Objective, weighted

Criterion = Literal["uniform", "disagreement", "entropy"]
"""How a query is chosen."""


def disagreement(probabilities: jax.Array) -> jax.Array:
    """Returns the standard deviation of the win probabilities over the members, `[M]` from `[E, M]`."""
    return jnp.std(probabilities, axis=0)


def entropy(probabilities: jax.Array) -> jax.Array:
    """Returns the entropy in nats of the label that the mean member predicts, `[M]` from `[E, M]`."""
    mean = jnp.mean(probabilities, axis=0)
    return jax.scipy.special.entr(mean) + jax.scipy.special.entr(1.0 - mean)


def choose(key: Key, probabilities: jax.Array, count: int, criterion: Criterion = "disagreement") -> jax.Array:
    """Returns the indices of `count` different candidates, `[count]`. Consumes the key, which only "uniform" needs.

    Args:
        key: of the draw.
        probabilities: win probabilities of the candidates `[E, M]`, by member.
        count: of pairs to ask about.
        criterion: "uniform" draws; the others take the highest scores, the earlier candidate where they tie.

    Raises:
        ValueError: there are fewer candidates than `count`, or no such criterion.
    """
    candidates = probabilities.shape[1]
    if not 1 <= count <= candidates:
        raise ValueError(f"A query takes 1 to {candidates} of the {candidates} candidate pairs, got {count}.")
    if criterion == "uniform":
        return jax.random.permutation(key, candidates)[:count]
    if criterion not in ("disagreement", "entropy"):
        raise ValueError(f"There is no criterion {criterion!r}; there are uniform, disagreement and entropy.")
    score = {"disagreement": disagreement, "entropy": entropy}[criterion]
    return jax.lax.top_k(score(probabilities), count)[1]


def unlabelled(sample: Sample, *, labels: int = 1) -> Labelled:
    """Returns the sample with every one of its `labels` labels a pair marked as skipped."""
    return Labelled(sample, jnp.full((*sample.measure.shape, labels), SKIPPED))


def share_labelled(objective: Objective, fraction: float) -> Objective:
    """Returns an objective that stays unbiased when only a fraction of the pairs, drawn at random, is labelled.

    Costs of pairs are divided by the fraction; skipped pairs cost nothing, and the KL price is counted on all.

    Raises:
        ValueError: the fraction lies outside of (0, 1].
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"The labelled fraction of the pairs must lie in (0, 1], got {fraction:g}.")

    return weighted(objective, 1.0 / fraction)


def slide(recent: Sample, latest: Sample) -> Sample:
    """Returns the recent pairs `[1, N, ...]` with the oldest dropped and the latest appended, all of equal measure."""
    count, fresh = recent.measure.shape[1], latest.measure.shape[1]
    moved = _by_pair(lambda old, new: jnp.concatenate([old[:, fresh:], new], axis=1), recent, latest)
    return moved._replace(
        measure=jnp.full_like(recent.measure, 1.0 / count), num_draws=jnp.full_like(latest.num_draws, count)
    )


def repeated(sample: Sample, times: int) -> Sample:
    """Returns the pairs repeated, `[1, times M, ...]`, to fill what `slide` moves before the first step."""
    return _by_pair(lambda leaf: jnp.concatenate([leaf] * times, axis=1), sample)


def _by_pair(function: Callable[..., jax.Array], *samples: Sample) -> Sample:
    """Applies a function to the leaves `[1, M, ...]`; the others are the last sample's."""
    last = samples[-1]
    each = [sample._replace(prompts=None, from_policy=None, num_draws=None) for sample in samples]
    moved = jax.tree.map(function, *each)
    return moved._replace(prompts=last.prompts, from_policy=last.from_policy, num_draws=last.num_draws)
