"""Annotators: from two responses to labels.

An annotator is a function `(key, sample, frozen) -> labels [B, M, L]`: 1 prefers response 0, 0 response 1, 1/2 calls a
tie, `SKIPPED` gives no answer. One that JAX can trace is given to `bilevel_descent`; one that cannot (a person, a judge,
a text score) sits between `propose` and `update` and may still use `draw_labels` for its noise. Labels consumed are
counted by the algorithm, in `BilevelInfo.labels`.

Real annotators err in ways that B-Pref (arXiv 2111.03026) named; `Choice` holds them, and gives the likelihood that each
combination implies, which `objectives.likelihood` fits.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrlhf.bilevel.problem import SKIPPED, Labelled, Sample
from jaxrlhf.types import Key, Params

Annotator = Callable[[Key, Sample, Params], jax.Array]
Score = Callable[[Sample, Params], jax.Array]


class Choice(NamedTuple):
    """How an annotator chooses between two scores; the defaults are Bradley-Terry.

    With `d = (score_0 - score_1) / temperature + position`, before mistakes

        P(0 preferred) = sigmoid(d - tie),    P(1 preferred) = sigmoid(-d - tie),    P(tie) = the rest   (Rao-Kupper).

    Attributes:
        temperature: in units of the score, positive; small is decisive.
        mistake: probability in [0, 1/2] that a preference is given the wrong way round; ties are not.
        tie: half the width, in units of d, of the zone of indifference.
        position: what being response 0 is worth, in units of d; 0 is fair.
        skip_below: pairs whose better score is below this are skipped; None skips none. Whether a pair is skipped follows
            from the annotator's own scores, so the likelihood of a given answer is that of an annotator who never skips. A
            skipped pair costs nothing, which a coupled cost whose least value is 0 rewards: prefer `utility` there.
    """

    temperature: float = 1.0
    mistake: float = 0.0
    tie: float = 0.0
    position: float = 0.0
    skip_below: float | None = None

    def check(self) -> "Choice":
        """Returns itself.

        Raises:
            ValueError: a value is out of range.
        """
        if not self.temperature > 0:
            raise ValueError(f"An annotator's temperature must be positive, got {self.temperature:g}.")
        if not 0 <= self.mistake <= 0.5:
            raise ValueError(f"An annotator's mistake must be a probability up to 1/2, got {self.mistake:g}.")
        if not self.tie >= 0:
            raise ValueError(f"An annotator's tie must not be negative, got {self.tie:g}.")
        return self


BRADLEY_TERRY = Choice()


def log_outcomes(scores: jax.Array, choice: Choice = BRADLEY_TERRY) -> jax.Array:
    """Returns the log-probabilities of the labels 0, 1/2 and 1 given an answer, `[..., 3]` from scores `[..., 2]`."""
    difference = (scores[..., 0] - scores[..., 1]) / choice.temperature + choice.position
    wins, loses = jax.nn.log_sigmoid(difference - choice.tie), jax.nn.log_sigmoid(-difference - choice.tie)
    if choice.tie > 0:
        # 1 - s(d - t) - s(-d - t) = s(d - t) s(-d - t) (e^2t - 1)
        width = 2.0 * jnp.asarray(choice.tie, scores.dtype)
        ties = wins + loses + width + jnp.log1p(-jnp.exp(-width))
    else:
        ties = jnp.full_like(wins, -jnp.inf)
    if choice.mistake > 0:
        right, wrong = jnp.log1p(-choice.mistake), jnp.log(choice.mistake)
        wins, loses = jnp.logaddexp(right + wins, wrong + loses), jnp.logaddexp(right + loses, wrong + wins)
    return jnp.stack([loses, ties, wins], axis=-1)


def preference(scores: jax.Array, choice: Choice = BRADLEY_TERRY) -> jax.Array:
    """Returns the expected label `[...]`, P(0 preferred) + P(tie) / 2, from scores `[..., 2]`; `SKIPPED` where skipped."""
    if choice == BRADLEY_TERRY:
        return jax.nn.sigmoid(scores[..., 0] - scores[..., 1])
    outcomes = jnp.exp(log_outcomes(scores, choice))
    return _unless_skipped(outcomes[..., 2] + 0.5 * outcomes[..., 1], scores, choice)


def draw_labels(key: Key, scores: jax.Array, *, labels: int = 1, choice: Choice = BRADLEY_TERRY) -> jax.Array:
    """Draws `labels` independent labels a pair, `[..., L]` in {0, 1/2, 1, SKIPPED}, from scores `[..., 2]`.

    Consumes the key.
    """
    uniform = jax.random.uniform(key, (*scores.shape[:-1], labels), scores.dtype)
    if choice == BRADLEY_TERRY:
        return (uniform < preference(scores)[..., None]).astype(scores.dtype)
    outcomes = jnp.exp(log_outcomes(scores, choice))[..., None, :]
    wins = uniform < outcomes[..., 2]
    ties = ~wins & (uniform < outcomes[..., 2] + outcomes[..., 1])
    drawn = wins.astype(scores.dtype) + 0.5 * ties.astype(scores.dtype)
    return _unless_skipped(drawn, scores[..., None, :], choice)


def gold_annotator(score: Score, *, labels: int = 1, choice: Choice = BRADLEY_TERRY) -> Annotator:
    """Returns an annotator that draws its labels by a gold score.

    Args:
        score: `(sample, frozen) -> [B, M, 2]`, traceable; it may be a reward model whose weights are in `frozen`.
        labels: labels a pair.
        choice: how it chooses.

    Raises:
        ValueError: the choice is out of range.
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
    """As `gold_annotator`, for samples that list every pair with the share of its draws: the mean of that many labels.

    The label of a pair drawn n times is Binomial(n, P) / n; a pair that was not drawn has measure 0 and any label.

    Raises:
        ValueError: the choice knows ties or skips, whose labels a count cannot hold.
    """
    if choice.check().tie or choice.skip_below is not None:
        raise ValueError("counted_annotator holds no ties and no skipped pairs; use gold_annotator on drawn pairs.")

    def annotate(key, sample, frozen):
        counts = jnp.round(sample.measure * sample.draws * sample.measure.shape[0])
        probability = preference(score(sample, frozen), choice)
        wins = jax.random.binomial(key, counts, probability, dtype=probability.dtype)
        return (wins / jnp.maximum(counts, 1.0))[..., None]

    return annotate


def from_both_sides(labelled: Labelled) -> Labelled:
    """Returns every policy-policy pair twice, `[B, 2 M]`: either response as the policy's, against the other held fixed.

    The label of the swapped pair is 1 - z. What holds the policy responsible for winning (`objectives.utility`) is then
    self-play: its gradient is that of the win rate against the policy as it is, and not 0, as it is where both responses
    of a pair follow the policy. All responses count in the lower level, and no label is paid for twice; `info.labels`
    counts both sides.

    A pair's two sides are each other's baseline too, which scales the gradient of a coupled cost by 2 M / (2 M - 1).
    """
    sample, labels = labelled

    def both(leaf):
        return jnp.concatenate([leaf, leaf[:, :, ::-1]], axis=1)

    sample = sample._replace(
        responses=jax.tree.map(both, sample.responses),
        behaviour_log_prob=both(sample.behaviour_log_prob),
        reference_log_prob=both(sample.reference_log_prob),
        discount=both(sample.discount),
        measure=jnp.concatenate([sample.measure, sample.measure], axis=1) / 2,
        by_policy=jnp.array([1.0, 0.0], sample.by_policy.dtype),
        draws=2 * sample.draws,
    )
    return Labelled(sample, jnp.concatenate([labels, jnp.where(labels < 0, labels, 1.0 - labels)], axis=1))


def myopic(step_score: Score, *, decay: float) -> Score:
    """Returns the score of an annotator who forgets: `sum_t decay^(steps left after t) score_t` (B-Pref's myopia).

    Args:
        step_score: `(sample, frozen) -> [B, M, 2, T]`.
        decay: in (0, 1]; 1 remembers everything.

    Raises:
        ValueError: the decay is out of range.
    """
    if not 0 < decay <= 1:
        raise ValueError(f"A myopic annotator's decay must be in (0, 1], got {decay:g}.")

    def score(sample, frozen):
        taken = (sample.discount > 0).astype(sample.discount.dtype)
        left = jnp.sum(taken, axis=-1, keepdims=True) - jnp.cumsum(taken, axis=-1)
        return jnp.sum(taken * decay**left * step_score(sample, frozen), axis=-1)

    return score


def _unless_skipped(labels: jax.Array, scores: jax.Array, choice: Choice) -> jax.Array:
    if choice.skip_below is None:
        return labels
    return jnp.where(jnp.max(scores, axis=-1) < choice.skip_below, SKIPPED, labels)
