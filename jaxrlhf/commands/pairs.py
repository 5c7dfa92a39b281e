"""Preference pairs as `jaxrlhf reward` and `jaxrlhf dpo` read them."""

import dataclasses
from typing import ClassVar, NamedTuple

from jaxrlhf.commands.data import open_records, splits_of
from jaxrlhf.commands.models import Model
from jaxrlhf.commands.options import Groups
from jaxrlhf.commands.stage import StageConfig
from jaxrlhf.data.builders import Prepared, RecordSource
from jaxrlhf.data.tokenization import PairRow, TokenizedRows, tokenize_pairs


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairConfig(StageConfig):
    """Settings common to the stages that learn from pairs."""

    GROUPS: ClassVar[Groups] = {"data": ("max_length", "cut_prompts")}

    max_length: int = 512
    """Maximum tokens of prompt and completion; longer completions are truncated at the end."""
    cut_prompts: bool = False
    """Truncates long prompts at the beginning; otherwise pairs with a prompt that is too long are dropped and counted."""


class PairInputs(NamedTuple):
    """The initial model, and the data at the model's length.

    Attributes:
        start: the initial model.
        max_length: of prompt and completion, in tokens.
        prepared: the data.
        training, held_out: tokenized pairs.
        held_out_records: from which the held-out pairs are.
    """

    start: Model
    max_length: int
    prepared: Prepared
    training: TokenizedRows[PairRow]
    held_out: TokenizedRows[PairRow]
    held_out_records: RecordSource


def read_pairs(config: PairConfig, start: Model) -> PairInputs:
    """Reads the data.

    Raises:
        ValueError, DataError: the data cannot be used, or all held-out pairs are ties.
    """
    prepared = open_records(
        config.data, form=config.format, held_out=config.held_out, skip_bad=config.skip_bad, data_dir=config.data_dir
    )
    max_length, tokenizer = min(config.max_length, start.config.context_length), start.bundle.chat_tokenizer()
    splits = splits_of(prepared)
    training, held_out = (
        tokenize_pairs(tokenizer, split, max_length=max_length, cut_prompts=config.cut_prompts) for split in splits
    )
    if all(row.label == 0.5 for row in held_out.rows):
        raise ValueError(
            "All held-out pairs are ties, which say nothing of accuracy; give more data or another --held-out."
        )
    return PairInputs(start, max_length, prepared, training, held_out, splits[1])
