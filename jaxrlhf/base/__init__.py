"""What every package here builds on: types, the bilevel problem, importance weights, and the shape of an algorithm.

Depends on jax and optax alone.
"""

from jaxrlhf.base.algorithm import Algorithm
from jaxrlhf.base.problem import SKIPPED, BilevelProblem, Labelled, PairCost, Sample, uniform_measure
from jaxrlhf.base.types import Batch, Key, Params

__all__ = [
    "SKIPPED",
    "Algorithm",
    "Batch",
    "BilevelProblem",
    "Key",
    "Labelled",
    "PairCost",
    "Params",
    "Sample",
    "uniform_measure",
]
