"""B-Pref's semi-synthetic annotators (arXiv 2111.03026, algorithm 1), by their names there.

From the true rewards of two segments an annotator, in this order,

    skips            a pair neither of whose segments has a return above `skip` times the policy's
    calls a tie      a pair whose returns differ by less than `equal` times the policy's
    is myopic        weights a reward by decay^(steps left in the segment), from here on
    prefers          the higher return, or draws from Bradley-Terry with a rationality
    errs             flips its label with probability `mistake`; ties are not flipped

where "the policy's" is the mean true return of the policy over as many steps as a segment has: thresholds that adapt.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrlhf.base.problem import SKIPPED, Sample
from jaxrlhf.base.types import Key, Params
from jaxrlhf.preferences.annotators import Annotator


class Teacher(NamedTuple):
    """How a teacher judges; the defaults are B-Pref's oracle.

    Attributes:
        rationality: factor on the difference of returns in Bradley-Terry, positive; infinite prefers the higher return.
        decay: in (0, 1]; below 1 is myopic.
        mistake: probability in [0, 1/2] that a label is flipped.
        skip: fraction of the policy's return that one segment must exceed; 0 never skips.
        equal: fraction of the policy's return within which two segments are called equal; 0 never ties.
    """

    rationality: float = float("inf")
    decay: float = 1.0
    mistake: float = 0.0
    skip: float = 0.0
    equal: float = 0.0

    def check(self) -> "Teacher":
        """Returns itself.

        Raises:
            ValueError: naming the field that is out of range.
        """
        for name, valid, expected in (
            ("rationality", self.rationality > 0, "be positive"),
            ("decay", 0 < self.decay <= 1, "lie in (0, 1]"),
            ("mistake", 0 <= self.mistake <= 0.5, "be a probability up to 1/2"),
            ("skip", self.skip >= 0, "not be negative"),
            ("equal", self.equal >= 0, "not be negative"),
        ):
            if not valid:
                raise ValueError(f"A teacher's {name} must {expected}, got {getattr(self, name):g}.")
        return self


TEACHERS = {
    "oracle": Teacher(),
    "stochastic": Teacher(rationality=1.0),
    "mistake": Teacher(mistake=0.1),
    "skip": Teacher(skip=0.1),
    "equal": Teacher(equal=0.1),
    "myopic": Teacher(decay=0.9),
}
"""B-Pref's six, with its values."""


def teacher_annotator(teacher: Teacher = TEACHERS["oracle"], *, labels: int = 1) -> Annotator:
    """Returns the annotator of samples of `trajectories.Segments`, which reads their `gold`.

    Its `frozen` is the policy's mean true return over a segment's length, `[]`; only `skip` and `equal` read it, so that
    any value will do for the others. Returns are not discounted, as in B-Pref.

    Departure: B-Pref leaves skipped pairs out and asks about fewer; here they keep their place, with the label `SKIPPED`.

    Raises:
        ValueError: a field of the teacher is out of range.
    """
    teacher.check()

    def annotate(key: Key, sample: Sample, frozen: Params) -> jax.Array:
        inside = (sample.responses.window > 0).astype(sample.responses.gold.dtype)
        steps = inside * sample.responses.gold
        returns = jnp.sum(steps, axis=-1)
        left = jnp.sum(inside, axis=-1, keepdims=True) - jnp.cumsum(inside, axis=-1)
        judged = jnp.sum(steps * teacher.decay**left, axis=-1)
        difference = (judged[..., 0] - judged[..., 1])[..., None]
        choice_key, mistake_key = jax.random.split(key)
        shape = (*difference.shape[:-1], labels)
        drawn = jax.random.uniform(choice_key, shape)
        if math.isinf(teacher.rationality):
            wins = jnp.broadcast_to(difference > 0, shape)
        else:
            wins = drawn < jax.nn.sigmoid(teacher.rationality * difference)
        wins = wins ^ (jax.random.uniform(mistake_key, shape) < teacher.mistake)
        answer = wins.astype(returns.dtype)
        if teacher.equal > 0:
            near = jnp.abs(returns[..., 0] - returns[..., 1]) < teacher.equal * jnp.asarray(frozen)
            answer = jnp.where(near[..., None], 0.5, answer)
        if teacher.skip > 0:
            poor = jnp.max(returns, axis=-1) < teacher.skip * jnp.asarray(frozen)
            answer = jnp.where(poor[..., None], SKIPPED, answer)
        return answer

    return annotate
