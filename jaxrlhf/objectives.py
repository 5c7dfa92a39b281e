"""Upper objectives; the code is in `jaxrlhf.preferences.objectives`."""

from jaxrlhf.preferences.objectives import Objective, add, brier, excess_likelihood, likelihood, utility

__all__ = ["Objective", "add", "brier", "excess_likelihood", "likelihood", "utility"]
