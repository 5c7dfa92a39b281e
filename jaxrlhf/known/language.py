"""An enumerable language with transformers for policy and reward."""

import jax

from jaxrlhf import exact, preferences
from jaxrlhf.bilevel import bilevel_descent, gradient, shared_adam
from jaxrlhf.known.problem import KnownProblem
from jaxrlhf.lm.language import (
    STOP,
    alphabet_gold,
    alphabet_language,
    listed_pairs,
    policy_table,
    reward_table,
    table_of,
)
from jaxrlhf.lm.problem import LanguageFrozen, language_problem
from jaxrlhf.lm.reward import reward_model
from jaxrlhf.lm.transformer.model import DecoderConfig, decoder
from jaxrlhf.preferences import objectives
from jaxrlhf.preferences.objectives import Objective


def small_language(
    *,
    seed: int = 0,
    letters: int = 3,
    length: int = 2,
    objective: Objective | None = None,
    against_reference: bool = True,
    beta: float = 0.5,
) -> KnownProblem:
    """Words over a few letters; policy and reward are transformers, the code that runs the real models."""
    objective = objectives.utility(kl_price=beta / 4) if objective is None else objective
    language = alphabet_language(letters=letters, length=length, prompts=2, prompt_length=1)
    shape = DecoderConfig(letters + 1, 16, 1, 2, 1, 8, 32, context_length=length + 2)
    policy, reward = decoder(shape), reward_model(decoder(shape))
    reference = policy.init(jax.random.key(seed))
    gold = table_of(lambda prompts, responses: alphabet_gold(prompts, responses, letters=letters), language)
    reference_table = policy_table(policy, reference, language)
    frozen = LanguageFrozen(reference=reference, annotator=gold)

    def gold_score(sample, frozen):
        return alphabet_gold(sample.prompts, sample.responses, letters=letters)

    def algorithm(rule, solver, upper_optimizer, pairs=None, **options):
        problem = language_problem(
            policy, reward, objective, pairs=pairs or 1, max_new_tokens=length, stop_ids=(STOP,),
            against_reference=against_reference,
        )  # fmt: skip
        if pairs is None:
            problem = problem._replace(sample=listed_pairs(policy, language, against_reference=against_reference))
        kind = preferences.expected_annotator if pairs is None else preferences.gold_annotator
        annotate = kind(gold_score, labels=objective.labels)
        return bilevel_descent(problem, rule, solver, upper_optimizer, beta=beta, annotate=annotate, **options)

    def start(key, scale):
        upper_key, head_key = jax.random.split(key)
        upper = reward.init(upper_key)
        return upper | {"head": scale * jax.random.normal(head_key, upper["head"].shape)}, reference

    def worth(table):
        verdict = exact.evaluate_policy(table, reference_table, gold, beta)
        return verdict.true_return - beta * verdict.kl

    def rewards(upper):
        return reward_table(reward, upper, language)

    return KnownProblem(
        algorithm=algorithm,
        frozen=frozen,
        data=language.prompts,
        start=start,
        solver=gradient(shared_adam(0.01), steps=200),
        phi=lambda upper: exact.upper_value(
            objective, rewards(upper), gold, reference_table, beta=beta, against_reference=against_reference
        ),
        exploited=lambda upper: worth(exact.soft_policy(rewards(upper), reference_table, beta)),
        worth=lambda lower: worth(policy_table(policy, lower, language)),
        best_worth=exact.soft_value(gold, reference_table, beta),
        optimum=None,
        beta=beta,
        exact_solver=False,
    )
