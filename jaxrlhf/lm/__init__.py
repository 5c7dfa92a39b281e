"""Language models: a decoder, its sampler and log-probabilities, rewards, weights, and RLHF as a bilevel problem."""

from jaxrlhf.lm.generate import Completions, generate
from jaxrlhf.lm.log_probs import completion_log_probs
from jaxrlhf.lm.model import DecoderConfig, LanguageModel, decoder
from jaxrlhf.lm.problem import LanguageFrozen, Prompts, Responses, language_problem
from jaxrlhf.lm.reward import RewardModel, reward_model
from jaxrlhf.lm.weights import (
    SpecialIds,
    WeightsError,
    load_decoder,
    load_reward_model,
    load_tokenizer,
    save_decoder,
    save_reward_model,
    special_ids,
)

__all__ = [
    "Completions",
    "DecoderConfig",
    "LanguageFrozen",
    "LanguageModel",
    "Prompts",
    "Responses",
    "RewardModel",
    "SpecialIds",
    "WeightsError",
    "completion_log_probs",
    "decoder",
    "generate",
    "language_problem",
    "load_decoder",
    "load_reward_model",
    "load_tokenizer",
    "reward_model",
    "save_decoder",
    "save_reward_model",
    "special_ids",
]
