"""What a problem with known answers offers.

Each gives exact Phi and hence its exact gradient, the exact true return, and random starts, for networks as for tables.
Best known optima are in `experiments/results/convergence/optima.json`, made by `python experiments/convergence.py --only
optima`; where the optimum has a closed form, `optimum` holds it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from jaxrlhf.base.types import Key, Params
from jaxrlhf.bilevel import BilevelAlgorithm, LowerSolver


class KnownProblem(NamedTuple):
    """A bilevel problem whose exact answers are at hand.

    Attributes:
        algorithm: `(rule, solver, upper_optimizer, pairs=None, **options) -> BilevelAlgorithm`; `pairs` draws that many a
            prompt where there is something to draw, None is exact. `step`'s data is `data`.
        frozen: what no gradient touches.
        data: what `step` takes beside it.
        start: `(key, scale) -> (upper, lower)`, random of that scale; the policy starts at the reference.
        solver: solves the lower problems: exactly for tables, by many gradient steps for networks.
        solver_from_labels: as `solver`, exact for the step's own labelled pairs: a learner's, where `solver` knows
            the gold reward; None where there is none.
        best_response_at: `(upper) -> lower`, the exact answer at tilt 0 where it is a table: where to start on policy.
        phi: `(upper) -> []`, exact; its gradient is the exact hypergradient.
        exploited: `(upper) -> []`, J_gold of the exactly optimal policy of that reward: what Phi's argument is worth.
        worth: `(lower) -> []`, J_gold = E gold - beta KL of a policy, exact.
        best_worth: `[]`, max over all policies.
        optimum: the least Phi where it is known in closed form, else None.
        beta: weight of the lower level's KL.
        exact_solver: whether `solver` is exact.
    """

    algorithm: Callable[..., BilevelAlgorithm]
    frozen: Any
    data: Any
    start: Callable[[Key, float], tuple[Params, Params]]
    solver: LowerSolver
    phi: Callable[[Params], jax.Array]
    exploited: Callable[[Params], jax.Array]
    worth: Callable[[Params], jax.Array]
    best_worth: jax.Array
    optimum: float | None
    beta: float
    exact_solver: bool
    solver_from_labels: LowerSolver | None = None
    best_response_at: Callable[[Params], Params] | None = None
