"""Finite Markov decision processes with trajectory preferences, solved exactly: the oracle beyond one step."""

from jaxrlhf.mdp.episodes import Episodes, Trajectories, gold_score, gold_steps, random_episodes
from jaxrlhf.mdp.optimum import best_response, judge, soft_policy, upper_value
from jaxrlhf.mdp.problem import Decision, Policy, episode_problem, history_table, markov_table, reference_logits
from jaxrlhf.mdp.tree import Tree, grow

__all__ = [
    "Decision",
    "Episodes",
    "Policy",
    "Trajectories",
    "Tree",
    "best_response",
    "episode_problem",
    "gold_score",
    "gold_steps",
    "grow",
    "history_table",
    "judge",
    "markov_table",
    "random_episodes",
    "reference_logits",
    "soft_policy",
    "upper_value",
]
