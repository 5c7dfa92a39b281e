"""Training data: records from JSONL, Parquet and CSV files in the formats of `jaxrlhf.data.formats`, and HH-RLHF."""

from jaxrlhf.data.formats import parse_record
from jaxrlhf.data.reading import BadLine, Records, read_records
from jaxrlhf.data.records import (
    DataError,
    Demonstration,
    Message,
    Preference,
    Prompt,
    Ranking,
    UnpairedPreference,
    ranking_pairs,
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
