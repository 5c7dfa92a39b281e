"""How annotators choose: from two scores to the probability of a label, and to drawn labels.

Real annotators err in ways that B-Pref (arXiv 2111.03026) named. `Choice` holds them and gives the likelihood that each
combination implies, which `objectives.likelihood` fits.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrlhf.base.problem import SKIPPED
from jaxrlhf.base.types import Key


class Choice(NamedTuple):
    """How an annotator chooses between two scores; the defaults are Bradley-Terry.

    With `d = (score_0 - score_1) / temperature + position`, before mistakes

        P(0 preferred) = sigmoid(d - tie),    P(1 preferred) = sigmoid(-d - tie),    P(tie) = the rest   (Rao-Kupper).

    Attributes:
        temperature: in units of the score, positive; small is decisive.
        mistake: probability in [0, 1/2] that a preference is flipped; ties are not. In a likelihood it may be traced: a
            rate that is measured as labels come.
        tie: half the width, in units of d, of the zone of indifference.
        position: bias towards response 0, in units of d; 0 is fair.
        skip_below: pairs whose better score is below this are skipped; None skips none. Skipping depends on the scores
            alone, so the likelihood of a label is that of an annotator who never skips. A skipped pair costs nothing: a
            coupled cost whose least value is 0 rewards policies that are skipped. Prefer `utility` there.
    """

    temperature: float = 1.0
    mistake: float | jax.Array = 0.0
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
        if not isinstance(self.mistake, jax.Array) and not 0 <= self.mistake <= 0.5:
            raise ValueError(f"An annotator's mistake must be a probability up to 1/2, got {self.mistake:g}.")
        if not self.tie >= 0:
            raise ValueError(f"An annotator's tie must not be negative, got {self.tie:g}.")
        return self


BRADLEY_TERRY = Choice()


def log_outcomes(scores: jax.Array, choice: Choice = BRADLEY_TERRY) -> jax.Array:
    """Returns log-probabilities `[..., 3]` of the labels 0, 1/2 and 1, given that there is one, from scores `[..., 2]`."""
    difference = (scores[..., 0] - scores[..., 1]) / choice.temperature + choice.position
    wins, loses = jax.nn.log_sigmoid(difference - choice.tie), jax.nn.log_sigmoid(-difference - choice.tie)
    if choice.tie > 0:
        # 1 - s(d - t) - s(-d - t) = s(d - t) s(-d - t) (e^2t - 1)
        width = 2.0 * jnp.asarray(choice.tie, scores.dtype)
        ties = wins + loses + width + jnp.log1p(-jnp.exp(-width))
    else:
        ties = jnp.full_like(wins, -jnp.inf)
    if isinstance(choice.mistake, jax.Array) or choice.mistake > 0:
        right, wrong = jnp.log1p(-choice.mistake), jnp.log(choice.mistake)
        wins, loses = jnp.logaddexp(right + wins, wrong + loses), jnp.logaddexp(right + loses, wrong + wins)
    return jnp.stack([loses, ties, wins], axis=-1)


def preference(scores: jax.Array, choice: Choice = BRADLEY_TERRY) -> jax.Array:
    """Returns the expected label `[...]`, P(0 preferred) + P(tie) / 2, from scores `[..., 2]`; `SKIPPED` where skipped.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jaxrlhf.preferences import Choice, preference
        >>> scores = jnp.array([[1.0, 0.0], [0.0, 0.0]])
        >>> preference(scores).tolist()
        [0.73, 0.5]
        >>> preference(scores, Choice(mistake=0.1)).tolist()
        [0.68, 0.5]
    """
    if choice == BRADLEY_TERRY:
        return jax.nn.sigmoid(scores[..., 0] - scores[..., 1])
    outcomes = jnp.exp(log_outcomes(scores, choice))
    return _unless_skipped(outcomes[..., 2] + 0.5 * outcomes[..., 1], scores, choice)


def draw_labels(key: Key, scores: jax.Array, *, labels: int = 1, choice: Choice = BRADLEY_TERRY) -> jax.Array:
    """Draws `labels` independent labels a pair, `[..., L]` in {0, 1/2, 1, SKIPPED}, from scores `[..., 2]`.

    Consumes the key.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jaxrlhf.preferences import draw_labels
        >>> draw_labels(jax.random.key(0), jnp.array([[9.0, -9.0], [-9.0, 9.0]]), labels=2).tolist()
        [[1.0, 1.0], [0.0, 0.0]]
    """
    uniform = jax.random.uniform(key, (*scores.shape[:-1], labels), scores.dtype)
    if choice == BRADLEY_TERRY:
        return (uniform < preference(scores)[..., None]).astype(scores.dtype)
    outcomes = jnp.exp(log_outcomes(scores, choice))[..., None, :]
    wins = uniform < outcomes[..., 2]
    ties = ~wins & (uniform < outcomes[..., 2] + outcomes[..., 1])
    drawn = wins.astype(scores.dtype) + 0.5 * ties.astype(scores.dtype)
    return _unless_skipped(drawn, scores[..., None, :], choice)


def _unless_skipped(labels: jax.Array, scores: jax.Array, choice: Choice) -> jax.Array:
    if choice.skip_below is None:
        return labels
    return jnp.where(jnp.max(scores, axis=-1) < choice.skip_below, SKIPPED, labels)
