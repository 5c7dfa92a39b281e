"""Test problems whose exact solutions are known.

Each gives exact Phi and hence its exact gradient, the exact gold value of a policy, and random starts, for networks as
for tables. Best known optima are in `experiments/results/convergence/optima.json`, made by `python
experiments/convergence.py --only optima`; where the optimum has a closed form, `optimum` holds it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from jaxrlhf import preferences
from jaxrlhf.base.types import Key, Params
from jaxrlhf.bilevel import (
    Algorithm,
    BilevelProblem,
    HypergradientRule,
    LowerSolver,
    ZeroOrder,
    bilevel_descent,
    zero_order_descent,
)
from jaxrlhf.preferences.annotators import Annotator, Score


class KnownProblem(NamedTuple):
    """A bilevel problem whose exact solution is known.

    The gold value of a policy is J_gold = E gold - beta KL(policy || reference).

    Attributes:
        algorithm: `(rule, solver, upper_optimizer, pairs=None, **options) -> Algorithm`; `pairs` is the number of
            pairs drawn per prompt where there is something to draw, None is exact. `step` is called with `data`.
        frozen: the arrays that no gradient touches.
        data: the data that `step` takes.
        start: `(key, scale) -> (upper, lower)`: a random reward of that scale; the policy starts at the reference.
        solver: solves the lower problems: exactly for tables, by many gradient steps for networks.
        solver_from_labels: as `solver`, but exact for the step's own labelled pairs, as a learner could be, where
            `solver` reads the gold reward; None where there is none.
        best_response_at: `(upper) -> lower`, the exact best response at tilt 0 as a table, for starting on policy; None
            where the policy is no table.
        phi: `(upper) -> []`, exact; its gradient is the exact hypergradient.
        gold_value_of_best_response: `(upper) -> []`, the gold value of the policy that is optimal for this reward.
        gold_value: `(lower) -> []`, the gold value of a policy, exact.
        best_gold_value: `[]`, its maximum over all policies.
        optimum: the least Phi where it is known in closed form, else None.
        beta: weight of the lower level's KL.
        exact_solver: whether `solver` is exact.
    """

    algorithm: Callable[..., Algorithm]
    frozen: Any
    data: Any
    start: Callable[[Key, float], tuple[Params, Params]]
    solver: LowerSolver
    phi: Callable[[Params], jax.Array]
    gold_value_of_best_response: Callable[[Params], jax.Array]
    gold_value: Callable[[Params], jax.Array]
    best_gold_value: jax.Array
    optimum: float | None
    beta: float
    exact_solver: bool
    solver_from_labels: LowerSolver | None = None
    best_response_at: Callable[[Params], Params] | None = None


def annotator(
    score: Score,
    *,
    labels: int,
    pairs: int | None,
    choice: preferences.Choice = preferences.BRADLEY_TERRY,
) -> Annotator:
    """Returns the annotator that fits a sample: expected labels for listed pairs (`pairs` is None), else drawn ones."""
    make = preferences.expected_annotator if pairs is None else preferences.gold_annotator
    return make(score, labels=labels, choice=choice)


def descend(
    problem: BilevelProblem, method: HypergradientRule | ZeroOrder, *arguments: Any, **options: Any
) -> Algorithm:
    """Returns `bilevel_descent` by a hypergradient rule, or `zero_order_descent` by its settings."""
    if isinstance(method, ZeroOrder):
        return zero_order_descent(problem, method, *arguments, **options)
    return bilevel_descent(problem, method, *arguments, **options)
