"""Language models: decoders, sampler, log-probabilities, rewards, adapters, losses, weights, and RLHF as a problem."""

from jaxrlhf.lm.generate import Completions, Generation, generate
from jaxrlhf.lm.hugging_face.weights import (
    SpecialIds,
    WeightsError,
    load_decoder,
    load_reward_model,
    load_tokenizer,
    save_decoder,
    save_reward_model,
    special_ids,
)
from jaxrlhf.lm.learning import LearningAlgorithm, learning, preference_loss, supervised_loss
from jaxrlhf.lm.log_probs import completion_log_probs
from jaxrlhf.lm.lora import attach, init_adapter, merge, policy_on_reference, reward_on_reference
from jaxrlhf.lm.pairing import Prompts, Responses
from jaxrlhf.lm.problem import LanguageFrozen, RolloutModel, language_problem
from jaxrlhf.lm.reward import RewardModel, reward_model
from jaxrlhf.lm.transformer.model import DecoderConfig, LanguageModel, decoder, without_cache

__all__ = [
    "Completions",
    "DecoderConfig",
    "Generation",
    "LanguageFrozen",
    "LanguageModel",
    "LearningAlgorithm",
    "Prompts",
    "Responses",
    "RewardModel",
    "RolloutModel",
    "SpecialIds",
    "WeightsError",
    "attach",
    "completion_log_probs",
    "decoder",
    "generate",
    "init_adapter",
    "language_problem",
    "learning",
    "load_decoder",
    "load_reward_model",
    "load_tokenizer",
    "merge",
    "policy_on_reference",
    "preference_loss",
    "reward_model",
    "reward_on_reference",
    "save_decoder",
    "save_reward_model",
    "special_ids",
    "supervised_loss",
    "without_cache",
]
