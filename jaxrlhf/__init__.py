"""Online RLHF as one bilevel problem, in JAX, with first-order gradients only.

Rooms, in the order in which they may import each other:

- `base`: the bilevel problem, importance weights, the shape of an algorithm. `bilevel`: the method itself.
- `preferences` (annotators, objectives), `evaluation` (statistics on the host), `algorithms` (baselines, replay, control).
- `exact` (tables, the bandit), `mdp`, `control`, `data`, `lm`: instances, from enumerable to pretrained.
- `annotation` (people, functions and language models that label), `known` (problems with exact answers), `training`
  (compilation, sharding, checkpoints), `commands` (the command line).

`jaxrlhf.objectives` and `jaxrlhf.bandit` are short names for modules of `preferences` and `exact`.
"""

__version__ = "0.1.0"

from jaxrlhf import bilevel, preferences
from jaxrlhf.bilevel import (
    Algorithm,
    BilevelInfo,
    BilevelProblem,
    BilevelState,
    Labelled,
    Sample,
    bilevel_descent,
    boltzmann,
    central,
    decoupled,
    five_point,
    forward,
    tangent,
)
from jaxrlhf.preferences import objectives

__all__ = [
    "Algorithm",
    "BilevelInfo",
    "BilevelProblem",
    "BilevelState",
    "Labelled",
    "Sample",
    "bilevel",
    "bilevel_descent",
    "boltzmann",
    "central",
    "decoupled",
    "five_point",
    "forward",
    "objectives",
    "preferences",
    "tangent",
]
