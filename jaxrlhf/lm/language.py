"""An enumerable language: small enough that every expectation is a sum, run by the code that runs the real model.

Completions are words over an alphabet, at most `length` tokens, ended by a stop token or by the length. Policy and reward
are the transformers of `lm.transformer`, sampled by `lm.generate`. Only the evaluation differs: it sums over every
completion of every prompt, so that return, KL, win rate, Phi and the optimum carry no sampling error.
"""

import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrlhf import exact
from jaxrlhf.base.problem import Sample
from jaxrlhf.base.types import Key, Params
from jaxrlhf.lm.log_probs import completion_log_probs
from jaxrlhf.lm.pairing import Against, Prompts, Responses, from_policy
from jaxrlhf.lm.problem import LanguageFrozen
from jaxrlhf.lm.reward import RewardModel, score_responses
from jaxrlhf.lm.steps import cumulative_discount, step_log_probs
from jaxrlhf.lm.transformer.model import LanguageModel
from jaxrlhf.preferences.objectives import Objective

STOP = 0


class Language(NamedTuple):
    """All prompts and all completions.

    Attributes:
        prompts: tokens `[B, P]` and mask.
        completions: tokens `[N, L]` and mask; padded with `STOP`, masked, after the stop token.
    """

    prompts: Prompts
    completions: Responses


def alphabet_language(*, letters: int = 7, length: int = 4, prompts: int = 4, prompt_length: int = 2) -> Language:
    """Returns the language of words over `letters` letters (tokens 1 to `letters`; 0 is the stop token).

    It has `sum_{l < length} letters^l + letters^length` completions: 2,801 with the defaults. Prompt number b repeats
    letter b + 1.

    Raises:
        ValueError: a size is not positive, or there are more prompts than letters.
    """
    if min(letters, length, prompts, prompt_length) < 1 or prompts > letters:
        raise ValueError("A language needs positive sizes and at most as many prompts as letters.")
    tokens = np.full((sum(letters**size for size in range(length)) + letters**length, length), STOP, np.int32)
    mask = np.zeros(tokens.shape, bool)
    row = 0
    for size in range(length + 1):
        for word in itertools.product(range(1, letters + 1), repeat=size):
            tokens[row, :size] = word
            mask[row, : size + 1] = True
            row += 1
    questions = np.repeat(np.arange(1, prompts + 1, dtype=np.int32)[:, None], prompt_length, axis=1)
    return Language(
        Prompts(jnp.asarray(questions), jnp.ones(questions.shape, bool)),
        Responses(jnp.asarray(tokens), jnp.asarray(mask)),
    )


def alphabet_gold(prompts: Prompts, responses: Responses, *, letters: int = 7) -> jax.Array:
    """Returns the annotator's hidden score `[B, M, K]` of responses `[B, M, K, L]`.

    +1.5 for a word that starts with the letter after the prompt's last one (the first follows the last), +0.5 for each
    letter that is later in the alphabet than the one before it, -1 for each immediate repeat, and +0.5 for a stop token
    within the length.
    """
    tokens, letter = responses.tokens, responses.tokens != STOP
    wanted = prompts.tokens[:, -1] % letters + 1
    starts = tokens[..., 0] == wanted[:, None, None]
    both = letter[..., 1:] & letter[..., :-1]
    rises = jnp.sum(both & (tokens[..., 1:] > tokens[..., :-1]), axis=-1)
    repeats = jnp.sum(both & (tokens[..., 1:] == tokens[..., :-1]), axis=-1)
    ended = jnp.any(responses.mask & ~letter, axis=-1)
    return 1.5 * starts + 0.5 * rises - 1.0 * repeats + 0.5 * ended


def policy_table(model: LanguageModel, params: Params, language: Language, *, temperature: float = 1.0) -> jax.Array:
    """Returns the log-probability of every completion, `[B, N]`; each row's probabilities sum to 1."""
    return jnp.sum(token_table(model, params, language, temperature=temperature), axis=-1)


def token_table(model: LanguageModel, params: Params, language: Language, *, temperature: float = 1.0) -> jax.Array:
    """Returns the log-probability of every token of every completion given those before it, `[B, N, L]`."""
    tokens, mask = language.completions

    def of_prompt(prompt):
        rows = Prompts(*(jnp.broadcast_to(leaf[None], (tokens.shape[0], *leaf.shape)) for leaf in prompt))
        return completion_log_probs(model, params, *rows, tokens, mask, temperature=temperature)

    return jax.lax.map(of_prompt, language.prompts)


def table_of(score: Callable[[Prompts, Responses], jax.Array], language: Language) -> jax.Array:
    """Returns `score` of every completion of every prompt, `[B, N]`; `score` takes responses `[1, N, 1, L]`."""
    responses = Responses(*(leaf[None, :, None] for leaf in language.completions))
    return jax.lax.map(
        lambda prompt: score(Prompts(*(leaf[None] for leaf in prompt)), responses)[0, :, 0], language.prompts
    )


def reward_table(reward: RewardModel, params: Params, language: Language) -> jax.Array:
    """Returns the learned reward of every completion, `[B, N]`."""
    return table_of(lambda prompts, responses: score_responses(reward, params, prompts, responses), language)


def listed_pairs(
    model: LanguageModel, language: Language, *, against: Against, per_token: bool = False
) -> Callable[[Key, Params, Prompts, LanguageFrozen], Sample]:
    """Returns a `sample` for a `BilevelProblem` that lists all N^2 pairs of completions with their probabilities.

    In place of a `language_problem`'s own it makes every step exact. For languages of a few dozen completions.
    """

    def sample(key: Key, lower: Params, data: Prompts, frozen: LanguageFrozen) -> Sample:
        del key
        of_data = language._replace(prompts=data)
        policy, reference = token_table(model, lower, of_data), token_table(model, frozen.reference, of_data)
        first, second = (axis.ravel() for axis in jnp.indices((policy.shape[1], policy.shape[1])))
        opponent = reference if against == "reference" else policy
        pair_log_prob = jnp.sum(policy, axis=-1)[:, first] + jnp.sum(opponent, axis=-1)[:, second]

        def pair(of_first, of_second):
            return jnp.stack([of_first[:, first], of_second[:, second]], axis=2)

        steps = functools.partial(step_log_probs, per_token=per_token)
        responses = Responses(
            *(pair(*[jnp.broadcast_to(leaf[None], (len(policy), *leaf.shape))] * 2) for leaf in language.completions)
        )
        return Sample(
            prompts=data,
            responses=responses,
            behaviour_log_prob=pair(steps(policy), steps(opponent)),
            reference_log_prob=pair(steps(reference), steps(reference)),
            cumulative_discount=cumulative_discount(responses.mask, policy.dtype, per_token=per_token),
            measure=jnp.exp(pair_log_prob) / len(policy),
            from_policy=from_policy(against, policy.dtype),
            num_draws=jnp.asarray(jnp.inf, policy.dtype),
        )

    return sample


class LanguageEvaluation(NamedTuple):
    """Exact quantities of a policy and a reward; scalars.

    Attributes:
        policy: evaluation of the policy.
        upper_loss: G of the policy and the reward, KL price included.
        phi: G at the best response to that reward.
        phi_gap: the gap of that best response: what optimising the reward to the end would cost in true value.
    """

    policy: exact.PolicyEvaluation
    upper_loss: jax.Array
    phi: jax.Array
    phi_gap: jax.Array


def evaluate_language(
    policy: jax.Array,
    reference: jax.Array,
    reward: jax.Array,
    gold: jax.Array,
    objective: Objective,
    *,
    beta: float,
    against_reference: bool = True,
) -> LanguageEvaluation:
    """Returns the exact evaluation of tables `[B, N]`: log-probabilities of policy and reference, rewards and gold."""
    evaluation = exact.evaluate_policy(policy, reference, gold, beta)
    cost = exact.expected_cost(objective, policy, reference, reward, gold, against_reference=against_reference)
    phi = exact.upper_value(objective, reward, gold, reference, beta=beta, against_reference=against_reference)
    return LanguageEvaluation(
        policy=evaluation,
        upper_loss=cost.coupled + cost.uncoupled + objective.kl_price * evaluation.kl,
        phi=phi,
        phi_gap=exact.evaluate_policy(exact.soft_policy(reward, reference, beta), reference, gold, beta).gap,
    )
