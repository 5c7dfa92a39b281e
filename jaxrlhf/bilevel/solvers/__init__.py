"""Lower solvers: what moves the policies towards the minimisers of their tilted losses.

A solver is a pair of pure functions with a state of its own (optimiser moments, a critic), so that nothing leaks into
the policies' parameters. It moves the whole stack of iterates, on the same sample and with the same key, because what
the upper level reads is their differences: an error that all tilts share cancels in a stencil, one that differs is
divided by sigma.

| solver | for | what it carries |
|---|---|---|
| `tangent` | networks on a shared sample (the default) | the policy at tilt 0 and its derivative in the tilt |
| `gradient` | any problem | every iterate, with an optimiser over the stack such as `shared_adam` |
| `closed_form` | tables whose best response is a formula | nothing |
"""

from jaxrlhf.bilevel.solvers.closed_form import closed_form
from jaxrlhf.bilevel.solvers.gradient import gradient
from jaxrlhf.bilevel.solvers.shared_adam import SharedAdamState, shared_adam
from jaxrlhf.bilevel.solvers.solver import LowerSolver, LowerTask
from jaxrlhf.bilevel.solvers.tangent import PolicyGradientEstimator, TangentState, loss_gradient, tangent

__all__ = [
    "LowerSolver",
    "LowerTask",
    "PolicyGradientEstimator",
    "SharedAdamState",
    "TangentState",
    "closed_form",
    "gradient",
    "loss_gradient",
    "shared_adam",
    "tangent",
]
