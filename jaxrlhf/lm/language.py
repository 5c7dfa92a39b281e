"""An enumerable language: small enough that every expectation is a sum, run by the code that runs the real model.

Words over an alphabet, at most `length` tokens, ended by a stop token or by the length. The policy and the reward are the
transformers of `lm.model`, sampled by `lm.generate`; only the evaluation differs: it visits every completion of every
prompt, so that return, KL, win rate, Phi and the optimum carry no sampling error.
"""

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
from jaxrlhf.lm.problem import LanguageFrozen, Prompts, Responses, reward_of
from jaxrlhf.lm.reward import RewardModel
from jaxrlhf.lm.transformer.model import LanguageModel
from jaxrlhf.preferences.objectives import Objective

STOP = 0


class Language(NamedTuple):
    """All prompts and all completions.

    Attributes:
        prompts: tokens `[B, P]` and mask.
        completions: tokens `[N, L]` and mask; after the stop token `STOP` is repeated, masked.
    """

    prompts: Prompts
    completions: Responses


def alphabet_language(*, letters: int = 7, length: int = 4, prompts: int = 4, prompt_length: int = 2) -> Language:
    """Returns the language of words over `letters` letters (tokens 1 to `letters`; 0 stops).

    It has `sum_{l < length} letters^l + letters^length` completions: 2,801 with the defaults. Prompt number b ends with
    letter b + 1 and repeats it.

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
    given = np.repeat(np.arange(1, prompts + 1, dtype=np.int32)[:, None], prompt_length, axis=1)
    return Language(
        Prompts(jnp.asarray(given), jnp.ones(given.shape, bool)),
        Responses(jnp.asarray(tokens), jnp.asarray(mask)),
    )


def alphabet_gold(prompts: Prompts, responses: Responses, *, letters: int = 7) -> jax.Array:
    """Returns the annotator's hidden score `[B, M, K]` of responses `[B, M, K, L]`.

    It likes a word that starts with the letter after the prompt's last one (+1.5) and climbs the alphabet (+0.5 a rise),
    dislikes repeats (-1 each), and likes an end within the length (+0.5). The letters are a circle.
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

    def one(prompt):
        rows = Prompts(*(jnp.broadcast_to(part[None], (tokens.shape[0], *part.shape)) for part in prompt))
        return completion_log_probs(model, params, *rows, tokens, mask, temperature=temperature)

    return jax.lax.map(one, language.prompts)


def table_of(score: Callable[[Prompts, Responses], jax.Array], language: Language) -> jax.Array:
    """Returns `score` of every completion of every prompt, `[B, N]`; `score` takes responses `[1, N, 1, L]`."""
    whole = Responses(*(part[None, :, None] for part in language.completions))
    return jax.lax.map(
        lambda prompt: score(Prompts(*(part[None] for part in prompt)), whole)[0, :, 0], language.prompts
    )


def reward_table(reward: RewardModel, params: Params, language: Language) -> jax.Array:
    """Returns the learned reward of every completion, `[B, N]`."""
    return table_of(lambda prompts, responses: reward_of(reward, params, prompts, responses), language)


def listed_pairs(
    model: LanguageModel, language: Language, *, against_reference: bool, per_token: bool = False
) -> Callable[[Key, Params, Prompts, LanguageFrozen], Sample]:
    """Returns a `sample` for a `BilevelProblem` that lists all N^2 pairs of completions with their probabilities.

    Put it in place of a `language_problem`'s own, and every step is exact. For languages of a few dozen completions.
    """

    def sample(key: Key, lower: Params, data: Prompts, frozen: LanguageFrozen) -> Sample:
        del key
        asked = language._replace(prompts=data)
        own, reference = token_table(model, lower, asked), token_table(model, frozen.reference, asked)
        first, second = (axis.ravel() for axis in jnp.indices((own.shape[1], own.shape[1])))
        other = reference if against_reference else own
        chances = jnp.sum(own, axis=-1)[:, first] + jnp.sum(other, axis=-1)[:, second]

        def pair(of_first, of_second):
            return jnp.stack([of_first[:, first], of_second[:, second]], axis=2)

        def steps(table):
            return table if per_token else jnp.sum(table, axis=-1, keepdims=True)

        responses = Responses(
            *(pair(*[jnp.broadcast_to(part[None], (len(own), *part.shape))] * 2) for part in language.completions)
        )
        behaviour = pair(steps(own), steps(other))
        return Sample(
            prompts=data,
            responses=responses,
            behaviour_log_prob=behaviour,
            reference_log_prob=pair(steps(reference), steps(reference)),
            cumulative_discount=responses.mask.astype(own.dtype) if per_token else jnp.ones_like(behaviour),
            measure=jnp.exp(chances) / len(own),
            from_policy=jnp.array([1.0, 0.0 if against_reference else 1.0], own.dtype),
            num_draws=jnp.asarray(jnp.inf, own.dtype),
        )

    return sample


class LanguageEvaluation(NamedTuple):
    """Exact quantities of a policy and a reward; scalars.

    Attributes:
        policy: what the policy is worth.
        upper_loss: G of the policy and the reward, KL price included.
        phi: G at the exactly optimal policy of that reward.
        phi_gap: the gap of that optimal policy: what the reward would give once fully exploited.
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
    """Returns the exact worth of tables `[B, N]`: log-probabilities of policy and reference, rewards and gold."""
    verdict = exact.evaluate_policy(policy, reference, gold, beta)
    cost = exact.expected_cost(objective, policy, reference, reward, gold, against_reference=against_reference)
    phi = exact.upper_value(objective, reward, gold, reference, beta=beta, against_reference=against_reference)
    return LanguageEvaluation(
        policy=verdict,
        upper_loss=cost.coupled + cost.uncoupled + objective.kl_price * verdict.kl,
        phi=phi,
        phi_gap=exact.evaluate_policy(exact.soft_policy(reward, reference, beta), reference, gold, beta).gap,
    )
