"""Annotators: from a sample's pairs to labels.

An annotator is a function `(key, sample, frozen) -> labels [B, M, L]`: 1 prefers response 0, 0 prefers response 1, 1/2
is a tie, `SKIPPED` is no label. One that JAX can trace is given to `bilevel_descent`; one that cannot be traced (a person,
a language model, a score of texts) stands between `propose` and `update`, and may still use `draw_labels` for its noise.
The algorithm counts the labels consumed, in `BilevelInfo.labels`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxrlhf.base.problem import Labelled, Sample
from jaxrlhf.base.types import Key, Params
from jaxrlhf.preferences.choice import BRADLEY_TERRY, Choice, draw_labels, preference

Annotator = Callable[[Key, Sample, Params], jax.Array]
Score = Callable[[Sample, Params], jax.Array]


def gold_annotator(score: Score, *, labels: int = 1, choice: Choice = BRADLEY_TERRY) -> Annotator:
    """Returns an annotator that draws its labels by a gold score.

    Args:
        score: `(sample, frozen) -> [B, M, 2]`, traceable; it may be a reward model whose weights are in `frozen`.
        labels: labels a pair.
        choice: how it chooses.

    Raises:
        ValueError: the choice is out of range.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jaxrlhf import preferences
        >>> annotate = preferences.gold_annotator(lambda sample, frozen: 20.0 * sample)  # here a "sample" is its scores
        >>> annotate(jax.random.key(0), jnp.array([[[1.0, 0.0], [0.0, 1.0]]]), None).tolist()
        [[[1.0], [0.0]]]
    """
    choice.check()

    def annotate(key, sample, frozen):
        return draw_labels(key, score(sample, frozen), labels=labels, choice=choice)

    return annotate


def expected_annotator(score: Score, *, labels: int = 1, choice: Choice = BRADLEY_TERRY) -> Annotator:
    """As `gold_annotator`, with the expected label in place of a draw: for enumerated samples, whose costs are then exact.

    Every objective is linear in each label (the likelihood of an annotator with ties is not: draw its labels), so the
    expected label gives the expected cost.
    """
    choice.check()

    def annotate(key, sample, frozen):
        del key
        return jnp.repeat(preference(score(sample, frozen), choice)[..., None], labels, axis=-1)

    return annotate


def counted_annotator(score: Score, *, choice: Choice = BRADLEY_TERRY) -> Annotator:
    """As `gold_annotator`, for samples that list every pair with its fraction of the draws: the mean of that many labels.

    The label of a pair drawn n times is Binomial(n, P) / n; a pair that was not drawn has measure 0 and any label.

    Raises:
        ValueError: the choice knows ties or skips, whose labels a count cannot hold.
    """
    if choice.check().tie or choice.skip_below is not None:
        raise ValueError("counted_annotator holds no ties and no skipped pairs; use gold_annotator on drawn pairs.")

    def annotate(key, sample, frozen):
        counts = jnp.round(sample.measure * sample.num_draws * sample.measure.shape[0])
        probability = preference(score(sample, frozen), choice)
        wins = jax.random.binomial(key, counts, probability, dtype=probability.dtype)
        return (wins / jnp.maximum(counts, 1.0))[..., None]

    return annotate


def from_both_sides(labelled: Labelled) -> Labelled:
    """Returns every policy-policy pair twice, `[B, 2 M]`: each response once as the policy's, the other held fixed.

    The label of the swapped pair is 1 - z. The coupled utility is then self-play: its gradient is that of the win rate
    against the policy held fixed, not 0 as where both responses of a pair depend on the policy. All responses count in
    the lower level, and no label is paid for twice; `info.labels` counts both sides.

    A pair's two sides are each other's baseline too, which scales the gradient of a coupled cost by 2 M / (2 M - 1).
    """
    sample, labels = labelled

    def both(leaf):
        return jnp.concatenate([leaf, leaf[:, :, ::-1]], axis=1)

    sample = sample._replace(
        responses=jax.tree.map(both, sample.responses),
        behaviour_log_prob=both(sample.behaviour_log_prob),
        reference_log_prob=both(sample.reference_log_prob),
        cumulative_discount=both(sample.cumulative_discount),
        measure=jnp.concatenate([sample.measure, sample.measure], axis=1) / 2,
        from_policy=jnp.array([1.0, 0.0], sample.from_policy.dtype),
        num_draws=2 * sample.num_draws,
    )
    return Labelled(sample, jnp.concatenate([labels, jnp.where(labels < 0, labels, 1.0 - labels)], axis=1))


def myopic(step_score: Score, *, decay: float) -> Score:
    """Returns the score of a myopic annotator: `sum_t decay^(steps left after t) score_t` (B-Pref's myopia).

    Args:
        step_score: `(sample, frozen) -> [B, M, 2, T]`.
        decay: in (0, 1]; 1 weights all steps alike.

    Raises:
        ValueError: the decay is out of range.
    """
    if not 0 < decay <= 1:
        raise ValueError(f"A myopic annotator's decay must be in (0, 1], got {decay:g}.")

    def score(sample, frozen):
        taken = (sample.cumulative_discount > 0).astype(sample.cumulative_discount.dtype)
        left = jnp.sum(taken, axis=-1, keepdims=True) - jnp.cumsum(taken, axis=-1)
        return jnp.sum(taken * decay**left * step_score(sample, frozen), axis=-1)

    return score
