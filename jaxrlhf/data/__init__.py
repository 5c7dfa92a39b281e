"""Training data: records from JSONL files, and HH-RLHF."""

from jaxrlhf.data.records import (
    BadLine,
    DataError,
    Demonstration,
    Message,
    Preference,
    Prompt,
    Ranking,
    Records,
    UnpairedPreference,
    parse_record,
    ranking_pairs,
    read_records,
    split_prompt,
)

__all__ = [
    "BadLine",
    "DataError",
    "Demonstration",
    "Message",
    "Preference",
    "Prompt",
    "Ranking",
    "Records",
    "UnpairedPreference",
    "parse_record",
    "ranking_pairs",
    "read_records",
    "split_prompt",
]
