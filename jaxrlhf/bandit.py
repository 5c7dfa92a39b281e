"""The bandit as a bilevel problem, the smallest instance; the code is in `jaxrlhf.exact.bandit`."""

from jaxrlhf.exact.bandit import Bandit, at_arms, bandit_problem, best_response, gold_score, table

__all__ = ["Bandit", "at_arms", "bandit_problem", "best_response", "gold_score", "table"]
