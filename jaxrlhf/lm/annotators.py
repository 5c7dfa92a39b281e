"""Annotators that are language models: a reward model from a directory, with Bradley-Terry noise."""

from pathlib import Path

from jaxrlhf import preferences
from jaxrlhf.base.types import Params
from jaxrlhf.lm.hugging_face.weights import WeightsError, load_reward_model
from jaxrlhf.lm.reward import reward_model, score_responses
from jaxrlhf.lm.transformer.model import decoder


def reward_model_annotator(
    directory: str | Path, *, vocabulary_size: int, labels: int = 1
) -> tuple[preferences.Annotator, Params]:
    """Returns an annotator that prefers by a reward model's score, and the parameters it needs.

    The parameters go into `LanguageFrozen.annotator`: as an argument of the step they do not become constants of the
    program. Labels follow `P(response 0 preferred) = sigmoid(score_0 - score_1)`; `BilevelInfo.labels` counts them.

    Args:
        directory: a Hugging Face sequence classifier with one label; see `load_reward_model`.
        vocabulary_size: the policy's. The annotator reads the policy's token ids unchanged.
        labels: independent labels a pair.

    Raises:
        WeightsError: the directory cannot be read as such a model, or its vocabulary is smaller than the policy's.
    """
    shape, params = load_reward_model(directory)
    # It may be larger: a reward model may have padding of its own.
    if shape.vocabulary_size < vocabulary_size:
        raise WeightsError(
            f"The reward model in {directory} reads {shape.vocabulary_size} tokens and the policy writes "
            f"{vocabulary_size}; an annotator needs the policy's tokenizer."
        )
    model = reward_model(decoder(shape))

    def score(sample, frozen):
        return score_responses(model, frozen.annotator, sample.prompts, sample.responses)

    return preferences.gold_annotator(score, labels=labels), params
