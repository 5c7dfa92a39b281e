"""What `jaxrlhf align` trains: the problem of its models, the algorithm, and the parameters that it starts from."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxrlhf.algorithms.methods import METHODS, Critic
from jaxrlhf.base.problem import Sample
from jaxrlhf.base.types import Params
from jaxrlhf.bilevel import Algorithm, BilevelProblem
from jaxrlhf.commands.adapters import configured_adapters
from jaxrlhf.commands.align_config import Align, forecasts
from jaxrlhf.commands.annotators import ComparisonAnnotator
from jaxrlhf.commands.existing import kept_labels
from jaxrlhf.commands.method_flags import beta_of, learns_scale
from jaxrlhf.commands.methods import build_algorithm
from jaxrlhf.commands.mixture import Mixture, open_mixture, upper_with_mixture
from jaxrlhf.commands.models import Model
from jaxrlhf.lm import lora
from jaxrlhf.lm.critic import token_critic
from jaxrlhf.lm.generate import Generation
from jaxrlhf.lm.hugging_face.families import Kind
from jaxrlhf.lm.problem import LanguageFrozen, RolloutModel, language_problem
from jaxrlhf.lm.reward import NOT_IN_TRUNK, RewardModel, reward_model
from jaxrlhf.lm.transformer.model import decoder
from jaxrlhf.preferences import objectives, preference, queries
from jaxrlhf.preferences.mixture import mixture_problem, without_scores
from jaxrlhf.preferences.scale import with_scale
from jaxrlhf.preferences.self_play import win_rates

LABELS_READ = 256
"""About how many kept labels are read to choose a step's pairs by; where there are more, so many are drawn."""


class Forecast(NamedTuple):
    """What the learned reward says of a step's pairs, before they are labelled.

    Attributes:
        preferred: `[B, M]`, the probability that response 0 is preferred.
        win_rate: `[]`, of the policy against the reference (`self_play.win_rates`); None where a step has no responses of
            the reference to read, or is labelled against them.
    """

    preferred: jax.Array
    win_rate: jax.Array | None


class AlignSetup(NamedTuple):
    """What a run trains.

    Attributes:
        algorithm: of the method.
        upper: initial upper parameters: of the reward, of a policy whose log-ratio is the reward, or `()`.
        lower: initial parameters of the policy.
        frozen: the reference, and the parameters of a traced annotator.
        policy_of: `(state) -> ` plain parameters of the deployed policy.
        reward_of: `(state) -> ` plain parameters of the reward model; None where there is none.
        mixture: the functions of --rewards, if any.
        review: of `methods.Reusing`, where labels are kept.
        adapters_of: `(state) -> ` trained adapters of policy and reward; none where all weights are trained.
        scaling: alpha over the rank of the adapters.
        forecast: `(state, sample, frozen) -> Forecast`; None where no reward model alone is the reward.
        choose: `(state, sample, frozen) -> indices` of the pairs to ask about, of --choose; None for a random draw.
    """

    algorithm: Algorithm
    upper: Params
    lower: Params
    frozen: LanguageFrozen
    policy_of: Callable[[Any], Params]
    reward_of: Callable[[Any], Params | None]
    mixture: Mixture | None = None
    review: Callable[[Any, Any, Params], Any] | None = None
    adapters_of: Callable[[Any], dict[Kind, Params]] = lambda state: {}
    scaling: float = 1.0
    forecast: Callable[[Any, Sample, Params], Forecast] | None = None
    choose: Callable[[Any, Sample, Params], jax.Array] | None = None


class _Trained(NamedTuple):
    """What is trained: all weights or adapters.

    Attributes:
        lower, reward: initial parameters of the policy and of the reward model.
        policy_of: of `AlignSetup`.
        reward_of: `(reward) -> ` plain parameters of the reward model.
        critic: `(policy) -> ` initial parameters of a critic.
        params: keywords of `language_problem`, from trained parameters to the models'.
        critic_params: the same, of `token_critic`.
        reward_base: the frozen trunk under the reward's adapter, where it is not the policy's.
        scaling: alpha over the rank of adapters.
    """

    lower: Params
    reward: Params
    policy_of: Callable[[Any], Params]
    reward_of: Callable[[Params], Params]
    critic: Callable[[Params], Params]
    params: dict[str, Any]
    critic_params: dict[str, Any]
    reward_base: Params = ()
    scaling: float = 1.0


def build_setup(
    config: Align,
    policy: Model,
    reward: Model,
    annotator: ComparisonAnnotator,
    *,
    prompt_length: int | None = None,
    existing_rows: int = 0,
) -> AlignSetup:
    """Returns the algorithm and initial parameters, for full training or for adapters.

    Args:
        config: of the run.
        policy: the policy, which is also the reference.
        reward: the reward model to start from; without --reward only its configuration is used by adapters, and by methods
            that learn none.
        annotator: labels the pairs.
        prompt_length: columns of every step's prompts, where labels are kept; --max-prompt by default.
        existing_rows: rows for the labels of --from-preferences.

    Raises:
        ValueError: the reward does not read the policy's tokens, or a setting is out of range.
    """
    # It may read more: padding of its own.
    if reward.config.vocabulary_size < policy.config.vocabulary_size:
        raise ValueError(
            f"The reward model reads {reward.config.vocabulary_size} tokens and the policy writes "
            f"{policy.config.vocabulary_size}; take models of one tokenizer."
        )
    mixture = open_mixture(config)
    trained = (_adapters if config.lora_rank else _all_weights)(config, policy, reward)
    frozen = LanguageFrozen(policy.params, annotator.params, trained.reward_base)
    learns = METHODS[config.method].learns
    uppers = {"reward": lambda: _upper(config, trained.reward, mixture), "log-ratio": lambda: trained.lower}
    upper = uppers.get(learns, tuple)()
    algorithm, review = build_algorithm(
        config,
        functools.partial(_problem, config, policy, reward, **trained.params),
        functools.partial(_critic, config, policy, trained),
        annotator.traced,
        (upper, trained.lower, frozen),
        prompt_length=prompt_length or config.max_prompt,
        existing_rows=existing_rows,
    )

    def learned_reward(state):
        return _reward_part(config, state.upper) if learns == "reward" else None

    def reward_of(state):
        learned = learned_reward(state)
        return None if learned is None else trained.reward_of(learned)

    def adapters_of(state) -> dict[Kind, Params]:
        found: dict[Kind, Any] = {"policy": state.policy, "reward": learned_reward(state)}
        return {kind: adapter for kind, adapter in found.items() if config.lora_rank and adapter is not None}

    return AlignSetup(
        algorithm=algorithm,
        upper=upper,
        lower=trained.lower,
        frozen=frozen,
        policy_of=trained.policy_of,
        reward_of=reward_of,
        mixture=mixture,
        review=review,
        adapters_of=adapters_of,
        scaling=trained.scaling,
        forecast=_forecast(config, policy, reward, trained) if forecasts(config) else None,
        choose=_choice(config, policy, reward, trained) if config.choose == "disagreement" else None,
    )


def _forecast(
    config: Align, policy: Model, reward: Model, trained: _Trained
) -> Callable[[Any, Sample, Params], Forecast]:
    problem = _pairs_problem(config, policy, reward, trained)

    def forecast(state, sample, frozen):
        reward = _reward_part(config, state.upper)
        returns, win_rate = jnp.sum(sample.cumulative_discount * problem.reward(reward, sample, frozen), axis=-1), None
        if jax.tree.leaves(sample.reference_responses):
            assert problem.reference_returns is not None
            win_rate = jnp.mean(win_rates(returns, problem.reference_returns(reward, sample, frozen)))
        return Forecast(preference(returns), win_rate)

    return forecast


def _choice(
    config: Align, policy: Model, reward: Model, trained: _Trained
) -> Callable[[Any, Sample, Params], jax.Array]:
    problem, count = _pairs_problem(config, policy, reward, trained), config.labels_per_step
    assert count is not None
    # A multiple of a step's pairs, which microbatches divide.
    pairs = config.batch_size * config.pairs
    size = pairs * max(1, min(LABELS_READ, config.kept_labels) // pairs)

    def choose(state, sample, frozen):
        learned, kept = _reward_part(config, state.upper), kept_labels(state)
        head = learned["head"]

        def differences(of):
            def along(direction):
                rewards = problem.reward(learned | {"head": direction}, of, frozen)
                returns = jnp.sum(of.cumulative_discount * rewards, axis=-1)
                return (returns[..., 0] - returns[..., 1]).reshape(-1)

            # The score is linear in the head: along the axes it is the features. The trunk runs once.
            return jax.vmap(along, out_axes=1)(jnp.eye(len(head), dtype=head.dtype))

        labelled, weights = queries.labelled_pairs(jax.random.key(kept.step), kept.buffer, size=size)
        candidates, known = differences(sample), differences(labelled.sample)
        information = weights * jax.nn.sigmoid(known @ head) * jax.nn.sigmoid(-(known @ head))
        return queries.choose(candidates @ head, queries.covariance(candidates, known, information), count)

    return choose


def _pairs_problem(config: Align, policy: Model, reward: Model, trained: _Trained) -> BilevelProblem:
    """Returns the problem whose reward reads both responses of a pair once, whatever the pairs are."""
    pairs: dict[str, Any] = {"against": "policy", "per_token": METHODS[config.method].per_token}
    return _problem(config, policy, reward, objectives.likelihood(), reference_responses=1, **pairs, **trained.params)


def _upper(config: Align, reward: Params, mixture: Mixture | None) -> Params:
    if mixture is not None:
        reward = upper_with_mixture(mixture, reward if config.reward_network else ())
    return with_scale(reward) if learns_scale(config) else reward


def _reward_part(config: Align, upper: Params) -> Any:
    """Returns the parameters of the reward model within the upper parameters; None where there is no model."""
    reward = upper.reward if learns_scale(config) else upper
    if not config.rewards:
        return reward
    return reward.network if config.reward_network else None


def scale_of(config: Align, state: Any) -> dict[str, float]:
    """Returns the learned scale and the effective beta, for the metrics; nothing where none is learned."""
    if not learns_scale(config):
        return {}
    scale = float(np.exp(np.asarray(state.upper.log_scale)))
    return {"scale": scale, "effective_beta": float(state.upper.effective_beta(beta_of(config)))}


def scale_notes(config: Align, state: Any) -> list[str]:
    """Returns a sentence on the learned scale, if there is one."""
    found = scale_of(config, state)
    sentence = "The reward's learned scale is {scale:.3g} at the end: an effective beta of {effective_beta:.3g}."
    return [sentence.format(**found)] if found else []


def _all_weights(config: Align, policy: Model, reward: Model) -> _Trained:
    def critic(params):
        trunk = {name: leaf for name, leaf in params.items() if name not in NOT_IN_TRUNK}
        return {"trunk": trunk, "head": jnp.zeros(policy.config.width, jnp.float32)}

    return _Trained(policy.params, reward.params, lambda state: state.policy, lambda learned: learned, critic, {}, {})


def _adapters(config: Align, policy: Model, reward: Model) -> _Trained:
    base, keys = policy.params, jax.random.split(jax.random.key(config.seed))
    own_trunk = {name: leaf for name, leaf in base.items() if name not in NOT_IN_TRUNK}
    zero_head, given = jnp.zeros(policy.config.width, jnp.float32), config.reward is not None
    # An adapter that has not been trained adds nothing, whose ever it is: a given reward model starts as it is.
    trunk = reward.params["trunk"] if given else own_trunk
    adapters = configured_adapters(config)
    assert adapters is not None
    lower = adapters.init(keys[0], policy.config, "policy", base)
    adapter = adapters.init(keys[1], reward.config if given else policy.config, "reward", trunk)
    head = jnp.asarray(reward.params["head"], jnp.float32) if given else zero_head

    def policy_of(state):
        return lora.merge(base, adapters.scaled(state.policy))

    def reward_of(learned):
        return {"trunk": lora.merge(trunk, adapters.scaled(learned["adapter"])), "head": learned["head"]}

    def policy_params(lower, frozen):
        return lora.policy_on_reference(adapters.scaled(lower), frozen)

    def critic_params(critic, frozen):
        return lora.reward_on_reference(critic | {"adapter": adapters.scaled(critic["adapter"])}, frozen)

    def own_params(learned, frozen):
        return lora.reward_on_own_trunk(learned | {"adapter": adapters.scaled(learned["adapter"])}, frozen)

    return _Trained(
        lower,
        {"adapter": adapter, "head": head},
        policy_of,
        reward_of,
        lambda adapter: {"adapter": adapter, "head": zero_head},
        {"policy_params": policy_params, "reward_params": own_params if given else critic_params},
        {"params_of": critic_params},
        trunk if given else (),
        adapters.scaling,
    )


def _critic(config: Align, policy: Model, trained: _Trained, optimizer: optax.GradientTransformation) -> Critic:
    model = decoder(policy.config, dtype=jnp.float32, remat=config.remat)
    value = token_critic(model, microbatches=config.microbatches, **trained.critic_params)
    return Critic(without_scores(value) if config.rewards else value, trained.critic, optimizer)


def _problem(
    config: Align, policy: Model, reward: Model, objective: objectives.Objective, **keywords: Any
) -> BilevelProblem:
    # Float32 whatever the weights are stored in: the reference must compute as the policy does, or rounding counts as KL.
    policy_model, reward_trunk = (
        decoder(model.config, dtype=jnp.float32, remat=config.remat) for model in (policy, reward)
    )
    reward_on_trunk: RewardModel = reward_model(reward_trunk)
    problem = language_problem(
        policy_model,
        reward_on_trunk,
        objective,
        pairs=config.pairs,
        generation=Generation(config.max_new_tokens, stop_ids=policy.bundle.stop_ids, pad_id=policy.bundle.pad_id),
        microbatches=config.microbatches,
        rollout=_rollout_model(config, policy),
        **keywords,
    )
    return mixture_problem(problem, with_network=config.reward_network) if config.rewards else problem


def _rollout_model(config: Align, policy: Model) -> RolloutModel | None:
    if config.rollout_dtype == "float32":
        return None
    dtype = jnp.dtype(config.rollout_dtype)
    return RolloutModel(decoder(policy.config, dtype=dtype), lambda params: optax.tree.cast(params, dtype))
