"""Markov decision processes, finite and otherwise.

The names exported here are for short episodes, solved exactly on the tree of their histories: the reference solution for
responses of several steps. Other modules:

- `tabular`: processes as tables; soft optima, policy evaluation, occupancies, rollouts. `incentives`: a leader shapes a
  follower's reward. `four_rooms`: the benchmark for it.
- `environments`: gymnax, brax, tabular or custom environments as two pure functions. `trajectories`: preferences over
  segments of their episodes as a `BilevelProblem`. `exploration`: state entropy as a reward.
"""

from jaxrlhf.mdp.episodes import Episodes, Trajectories, gold_score, gold_steps, random_episodes
from jaxrlhf.mdp.optimum import best_response, evaluate_policy, soft_policy, upper_value
from jaxrlhf.mdp.problem import Decision, Policy, episode_problem, history_table, markov_table, reference_logits
from jaxrlhf.mdp.tree import Tree, history_tree

__all__ = [
    "Decision",
    "Episodes",
    "Policy",
    "Trajectories",
    "Tree",
    "best_response",
    "episode_problem",
    "evaluate_policy",
    "gold_score",
    "gold_steps",
    "history_table",
    "history_tree",
    "markov_table",
    "random_episodes",
    "reference_logits",
    "soft_policy",
    "upper_value",
]
