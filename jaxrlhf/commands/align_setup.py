"""The bilevel algorithm of `jaxrlhf align`, and the parameters that it starts from."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxrlhf import bilevel
from jaxrlhf.base.types import Params
from jaxrlhf.bilevel import Algorithm, BilevelProblem, bilevel_descent, tangent
from jaxrlhf.commands.align_config import Align
from jaxrlhf.commands.annotators import ComparisonAnnotator
from jaxrlhf.commands.mixture import Mixture, open_mixture, upper_with_mixture, weights_of
from jaxrlhf.commands.models import Model
from jaxrlhf.lm import lora
from jaxrlhf.lm.generate import Generation
from jaxrlhf.lm.problem import LanguageFrozen, RolloutModel, language_problem
from jaxrlhf.lm.reward import NOT_IN_TRUNK, RewardModel, reward_model
from jaxrlhf.lm.transformer.model import decoder
from jaxrlhf.preferences import objectives
from jaxrlhf.preferences.mixture import mixture_optimizer, mixture_problem, report_mixture
from jaxrlhf.preferences.scale import learn_scale, scale_optimizer, with_scale
from jaxrlhf.training.sharding import parse_mesh


class AlignSetup(NamedTuple):
    """What a run trains.

    Attributes:
        algorithm: the bilevel algorithm.
        upper: initial parameters of the reward.
        lower: initial parameters of the policy.
        frozen: the reference, and the parameters of a traced annotator.
        policy_of: `(state) -> ` plain parameters of the deployed policy.
        reward_of: `(state) -> ` plain parameters of the reward model; None where there is none.
        mixture: the functions of --rewards, if any.
    """

    algorithm: Algorithm
    upper: Params
    lower: Params
    frozen: LanguageFrozen
    policy_of: Callable[[Any], Params]
    reward_of: Callable[[Any], Params | None]
    mixture: Mixture | None = None


def build_setup(config: Align, policy: Model, reward: Model, annotator: ComparisonAnnotator) -> AlignSetup:
    """Returns the algorithm and initial parameters, for full training or for adapters.

    Args:
        config: of the run.
        policy: the policy, which is also the reference.
        reward: the reward model to start from; with adapters only its configuration is used.
        annotator: labels the pairs.

    Raises:
        ValueError: the reward does not read the policy's tokens, or a setting is out of range.
    """
    # It may read more: padding of its own.
    if reward.config.vocabulary_size < policy.config.vocabulary_size:
        raise ValueError(
            f"The reward model reads {reward.config.vocabulary_size} tokens and the policy writes "
            f"{policy.config.vocabulary_size}; take models of one tokenizer."
        )
    frozen, mixture = LanguageFrozen(policy.params, annotator.params), open_mixture(config)
    if config.lora_rank:
        return _adapters(config, policy, reward, annotator, frozen, mixture)
    algorithm = _algorithm(config, _problem(config, policy, reward), annotator)
    return AlignSetup(
        algorithm,
        _upper(config, reward.params, mixture),
        policy.params,
        frozen,
        lambda state: state.policy,
        lambda state: _reward_part(config, state.upper),
        mixture,
    )


def _upper(config: Align, reward: Params, mixture: Mixture | None) -> Params:
    if mixture is not None:
        reward = upper_with_mixture(mixture, reward if config.reward_network else ())
    return with_scale(reward) if config.learn_scale else reward


def _reward_part(config: Align, upper: Params) -> Any:
    """Returns the parameters of the reward model within the upper parameters; None where there is no model."""
    reward = upper.reward if config.learn_scale else upper
    if not config.rewards:
        return reward
    return reward.network if config.reward_network else None


def scale_notes(config: Align, state: Any) -> list[str]:
    """Returns a sentence on the learned scale, if there is one."""
    if not config.learn_scale:
        return []
    scale, beta = float(np.exp(np.asarray(state.upper.log_scale))), float(state.upper.effective_beta(config.beta))
    return [f"The reward's learned scale is {scale:.3g} at the end: an effective beta of {beta:.3g}."]


def _adapters(
    config: Align,
    policy: Model,
    reward: Model,
    annotator: ComparisonAnnotator,
    frozen: LanguageFrozen,
    mixture: Mixture | None,
) -> AlignSetup:
    base, keys = policy.params, jax.random.split(jax.random.key(config.seed))
    lower, adapter = (lora.init_adapter(key, base, rank=config.lora_rank) for key in keys)
    problem = _problem(
        config,
        policy,
        reward,
        policy_params=lora.policy_on_reference,
        reward_params=lora.reward_on_reference,
    )

    def policy_of(state):
        return lora.merge(base, state.policy)

    def reward_of(state):
        trunk = {name: leaf for name, leaf in base.items() if name not in NOT_IN_TRUNK}
        upper = _reward_part(config, state.upper)
        if upper is None:
            return None
        return {"trunk": lora.merge(trunk, upper["adapter"]), "head": upper["head"]}

    upper = _upper(config, {"adapter": adapter, "head": jnp.zeros(policy.config.width, jnp.float32)}, mixture)
    return AlignSetup(_algorithm(config, problem, annotator), upper, lower, frozen, policy_of, reward_of, mixture)


def _problem(config: Align, policy: Model, reward: Model, **params: Any) -> BilevelProblem:
    objective = objectives.add(
        objectives.likelihood(coupled=False),
        objectives.utility(weight=config.utility_weight, kl_price=config.kl_price),
    )
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
        **params,
    )
    return mixture_problem(problem, with_network=config.reward_network) if config.rewards else problem


def _rollout_model(config: Align, policy: Model) -> RolloutModel | None:
    if config.rollout_dtype == "float32":
        return None
    dtype = jnp.dtype(config.rollout_dtype)
    return RolloutModel(decoder(policy.config, dtype=dtype), lambda params: optax.tree.cast(params, dtype))


def _algorithm(config: Align, problem: BilevelProblem, annotator: ComparisonAnnotator) -> Algorithm:
    rules = {
        "central": lambda: bilevel.central(relative_sigma=config.relative_sigma),
        "forward": lambda: bilevel.forward(config.relative_sigma),
        "five_point": lambda: bilevel.five_point(config.relative_sigma),
        "boltzmann": bilevel.boltzmann,
        "decoupled": bilevel.decoupled,
    }

    def adam(rate):
        return optax.adam(optax.linear_schedule(0.0, rate, config.warmup) if config.warmup else rate)

    rates = learning_rates(config)
    solver = tangent(adam(rates.policy), adam(rates.tangent))
    rule, optimizer = rules[config.estimator](), adam(rates.reward)
    if config.rewards:
        optimizer = mixture_optimizer(adam(_given(config.weights_learning_rate, 0.02)), optimizer)
    if config.learn_scale:
        problem = learn_scale(problem, beta=config.beta)
        optimizer = scale_optimizer(optimizer, adam(_given(config.scale_learning_rate, 0.1)))
    # In parallel only where the mesh splits the tilts.
    sequential = parse_mesh(config.mesh).get("stencil", 1) == 1
    algorithm = bilevel_descent(
        problem, rule, solver, optimizer, beta=config.beta, annotate=annotator.traced, sequential=sequential
    )
    return report_mixture(algorithm, weights_of, kl_price=config.kl_price) if config.rewards else algorithm


class LearningRates(NamedTuple):
    """Of the policy, of its response to the reward, and of the reward model."""

    policy: float
    tangent: float
    reward: float


def learning_rates(config: Align) -> LearningRates:
    """Returns the learning rates given, or their defaults; a rate of 0 is one, and keeps its parameters fixed."""
    policy = _given(config.policy_learning_rate, 1e-3 if config.lora_rank else 2e-4)
    reward = _given(config.reward_learning_rate, 2e-3 if config.lora_rank else 1e-3)
    return LearningRates(policy, _given(config.tangent_learning_rate, policy / 20), reward)


def _given(value: float | None, default: float) -> float:
    return default if value is None else value
