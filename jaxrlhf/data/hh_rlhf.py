"""HH-RLHF (arXiv 2204.05862) as published: JSONL of two transcripts that begin alike.

A transcript is turns behind blank lines, `Human: ...` and `Assistant: ...`. The prompt is the turns that both transcripts
share; what is left of each begins with a turn of the assistant (in few pairs it says more than one).
"""

import re
from typing import Any

from jaxrlhf.data.records import Message, Preference, split_prompt

TURN = re.compile(r"\n\n(Human|Assistant):")
ROLES = {"Human": "user", "Assistant": "assistant"}


def parse(value: Any) -> Preference:
    """Returns a pair as conversations, for `read_records`; spaces around a turn are not kept.

    Raises:
        ValueError: saying what is wrong.
    """
    if not isinstance(value, dict) or not all(isinstance(value.get(name), str) for name in ("chosen", "rejected")):
        raise ValueError("expected an object with the strings chosen and rejected.")
    prompt, chosen, rejected = split_prompt(*(turns(value[name]) for name in ("chosen", "rejected")))
    for name, rest in (("chosen", chosen), ("rejected", rejected)):
        if not rest or not isinstance(rest[0], Message) or rest[0].role != "assistant":
            raise ValueError(f"{name} does not go on with an Assistant's turn where the two part.")
    return Preference(prompt, chosen, rejected)


def turns(transcript: str) -> tuple[Message, ...]:
    """Returns the messages of a transcript.

    Raises:
        ValueError: it does not begin with a turn.
    """
    before, *rest = TURN.split(transcript)
    if before.strip() or not rest:
        raise ValueError("a transcript must begin with a blank line and 'Human:' or 'Assistant:'.")
    return tuple(Message(ROLES[name], said.strip()) for name, said in zip(rest[::2], rest[1::2], strict=True))
