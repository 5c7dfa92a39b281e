"""Data that people bring: records from JSONL, and HH-RLHF."""

from jaxrlhf.data.records import (
    BadLine,
    DataError,
    Demonstration,
    Judged,
    Message,
    Preference,
    Prompt,
    Ranked,
    Records,
    pairs_of,
    parse_record,
    read_records,
    split_prompt,
)

__all__ = [
    "BadLine",
    "DataError",
    "Demonstration",
    "Judged",
    "Message",
    "Preference",
    "Prompt",
    "Ranked",
    "Records",
    "pairs_of",
    "parse_record",
    "read_records",
    "split_prompt",
]
