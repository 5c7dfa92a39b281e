"""Online RLHF as one bilevel problem, in JAX, with first-order gradients only.

The core is `jaxrlhf.bilevel`; `jaxrlhf.objectives` and `jaxrlhf.preferences` say what is minimised and who labels;
`jaxrlhf.bandit`, `jaxrlhf.exact` and `jaxrlhf.lm` are its instances; `jaxrlhf.training` runs it.
"""

__version__ = "0.1.0"

from jaxrlhf import bilevel, preferences
from jaxrlhf.bilevel import (
    BilevelAlgorithm,
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
    "BilevelAlgorithm",
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
