"""A small Markov decision process with preferences over trajectories."""

import jax
import jax.numpy as jnp

from jaxrlhf import mdp, preferences
from jaxrlhf.bilevel import bilevel_descent
from jaxrlhf.known.problem import KnownProblem
from jaxrlhf.preferences import objectives
from jaxrlhf.preferences.objectives import Objective


def random_mdp(
    *, seed: int = 0, objective: Objective | None = None, against_reference: bool = True, beta: float = 0.5
) -> KnownProblem:
    """A random Markov decision process of three steps with preferences over whole trajectories; 64 from each start."""
    objective = objectives.utility(kl_price=beta / 4) if objective is None else objective
    frozen = mdp.random_episodes(jax.random.key(seed))

    def reward(upper, features):
        return features @ upper

    def algorithm(rule, solver, upper_optimizer, pairs=None, **options):
        problem = mdp.episode_problem(reward, objective, against_reference=against_reference, pairs=pairs)
        kind = preferences.expected_annotator if pairs is None else preferences.gold_annotator
        annotate = kind(mdp.gold_score, labels=objective.labels)
        return bilevel_descent(problem, rule, solver, upper_optimizer, beta=beta, annotate=annotate, **options)

    def worth(log_policy):
        verdict = mdp.evaluate_policy(log_policy, frozen, beta=beta)
        return verdict.true_return - beta * verdict.kl

    return KnownProblem(
        algorithm=algorithm,
        frozen=frozen,
        data=None,
        start=lambda key, scale: (
            scale * jax.random.normal(key, frozen.features.shape[-1:]),
            mdp.reference_logits(frozen),
        ),
        solver=mdp.best_response(reward, objective, beta=beta, against_reference=against_reference),
        phi=lambda upper: mdp.upper_value(
            reward, objective, upper, frozen, beta=beta, against_reference=against_reference
        ),
        exploited=lambda upper: worth(mdp.soft_policy(reward(upper, frozen.features), frozen, beta)[0]),
        worth=worth,
        best_worth=jnp.mean(mdp.soft_policy(frozen.gold, frozen, beta)[1]),
        optimum=None,
        beta=beta,
        exact_solver=True,
    )
