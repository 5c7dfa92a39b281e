"""Exact solutions where the responses to a prompt can be enumerated: `tables`, and the `bandit` as a bilevel problem."""

from jaxrlhf.exact.tables import (
    PolicyEvaluation,
    evaluate_policy,
    expected_cost,
    mean_under,
    row_mean,
    soft_policy,
    soft_value,
    upper_value,
    win_rates,
)

__all__ = [
    "PolicyEvaluation",
    "evaluate_policy",
    "expected_cost",
    "mean_under",
    "row_mean",
    "soft_policy",
    "soft_value",
    "upper_value",
    "win_rates",
]
