"""Online RLHF of a language model as a `BilevelProblem`.

By default a completion is one step: its log-probability is the sum over its tokens, stop token included, and the reward
scores it as a whole. With per_token=True every token is a step, for lower levels that treat tokens separately (a critic,
clipped ratios). The policy gives M responses to each prompt; each is paired with a response of the reference policy, or
with a second one of its own.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrlhf.base.problem import BilevelProblem, Sample, uniform_measure
from jaxrlhf.base.types import Key, Params
from jaxrlhf.lm.generate import Generation, generate
from jaxrlhf.lm.log_probs import completion_log_probs
from jaxrlhf.lm.microbatch import completions_together, in_microbatches
from jaxrlhf.lm.pairing import Against, Prompts, Responses, beside_prompts, both_sides, from_policy
from jaxrlhf.lm.reward import RewardModel, score_responses
from jaxrlhf.lm.steps import cumulative_discount, step_log_probs, step_rewards
from jaxrlhf.lm.transformer.model import LanguageModel
from jaxrlhf.preferences.objectives import Objective


class LanguageFrozen(NamedTuple):
    """The `frozen` argument.

    Attributes:
        reference: parameters of the reference policy, of the same model as the policy.
        annotator: whatever a traceable annotator needs, such as a gold reward model's parameters.
        reward: what the reward's trained parameters stand on, such as the trunk under its adapter.
    """

    reference: Params
    annotator: Params = ()
    reward: Params = ()


class RolloutModel(NamedTuple):
    """A model that samples in the policy's place: the same model in a cheaper precision.

    Attributes:
        model: samples the responses.
        params_of: `(policy's parameters) -> rollout model's`, called once a sample; such as
            `lambda params: cast(params, bfloat16)`.
    """

    model: LanguageModel
    params_of: Callable[[Params], Params]


class _Setup(NamedTuple):
    """Arguments of `language_problem` that its functions need."""

    policy: LanguageModel
    reward: RewardModel
    generation: Generation
    pairs: int
    against: Against
    per_token: bool
    microbatches: int
    rollout: RolloutModel | None
    policy_params: Callable[[Params, LanguageFrozen], Params]
    reward_params: Callable[[Params, LanguageFrozen], Params]
    reference_responses: int


def language_problem(
    policy: LanguageModel,
    reward: RewardModel,
    objective: Objective,
    *,
    pairs: int,
    generation: Generation,
    against: Against = "reference",
    reference_responses: int = 0,
    per_token: bool = False,
    microbatches: int = 1,
    rollout: RolloutModel | None = None,
    policy_params: Callable[[Params, LanguageFrozen], Params] = lambda lower, frozen: lower,
    reward_params: Callable[[Params, LanguageFrozen], Params] = lambda upper, frozen: upper,
) -> BilevelProblem:
    """Returns the problem; its `data` are `Prompts`, its `frozen` is `LanguageFrozen`.

    Args:
        policy: the model behind the lower iterates and the reference.
        reward: the model behind the upper parameters.
        objective: the upper objective.
        pairs: M, pairs a prompt and step. At least 2 give every response a baseline from its own prompt.
        generation: length, stop tokens and temperature of completions. The temperature is part of the policy: it samples
            and is trained at this temperature, and so is the reference.
        against: where the second response of a pair comes from: "reference"; "policy", whose log-probabilities are trained
            for both responses; or "self", for updates that see every pair from both sides
            (`preferences.from_both_sides`), each response against the other held fixed.
        reference_responses: K, responses of the reference to each prompt beside the pairs, which nobody labels; see
            `preferences.self_play`.
        per_token: whether every token is a step (T = L) in place of the whole completion (T = 1). The reward arrives with
            the last token; the problem is the same one.
        microbatches: into how many the models split a batch of responses (`microbatch.in_microbatches`); must divide B M.
            Only one microbatch's activations are held at a time.
        rollout: samples in the policy's place. The recorded log-probabilities are still the policy's own, from one more
            forward pass: ratios of iterates are then free of the rollout model's rounding, about 0.2 nats over a hundred
            tokens in bfloat16. That the responses follow the rounded model's distribution is neglected.
        policy_params: `(lower, frozen) -> policy model's parameters`; by default the lower iterate is those.
            `lora.policy_on_reference` makes iterates adapters.
        reward_params: `(upper, frozen) -> reward model's parameters`, likewise.

    Raises:
        ValueError: the objective does not suit the pairs (`Objective.check`), pairs < 1, `against` is unknown, or the
            temperature is not positive; at trace time, as `generate`, or if the microbatches do not divide the rows.
    """
    if against not in ("reference", "policy", "self"):
        raise ValueError(f"A pair is against the reference, the policy or self, not {against!r}.")
    objective.check(against_reference=against != "policy", exact=False)
    if pairs < 1:
        raise ValueError(f"pairs must be at least 1, got {pairs}.")
    if not generation.temperature > 0:
        raise ValueError(f"The policy's temperature must be positive, got {generation.temperature}.")
    setup = _Setup(
        policy, reward, generation, pairs, against, per_token, microbatches, rollout, policy_params, reward_params,
        reference_responses,
    )  # fmt: skip
    return BilevelProblem(
        sample=functools.partial(_sample, setup),
        log_prob=functools.partial(_log_prob, setup),
        reward=functools.partial(_reward, setup),
        cost=objective.cost,
        kl_price=objective.kl_price,
        reference_returns=functools.partial(_reference_returns, setup) if reference_responses else None,
    )


def _sample(setup: _Setup, key: Key, lower: Params, data: Prompts, frozen: LanguageFrozen) -> Sample:
    batch, slots = data.tokens.shape[0], 1 if setup.against == "reference" else 2
    count = setup.pairs * slots
    policy_key, reference_key = jax.random.split(key)

    def by_pair(tree):
        return jax.tree.map(lambda leaf: leaf.reshape(batch, setup.pairs, slots, *leaf.shape[1:]), tree)

    responses, behaviour = _sample_responses(setup, policy_key, setup.policy_params(lower, frozen), data, count)
    filled = by_pair((responses, behaviour, _log_probs(setup, frozen.reference, data, responses)))
    if setup.against == "reference":
        responses, behaviour = _sample_responses(setup, reference_key, frozen.reference, data, count)
        second = by_pair((responses, behaviour, behaviour))
        filled = jax.tree.map(lambda *slots: jnp.concatenate(slots, axis=2), filled, second)
    responses, behaviour, reference = filled
    measure, num_draws = uniform_measure(batch, setup.pairs, dtype=behaviour.dtype)
    return Sample(
        prompts=data,
        responses=responses,
        behaviour_log_prob=behaviour,
        reference_log_prob=reference,
        cumulative_discount=cumulative_discount(responses.mask, behaviour.dtype, per_token=setup.per_token),
        measure=measure,
        from_policy=from_policy(setup.against, behaviour.dtype),
        num_draws=num_draws,
        reference_responses=_reference_responses(setup, reference_key, data, frozen),
    )


def _reference_responses(setup: _Setup, key: Key, data: Prompts, frozen: LanguageFrozen) -> Responses | tuple[()]:
    """Returns K responses of the reference to each prompt, `[B, K, L]`."""
    count = setup.reference_responses
    if not count:
        return ()
    responses, _ = _generate(setup, key, frozen.reference, data, count)
    return Responses(*(leaf.reshape(-1, count, leaf.shape[-1]) for leaf in responses))


def _log_prob(setup: _Setup, lower: Params, sample: Sample, frozen: LanguageFrozen) -> jax.Array:
    # The reference's responses do not depend on the policy, nor do a fixed opponent's.
    slots = 2 if setup.against == "policy" else 1
    responses = Responses(*(leaf[:, :, :slots] for leaf in sample.responses))
    shape, rows = responses.tokens.shape, Responses(*(leaf.reshape(-1, leaf.shape[-1]) for leaf in responses))
    log_prob = _log_probs(setup, setup.policy_params(lower, frozen), sample.prompts, rows).reshape(*shape[:3], -1)
    if setup.against == "self":
        return both_sides(log_prob[:, :, 0])
    return jnp.pad(log_prob, ((0, 0), (0, 0), (0, 2 - slots), (0, 0)))


def _reward(setup: _Setup, upper: Params, sample: Sample, frozen: LanguageFrozen) -> jax.Array:
    responses, score = sample.responses, _scores(setup, upper, sample, frozen)
    if setup.against == "self":
        rewards = both_sides(score(Responses(*(leaf[:, :, :1] for leaf in responses)))[:, :, 0])
    else:
        rewards = score(responses)
    return step_rewards(rewards, responses.mask, per_token=setup.per_token)


def _reference_returns(setup: _Setup, upper: Params, sample: Sample, frozen: LanguageFrozen) -> jax.Array:
    responses = Responses(*(leaf[:, :, None] for leaf in sample.reference_responses))
    rows = responses.tokens.shape[0] * responses.tokens.shape[1]
    fewer = setup._replace(microbatches=math.gcd(setup.microbatches, rows))
    return _scores(fewer, upper, sample, frozen)(responses)[:, :, 0]


def _scores(setup: _Setup, upper: Params, sample: Sample, frozen: LanguageFrozen) -> Callable[[Responses], jax.Array]:
    params = setup.reward_params(upper, frozen)
    return functools.partial(score_responses, setup.reward, params, sample.prompts, microbatches=setup.microbatches)


def _sample_responses(
    setup: _Setup, key: Key, params: Params, prompts: Prompts, count: int
) -> tuple[Responses, jax.Array]:
    """Returns `count` responses of each prompt, and their log-probabilities `[N, T]` under the policy model."""
    responses, log_prob = _generate(setup, key, params, prompts, count)
    if setup.rollout is not None:
        return responses, _log_probs(setup, params, prompts, responses)
    return responses, step_log_probs(log_prob, per_token=setup.per_token)


def _generate(setup: _Setup, key: Key, params: Params, prompts: Prompts, count: int) -> tuple[Responses, jax.Array]:
    """Returns `count` responses of each prompt, and their tokens' log-probabilities under the model that sampled them."""
    model = setup.policy
    if setup.rollout is not None:
        model, params = setup.rollout.model, setup.rollout.params_of(params)
    completions = generate(model, params, key, *prompts, completions=count, **setup.generation._asdict())
    return Responses(completions.tokens, completions.mask), completions.log_prob


def _log_probs(setup: _Setup, params: Params, prompts: Prompts, responses: Responses) -> jax.Array:
    """Returns the log-probabilities `[N, T]` of responses `[N, L]`, N / B of each prompt in a row."""
    count, microbatches = len(responses.tokens) // len(prompts.tokens), setup.microbatches
    together = completions_together(count, prompts=len(prompts.tokens), microbatches=microbatches)
    rows, grouped = beside_prompts(prompts, responses, together)
    read = functools.partial(completion_log_probs, setup.policy, temperature=setup.generation.temperature)
    by_token = in_microbatches(read, microbatches)(params, *rows, *grouped).reshape(responses.tokens.shape)
    return step_log_probs(by_token, per_token=setup.per_token)
