"""Settings of `generation_config.json` that are no token ids: kept for exports and printed in plans, but not used here."""

from pathlib import Path
from typing import Any

from jaxrlhf.lm.hugging_face.files import read_json

FILE = "generation_config.json"
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
LEGACY = (
    "bad_words_ids",
    "begin_suppress_tokens",
    "diversity_penalty",
    "do_sample",
    "early_stopping",
    "encoder_no_repeat_ngram_size",
    "epsilon_cutoff",
    "eta_cutoff",
    "exponential_decay_length_penalty",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "length_penalty",
    "max_length",
    "max_new_tokens",
    "min_length",
    "min_new_tokens",
    "min_p",
    "no_repeat_ngram_size",
    "num_beam_groups",
    "num_beams",
    "num_return_sequences",
    "remove_invalid_values",
    "renormalize_logits",
    "repetition_penalty",
    "suppress_tokens",
    "temperature",
    "top_k",
    "top_p",
    "typical_p",
)
"""Settings that older versions of transformers wrote to `config.json`."""
BOOKKEEPING = ("_from_model_config", "transformers_version", "output_attentions", "output_hidden_states", "use_cache")


def generation_settings(directory: str | Path) -> dict[str, Any]:
    """Returns the generation settings of a model directory; without a file of their own, those of `config.json`.

    Raises:
        WeightsError: a file is damaged.
    """
    if (Path(directory) / FILE).is_file():
        return {name: value for name, value in read_json(directory, FILE).items() if name not in IDS}
    settings = read_json(directory, "config.json")
    return {name: settings[name] for name in LEGACY if settings.get(name) is not None}


def printed_settings(directory: str | Path) -> dict[str, Any]:
    """Returns those that change what a model writes, for a plan.

    Raises:
        WeightsError: a file is damaged.
    """
    settings = generation_settings(directory)
    return {name: value for name, value in settings.items() if value is not None and name not in BOOKKEEPING}
