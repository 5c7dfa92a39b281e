"""What every way of estimating provides to the descent step."""

from collections.abc import Callable
from typing import NamedTuple

import jax

from jaxrlhf.base.problem import BilevelProblem
from jaxrlhf.base.types import Params
from jaxrlhf.bilevel.estimate.objectives import SampledObjectives
from jaxrlhf.bilevel.estimate.report import Report
from jaxrlhf.bilevel.rules.rule import HypergradientRule
from jaxrlhf.bilevel.stencil import Index


class Setting(NamedTuple):
    """What is estimated and how; the same at every step.

    Attributes:
        problem: its four functions and the KL price.
        rule: the hypergradient rule.
        beta: weight of the lower level's KL.
        max_importance_weight: bound of the importance weights, or None.
        sequential: whether iterates are computed one after another.
    """

    problem: BilevelProblem
    rule: HypergradientRule
    beta: float | jax.Array
    max_importance_weight: float | None
    sequential: bool


class Levels(NamedTuple):
    """Both levels at one reward phi and one batch; lives inside a trace.

    Attributes:
        tilted_loss: `(lower, index) -> []`, h(phi, lower; tilt) = tilt G - J at that iterate's tilt.
        shared: the objectives on the sample that all iterates share; None where there is no such sample.
        hypergradient: `(lowers, sigma) -> (gradient, Report)`, from the iterates that the solver reached; the backward
            pass through the reward.
    """

    tilted_loss: Callable[[Params, Index], jax.Array]
    shared: SampledObjectives | None
    hypergradient: Callable[[Params, jax.Array], tuple[Params, Report]]
