"""Problems with known solutions, on which estimators, objectives and convergence are measured."""

from jaxrlhf.known.bandits import hard_bandit, linear_reward, network_policy, random_bandit
from jaxrlhf.known.episodes import random_mdp
from jaxrlhf.known.language import small_language
from jaxrlhf.known.problem import KnownProblem
from jaxrlhf.known.quadratic import quadratic

__all__ = [
    "KnownProblem",
    "hard_bandit",
    "linear_reward",
    "network_policy",
    "quadratic",
    "random_bandit",
    "random_mdp",
    "small_language",
]
