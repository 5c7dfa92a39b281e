"""A small Markov decision process with preferences over trajectories."""

import jax
import jax.numpy as jnp

from jaxrlhf import mdp
from jaxrlhf.known.problem import KnownProblem, annotator, descend
from jaxrlhf.preferences import objectives
from jaxrlhf.preferences.objectives import Objective


def random_mdp(
    *, seed: int = 0, objective: Objective | None = None, against_reference: bool = True, beta: float = 0.5
) -> KnownProblem:
    """A random process of three steps with preferences over whole trajectories, of which each start state has 32."""
    objective = objectives.utility(kl_price=beta / 4) if objective is None else objective
    # Compiled as a whole: one operation after the other would be hundreds of small programs.
    frozen = jax.jit(mdp.random_episodes)(jax.random.key(seed))

    def reward(upper, features):
        return features @ upper

    def algorithm(rule, solver, upper_optimizer, pairs=None, **options):
        problem = mdp.episode_problem(reward, objective, against_reference=against_reference, pairs=pairs)
        annotate = annotator(mdp.gold_score, labels=objective.labels, pairs=pairs)
        return descend(problem, rule, solver, upper_optimizer, beta=beta, annotate=annotate, **options)

    def gold_value(lower):
        evaluation = mdp.evaluate_policy(lower, frozen, beta=beta)
        return evaluation.true_return - beta * evaluation.kl

    return KnownProblem(
        algorithm=algorithm,
        frozen=frozen,
        data=None,
        start=lambda key, scale: (
            scale * jax.random.normal(key, frozen.features.shape[-1:]),
            jax.jit(mdp.reference_logits)(frozen),
        ),
        solver=mdp.best_response(reward, objective, beta=beta, against_reference=against_reference),
        phi=lambda upper: mdp.upper_value(
            reward, objective, upper, frozen, beta=beta, against_reference=against_reference
        ),
        gold_value_of_best_response=lambda upper: gold_value(
            mdp.soft_policy(reward(upper, frozen.features), frozen, beta)[0]
        ),
        gold_value=gold_value,
        best_gold_value=jax.jit(lambda frozen: jnp.mean(mdp.soft_policy(frozen.gold, frozen, beta)[1]))(frozen),
        optimum=None,
        beta=beta,
        exact_solver=True,
    )
