"""First-order bilevel descent. Knows no token and no state; depends on jax and optax alone."""

from jaxrlhf.bilevel.descent import (
    BilevelAlgorithm,
    BilevelInfo,
    BilevelState,
    bilevel_descent,
    bilevel_descent_on_losses,
    deployed,
)
from jaxrlhf.bilevel.hypergradient import (
    Evidence,
    HypergradientRule,
    Losses,
    Weights,
    boltzmann,
    central,
    decoupled,
    five_point,
    forward,
    implicit,
    stencil,
    zero_order,
)
from jaxrlhf.bilevel.lower import LowerSolver, LowerTask, closed_form, gradient, shared_adam, tangent
from jaxrlhf.bilevel.problem import SKIPPED, BilevelProblem, Labelled, PairCost, Sample, drawn
from jaxrlhf.bilevel.schedules import Balanced, TheoremSchedule, polynomial_decay, theorem
from jaxrlhf.bilevel.stencil import CENTRAL, FIVE_POINT, FORWARD, Stencil

__all__ = [
    "CENTRAL",
    "FIVE_POINT",
    "FORWARD",
    "SKIPPED",
    "Balanced",
    "BilevelAlgorithm",
    "BilevelInfo",
    "BilevelProblem",
    "BilevelState",
    "Evidence",
    "HypergradientRule",
    "Labelled",
    "Losses",
    "LowerSolver",
    "LowerTask",
    "PairCost",
    "Sample",
    "Stencil",
    "TheoremSchedule",
    "Weights",
    "bilevel_descent",
    "bilevel_descent_on_losses",
    "boltzmann",
    "central",
    "closed_form",
    "decoupled",
    "deployed",
    "drawn",
    "five_point",
    "forward",
    "gradient",
    "implicit",
    "polynomial_decay",
    "shared_adam",
    "stencil",
    "tangent",
    "theorem",
    "zero_order",
]
