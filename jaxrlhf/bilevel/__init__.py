"""First-order bilevel descent, whatever a response is: tokens, an arm, a trajectory. Imports jax, optax and `base`.

    minimise over phi   Phi(phi) = G(phi, lambda*(phi)),      lambda*(phi) = argmax over lambda of J(phi, lambda)

| symbol | what it is | in the code |
|---|---|---|
| phi | reward parameters, the upper level's variable | `upper` |
| lambda | policy parameters, the lower level's variable | `lower`; one for each tilt, `lowers` `[S, ...]` |
| lambda*(phi) | the best response: the policy that is optimal for the reward | tracked by the `LowerSolver` at tilt 0 |
| G(phi, lambda) | upper objective, E[cost of a pair] + kappa KL; minimised | `evaluate(...).upper`, uncoupled cost aside |
| J(phi, lambda) | lower objective, E[discounted reward] - beta KL; maximised | `evaluate(...).lower` |
| beta | weight of the lower level's KL to the reference, reward per nat | `beta` |
| kappa | weight of the upper level's KL, cost per nat | `BilevelProblem.kl_price` |
| sigma | the perturbation, relative_sigma * beta | `LowerTask.sigma`, `HypergradientRule.relative_sigma` |
| tilt s_i | offset_i sigma; iterate i approximates argmin of h = s_i G - J | `LowerTask.tilts`, `importance.tilted_loss` |
| c_i | coefficient_i / sigma; `sum_i c_i v(s_i)` approximates dv/ds at 0 | `Stencil`, in units of 1 / sigma |
| tangent t | d lambda* / ds at s = 0; iterates are `lambda_0 + s_i t` | `solvers.tangent` |
| mu | the behaviour policy, that drew the sample | `Sample.behaviour_log_prob` |
| w_i | density ratio of iterate i to mu, cumulative over steps | `exp(log_weights)` |

G and J are estimated in one place, `jaxrlhf.base.importance.evaluate`. Phi is the derivative at s = 0 of
min over lambda of h(phi, lambda; s), so grad Phi is approximated by the *penalty gradient*
`sum_i c_i grad_phi h(phi, lambda_i; s_i)`, each lambda_i held fixed: first-order gradients only.

Read `descent`, then `estimate/shared_sample` (with `estimate/objectives`), `solvers/tangent` and `rules/penalty`: the
default algorithm in the order in which a step runs it. `examples/bilevel_by_hand.py` is the same penalty gradient in a
page of plain code, on a bandit that needs no samples.
"""

from jaxrlhf.base.algorithm import Algorithm
from jaxrlhf.base.problem import SKIPPED, BilevelProblem, Labelled, PairCost, Sample, uniform_measure
from jaxrlhf.bilevel.descent import BilevelInfo, BilevelState, bilevel_descent, bilevel_descent_on_losses
from jaxrlhf.bilevel.rules import (
    HypergradientRule,
    Losses,
    PolicyFunctions,
    RuleInputs,
    Weights,
    boltzmann,
    central,
    decoupled,
    five_point,
    forward,
    implicit,
    implicit_from_direction,
    penalty,
)
from jaxrlhf.bilevel.schedules import Balanced, TheoremSchedule, polynomial_decay, theorem
from jaxrlhf.bilevel.solvers import (
    LowerSolver,
    LowerTask,
    PolicyGradientEstimator,
    closed_form,
    gradient,
    loss_gradient,
    shared_adam,
    tangent,
)
from jaxrlhf.bilevel.stencil import CENTRAL, FIVE_POINT, FORWARD, Stencil
from jaxrlhf.bilevel.zero_order import ZeroOrder, zero_order, zero_order_descent, zero_order_descent_on_losses

__all__ = [
    "CENTRAL",
    "FIVE_POINT",
    "FORWARD",
    "SKIPPED",
    "Algorithm",
    "Balanced",
    "BilevelInfo",
    "BilevelProblem",
    "BilevelState",
    "HypergradientRule",
    "Labelled",
    "Losses",
    "LowerSolver",
    "LowerTask",
    "PairCost",
    "PolicyFunctions",
    "PolicyGradientEstimator",
    "RuleInputs",
    "Sample",
    "Stencil",
    "TheoremSchedule",
    "Weights",
    "ZeroOrder",
    "bilevel_descent",
    "bilevel_descent_on_losses",
    "boltzmann",
    "central",
    "closed_form",
    "decoupled",
    "five_point",
    "forward",
    "gradient",
    "implicit",
    "implicit_from_direction",
    "loss_gradient",
    "penalty",
    "polynomial_decay",
    "shared_adam",
    "tangent",
    "theorem",
    "uniform_measure",
    "zero_order",
    "zero_order_descent",
    "zero_order_descent_on_losses",
]
