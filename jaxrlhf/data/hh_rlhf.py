"""HH-RLHF (arXiv 2204.05862) as published: JSONL of two transcripts with a common prefix.

A transcript is a sequence of turns `Human: ...` and `Assistant: ...`, each after a blank line. The prompt is the turns
that both transcripts share; the rest of each begins with a turn of the assistant (a few completions have several turns).
"""

import re
from typing import Any

from jaxrlhf.data.records import Message, Parsed, Preference, split_prompt

TURN = re.compile(r"\n\n(Human|Assistant):")
ROLES = {"Human": "user", "Assistant": "assistant"}


def is_published(value: Any) -> bool:
    """Returns whether a JSON value is a pair as published: two strings that begin as transcripts do, and no prompt."""
    return (
        isinstance(value, dict)
        and value.get("prompt") is None
        and all(isinstance(value.get(name), str) and TURN.match(value[name]) for name in ("chosen", "rejected"))
    )


def parse(value: Any) -> Preference:
    """Returns a pair as conversations; whitespace around a turn is stripped.

    Raises:
        ValueError: the value is malformed; the message says how.
    """
    if not isinstance(value, dict) or not all(isinstance(value.get(name), str) for name in ("chosen", "rejected")):
        raise ValueError("expected an object with the strings chosen and rejected.")
    if value.get("prompt") is not None:
        raise ValueError("HH-RLHF as published has no prompt beside chosen and rejected.")
    prompt, chosen, rejected = split_prompt(*(parse_transcript(value[name]) for name in ("chosen", "rejected")))
    for name, completion in (("chosen", chosen), ("rejected", rejected)):
        if not completion or not isinstance(completion[0], Message) or completion[0].role != "assistant":
            raise ValueError(f"{name} does not go on with an Assistant's turn where the two part.")
    return Preference(prompt, chosen, rejected)


def read(value: Any) -> Parsed:
    """Returns a pair as conversations, and the keys that nothing reads, for `read_records`.

    Raises:
        ValueError: as `parse`.
    """
    record = parse(value)
    return Parsed(
        record, tuple(name for name in value if name not in ("chosen", "rejected") and value[name] is not None)
    )


def parse_transcript(transcript: str) -> tuple[Message, ...]:
    """Returns the messages of a transcript.

    Raises:
        ValueError: it does not begin with a turn.
    """
    before, *turns = TURN.split(transcript)
    if before.strip() or not turns:
        raise ValueError("a transcript must begin with a blank line and 'Human:' or 'Assistant:'.")
    return tuple(Message(ROLES[name], text.strip()) for name, text in zip(turns[::2], turns[1::2], strict=True))
