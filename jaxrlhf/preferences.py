"""Annotators: from two responses to labels.

An annotator is a function `(key, sample, frozen) -> labels [B, M, L]`. One that JAX can trace is given to
`bilevel_descent`; one that cannot (a person, a judge, a text score) sits between `propose` and `update` and may still use
`bradley_terry` for its noise. Labels consumed are counted by the algorithm, in `BilevelInfo.labels`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxrlhf.bilevel.problem import Sample
from jaxrlhf.types import Key, Params

Annotator = Callable[[Key, Sample, Params], jax.Array]


def preference(scores: jax.Array) -> jax.Array:
    """Returns P(response 0 preferred) = sigmoid(score_0 - score_1), `[...]` from scores `[..., 2]` (Bradley-Terry)."""
    return jax.nn.sigmoid(scores[..., 0] - scores[..., 1])


def bradley_terry(key: Key, scores: jax.Array, *, labels: int = 1) -> jax.Array:
    """Draws `labels` independent labels a pair, `[..., L]` in {0, 1}, from scores `[..., 2]`. Consumes the key."""
    probability = preference(scores)[..., None]
    uniform = jax.random.uniform(key, (*probability.shape[:-1], labels), probability.dtype)
    return (uniform < probability).astype(probability.dtype)


def gold_annotator(score: Callable[[Sample, Params], jax.Array], *, labels: int = 1) -> Annotator:
    """Returns an annotator whose labels follow Bradley-Terry on a gold score.

    Args:
        score: `(sample, frozen) -> [B, M, 2]`, traceable; it may be a reward model whose weights are in `frozen`.
        labels: labels a pair.
    """

    def annotate(key, sample, frozen):
        return bradley_terry(key, score(sample, frozen), labels=labels)

    return annotate


def expected_annotator(score: Callable[[Sample, Params], jax.Array], *, labels: int = 1) -> Annotator:
    """As `gold_annotator`, with the probability in place of a draw: for enumerated samples, whose costs are then exact.

    Every objective here is linear in each label, so the expected label gives the expected cost.
    """

    def annotate(key, sample, frozen):
        del key
        probability = preference(score(sample, frozen))[..., None]
        return jnp.repeat(probability, labels, axis=-1)

    return annotate
