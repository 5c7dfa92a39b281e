"""A language small enough to enumerate, with transformers for policy and reward."""

from typing import Any, NamedTuple

import jax

from jaxrlhf import exact
from jaxrlhf.base.problem import Sample
from jaxrlhf.base.types import Key, Params
from jaxrlhf.bilevel import Algorithm, gradient, shared_adam
from jaxrlhf.known.problem import KnownProblem, annotator, descend
from jaxrlhf.lm.generate import Generation
from jaxrlhf.lm.language import (
    STOP,
    Language,
    alphabet_gold,
    alphabet_language,
    listed_pairs,
    policy_table,
    reward_table,
    table_of,
)
from jaxrlhf.lm.pairing import Against
from jaxrlhf.lm.problem import LanguageFrozen, language_problem
from jaxrlhf.lm.reward import RewardModel, reward_model
from jaxrlhf.lm.transformer.model import DecoderConfig, LanguageModel, decoder
from jaxrlhf.preferences import objectives
from jaxrlhf.preferences.objectives import Objective


class LanguageSetting(NamedTuple):
    """An enumerable language together with its models and its objective.

    Attributes:
        language: all prompts and completions.
        letters: size of the alphabet.
        policy: the policy's model.
        reward: the reward model.
        frozen: parameters of the reference, and the gold table.
        gold: `[B, N]`, the annotator's hidden reward of every completion.
        reference: `[B, N]`, log-probabilities of the reference policy.
        objective: the upper objective.
        against: where the second response of a pair comes from.
        beta: weight of the lower level's KL.
    """

    language: Language
    letters: int
    policy: LanguageModel
    reward: RewardModel
    frozen: LanguageFrozen
    gold: jax.Array
    reference: jax.Array
    objective: Objective
    against: Against
    beta: float

    def algorithm(self, rule, solver, upper_optimizer, pairs: int | None = None, **options) -> Algorithm:
        """Returns the algorithm on pairs that are listed, or drawn (`pairs`)."""
        max_new_tokens = self.language.completions.tokens.shape[-1]
        problem = language_problem(
            self.policy,
            self.reward,
            self.objective,
            pairs=pairs or 1,
            generation=Generation(max_new_tokens=max_new_tokens, stop_ids=(STOP,)),
            against=self.against,
        )
        if pairs is None:
            problem = problem._replace(sample=listed_pairs(self.policy, self.language, against=self.against))
        annotate = annotator(self.gold_score, labels=self.objective.labels, pairs=pairs)
        return descend(problem, rule, solver, upper_optimizer, beta=self.beta, annotate=annotate, **options)

    def gold_score(self, sample: Sample, frozen: LanguageFrozen) -> jax.Array:
        """The annotator's hidden score of both responses, `[B, M, 2]`."""
        del frozen
        return alphabet_gold(sample.prompts, sample.responses, letters=self.letters)

    def start(self, key: Key, scale: float) -> tuple[Params, Params]:
        """Returns a reward model with a random head of that scale, and the policy at the reference."""
        upper_key, head_key = jax.random.split(key)
        upper = self.reward.init(upper_key)
        head = scale * jax.random.normal(head_key, upper["head"].shape)
        return upper | {"head": head}, self.frozen.reference

    def rewards(self, upper: Params) -> jax.Array:
        """Returns the learned reward of every completion, `[B, N]`."""
        return reward_table(self.reward, upper, self.language)

    def phi(self, upper: Params) -> jax.Array:
        """Returns Phi, exact."""
        return exact.upper_value(
            self.objective,
            self.rewards(upper),
            self.gold,
            self.reference,
            beta=self.beta,
            against_reference=self.against == "reference",
        )

    def gold_value(self, log_policy: jax.Array) -> jax.Array:
        """Returns E gold - beta KL of log-probabilities `[B, N]`."""
        evaluation = exact.evaluate_policy(log_policy, self.reference, self.gold, self.beta)
        return evaluation.true_return - self.beta * evaluation.kl

    def gold_value_of_best_response(self, upper: Params) -> jax.Array:
        """Returns the gold value of the policy that is optimal for a reward model."""
        return self.gold_value(exact.soft_policy(self.rewards(upper), self.reference, self.beta))


def small_language_setting(
    *,
    seed: int = 0,
    letters: int = 3,
    length: int = 2,
    objective: Objective | None = None,
    against_reference: bool = True,
    beta: float = 0.5,
) -> LanguageSetting:
    """Returns short strings over a few letters; policy and reward are transformers, by the code of real models."""
    language = alphabet_language(letters=letters, length=length, prompts=2, prompt_length=1)
    config = DecoderConfig(letters + 1, 16, 1, 2, 1, 8, 32, context_length=length + 2)
    policy, reward = decoder(config), reward_model(decoder(config))
    reference = policy.init(jax.random.key(seed))
    gold = table_of(lambda prompts, responses: alphabet_gold(prompts, responses, letters=letters), language)
    return LanguageSetting(
        language=language,
        letters=letters,
        policy=policy,
        reward=reward,
        frozen=LanguageFrozen(reference=reference, annotator=gold),
        gold=gold,
        reference=policy_table(policy, reference, language),
        objective=objectives.utility(kl_price=beta / 4) if objective is None else objective,
        against="reference" if against_reference else "policy",
        beta=beta,
    )


def small_language(**options: Any) -> KnownProblem:
    """The known problem of `small_language_setting`, which takes the options."""
    setting = small_language_setting(**options)
    return KnownProblem(
        algorithm=setting.algorithm,
        frozen=setting.frozen,
        data=setting.language.prompts,
        start=setting.start,
        solver=gradient(shared_adam(0.01), steps=200),
        phi=setting.phi,
        gold_value_of_best_response=setting.gold_value_of_best_response,
        gold_value=lambda lower: setting.gold_value(policy_table(setting.policy, lower, setting.language)),
        best_gold_value=exact.soft_value(setting.gold, setting.reference, setting.beta),
        optimum=None,
        beta=setting.beta,
        exact_solver=False,
    )
