"""Online RLHF of a language model as a `BilevelProblem`.

A completion is one step: its log-probability is the sum over its tokens, stop token included, and the reward judges it
whole. Or every token is one, for lower levels that look at them apart (a critic, clipped ratios). The policy answers
each prompt M times; each answer is paired with one from the reference policy, or with a second of its own.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrlhf.base.problem import BilevelProblem, Sample, uniform_measure
from jaxrlhf.base.types import Key, Params
from jaxrlhf.lm.generate import Completions, generate
from jaxrlhf.lm.log_probs import completion_log_probs
from jaxrlhf.lm.microbatch import in_microbatches
from jaxrlhf.lm.reward import RewardModel
from jaxrlhf.lm.transformer.model import LanguageModel
from jaxrlhf.preferences.objectives import Objective


class Prompts(NamedTuple):
    """The `data` of a step.

    Attributes:
        tokens: `[B, P]` int32, padded on either side.
        mask: `[B, P]`, True on real tokens.
    """

    tokens: jax.Array
    mask: jax.Array


class Responses(NamedTuple):
    """The `responses` of a sample: tokens `[B, M, 2, L]` and their mask, stop token included."""

    tokens: jax.Array
    mask: jax.Array


class LanguageFrozen(NamedTuple):
    """The `frozen` argument.

    Attributes:
        reference: parameters of the reference policy, of the same model as the policy.
        annotator: whatever a traceable annotator needs, such as a gold reward model's parameters.
    """

    reference: Params
    annotator: Params = ()


class RolloutModel(NamedTuple):
    """Who samples in the policy's place: the same model in a cheaper precision.

    Attributes:
        model: that samples.
        params_of: `(the policy's parameters) -> ` its own, once a sample, such as `lambda params: cast(params, bfloat16)`.
    """

    model: LanguageModel
    params_of: Callable[[Params], Params]


def language_problem(
    policy: LanguageModel,
    reward: RewardModel,
    objective: Objective,
    *,
    pairs: int,
    max_new_tokens: int,
    stop_ids: tuple[int, ...],
    temperature: float = 1.0,
    top_p: float = 1.0,
    against_reference: bool = True,
    self_play: bool = False,
    pad_id: int = 0,
    per_token: bool = False,
    microbatches: int = 1,
    writer: RolloutModel | None = None,
    policy_params: Callable[[Params, LanguageFrozen], Params] = lambda lower, frozen: lower,
    reward_params: Callable[[Params, LanguageFrozen], Params] = lambda upper, frozen: upper,
) -> BilevelProblem:
    """Returns the problem; its `data` are `Prompts`, its `frozen` is `LanguageFrozen`.

    Args:
        policy: the model behind the lower iterates and the reference.
        reward: the model behind the upper parameters.
        objective: the upper objective.
        pairs: M, pairs a prompt and step. At least 2 give every response a baseline of its own prompt.
        max_new_tokens: longest completion.
        stop_ids: tokens that end a completion.
        temperature: of the policy: it samples and is trained at this temperature, and so is the reference.
        top_p: must be 1. A nucleus changes the support, and no density ratio exists outside of it.
        against_reference: whether the second response of a pair comes from the reference.
        self_play: whether updates see every pair from both sides, `preferences.from_both_sides`, each response against the
            other held fixed; with against_reference=False.
        pad_id: written after the end of a completion.
        per_token: whether every token is a step (T = L) in place of the whole completion (T = 1). The reward comes with
            the last; the problem is the same one.
        microbatches: pieces that the models read a batch of responses in (`microbatches.in_microbatches`); it divides B M. The activations of
            one piece are held at a time.
        writer: samples in the policy's place. The recorded log-probabilities are the policy's own all the same, from one
            more forward pass: ratios of iterates are then free of the writer's rounding, which in bfloat16 is about 0.2
            nats over a hundred tokens. That draws are the rounded model's is neglected.
        policy_params: `(lower, frozen) -> ` the policy model's parameters; the lower iterate itself by default.
            `lora.policy_on_reference` makes iterates adapters.
        reward_params: `(upper, frozen) -> ` the reward model's, likewise.

    Raises:
        ValueError: the objective does not suit the pairs (`Objective.check`), pairs < 1, or temperature is not
            positive; at trace time, rows that do not divide into the microbatches.
    """
    if self_play and against_reference:
        raise ValueError(
            "A policy plays against itself or against the reference, not both; set against_reference=False."
        )
    objective.check(against_reference=against_reference or self_play, exact=False)
    if pairs < 1:
        raise ValueError(f"pairs must be at least 1, got {pairs}.")
    if not temperature > 0:
        raise ValueError(f"The policy's temperature must be positive, got {temperature}.")
    if top_p != 1.0:
        raise ValueError(
            f"top_p {top_p:g} cannot be trained with: what lies outside of its nucleus has no log-probability. Sample "
            "with temperature, and keep top_p for `generate` after training."
        )

    def write(key: Key, params: Params, prompts: Prompts) -> Completions:
        return generate(
            policy if writer is None else writer.model,
            params if writer is None else writer.params_of(params),
            key,
            *prompts,
            max_new_tokens=max_new_tokens,
            stop_ids=stop_ids,
            temperature=temperature,
            pad_id=pad_id,
        )

    def steps_of(by_token: jax.Array) -> jax.Array:
        return by_token if per_token else jnp.sum(by_token, axis=-1, keepdims=True)

    def log_probs(params: Params, prompts: Prompts, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        def read(params, *rows):
            return completion_log_probs(policy, params, *rows, temperature=temperature)

        return steps_of(in_microbatches(read, microbatches)(params, *prompts, tokens, mask))

    def recorded(params: Params, prompts: Prompts, written: Completions) -> jax.Array:
        return (
            steps_of(written.log_prob) if writer is None else log_probs(params, prompts, written.tokens, written.mask)
        )

    def sample(key: Key, lower: Params, data: Prompts, frozen: LanguageFrozen) -> Sample:
        batch, slots = data.tokens.shape[0], 1 if against_reference else 2
        rows = Prompts(*(jnp.repeat(part, pairs * slots, axis=0) for part in data))
        own_key, reference_key = jax.random.split(key)

        def given(key, params):
            written = write(key, params, rows)
            return Responses(written.tokens, written.mask), recorded(params, rows, written)

        def shaped(tree):
            return jax.tree.map(lambda leaf: leaf.reshape(batch, pairs, slots, *leaf.shape[1:]), tree)

        responses, behaviour = given(own_key, policy_params(lower, frozen))
        both = shaped((responses, behaviour, log_probs(frozen.reference, rows, *responses)))
        if against_reference:
            others, other_behaviour = given(reference_key, frozen.reference)
            second = shaped((others, other_behaviour, other_behaviour))
            both = jax.tree.map(lambda *slots: jnp.concatenate(slots, axis=2), both, second)
        responses, behaviour, reference = both
        measure, num_draws = uniform_measure(batch, pairs, dtype=behaviour.dtype)
        return Sample(
            prompts=data,
            responses=responses,
            behaviour_log_prob=behaviour,
            reference_log_prob=reference,
            cumulative_discount=responses.mask.astype(behaviour.dtype) if per_token else jnp.ones_like(behaviour),
            measure=measure,
            from_policy=jnp.array([1.0, 0.0 if against_reference else 1.0], behaviour.dtype),
            num_draws=num_draws,
        )

    def log_prob(lower: Params, sample: Sample, frozen: LanguageFrozen) -> jax.Array:
        # The reference's responses do not depend on the policy, nor do an opponent's.
        slots = 1 if against_reference or self_play else 2
        responses = Responses(*(part[:, :, :slots] for part in sample.responses))
        prompts, (tokens, mask) = flat(sample.prompts, responses)
        params = policy_params(lower, frozen)
        own = log_probs(params, prompts, tokens, mask).reshape(*responses.tokens.shape[:3], -1)
        if self_play:
            return both_sides(own[:, :, 0])
        return jnp.pad(own, ((0, 0), (0, 0), (0, 2 - slots), (0, 0)))

    def score(upper: Params, sample: Sample, frozen: LanguageFrozen) -> jax.Array:
        params = reward_params(upper, frozen)
        if self_play:
            first = Responses(*(part[:, :, :1] for part in sample.responses))
            whole = both_sides(reward_of(reward, params, sample.prompts, first, microbatches=microbatches))
        else:
            whole = reward_of(reward, params, sample.prompts, sample.responses, microbatches=microbatches)[..., None]
        if not per_token:
            return whole
        mask = sample.responses.mask.astype(whole.dtype)
        following = jnp.concatenate([mask[..., 1:], jnp.zeros_like(mask[..., :1])], axis=-1)
        return whole * (mask - following)  # 1 at the last token

    return BilevelProblem(sample, log_prob, score, objective.cost, objective.kl_price)


def both_sides(first: jax.Array) -> jax.Array:
    """Returns values of both slots `[B, 2M, 2, ...]` from those of the first, for pairs seen from both sides.

    Each response is the first of one pair and the second of that pair's other side, M places on.
    """
    return jnp.stack([first, jnp.roll(first, first.shape[1] // 2, axis=1)], axis=2)


def flat(prompts: Prompts, responses: Responses) -> tuple[Prompts, Responses]:
    """Returns one row a response: prompts `[B * M * K, P]` and responses `[B * M * K, L]` from `[B, M, K, L]`."""
    count = responses.tokens.shape[1] * responses.tokens.shape[2]
    rows = Prompts(*(jnp.repeat(part, count, axis=0) for part in prompts))
    return rows, Responses(*(part.reshape(-1, part.shape[-1]) for part in responses))


def reward_of(
    reward: RewardModel, params: Params, prompts: Prompts, responses: Responses, *, microbatches: int = 1
) -> jax.Array:
    """Returns the reward model's score of each response with its prompt, `[B, M, K]`, read in so many microbatches."""
    rows, (tokens, mask) = flat(prompts, responses)
    whole = jnp.concatenate([rows.tokens, tokens], axis=1)
    seen = jnp.concatenate([rows.mask, mask], axis=1)
    return in_microbatches(reward.score, microbatches)(params, whole, seen).reshape(responses.tokens.shape[:3])
