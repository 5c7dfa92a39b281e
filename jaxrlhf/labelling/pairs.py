"""A pair as people see it: the turns of a prompt, and those of two completions."""

import json
from typing import Any, NamedTuple

from jaxrlhf.annotation.journal import question_key
from jaxrlhf.data.records import Message, Text


class Turn(NamedTuple):
    """One turn of a conversation; a plain text is one turn whose role is empty.

    Attributes:
        role, text: as shown.
        animation: of `segments.animation`, shown in place of the text; or empty.
    """

    role: str
    text: str
    animation: str = ""


class Pair(NamedTuple):
    """Two completions of a prompt.

    Attributes:
        key: `question_key` of the texts; equal pairs are one.
        prompt, first, second: turns.
        forecast: probability that the first is preferred, by the reward model at hand; None where there is none.
    """

    key: bytes
    prompt: tuple[Turn, ...]
    first: tuple[Turn, ...]
    second: tuple[Turn, ...]
    forecast: float | None = None


def make_pair(name: str, prompt: Text, first: Text, second: Text, *, forecast: float | None = None) -> Pair:
    """Returns the pair of two completions.

    Args:
        name: of the annotator, part of the key as in `question_key`.
        prompt, first, second: texts, or messages.
        forecast: see `Pair`.
    """
    key = question_key(name, _canonical(prompt), _canonical(first), _canonical(second))
    return Pair(key, _turns(prompt), _turns(first), _turns(second), forecast)


def to_json(pair: Pair) -> str:
    """Returns a pair's texts as ASCII, which holds lone surrogates too."""
    return json.dumps({"prompt": pair.prompt, "first": pair.first, "second": pair.second})


def _canonical(text: Text) -> str:
    return text if isinstance(text, str) else json.dumps([message._asdict() for message in text])


def _turns(text: Text) -> tuple[Turn, ...]:
    if isinstance(text, str):
        return (Turn("", text),)
    return tuple(_turn(message) for message in text)


def _turn(message: Message) -> Turn:
    """Returns a message with all that it holds: calls of tools and reasoning are shown as JSON below its content."""
    fields: dict[str, Any] = message.as_dict()
    more = {name: value for name, value in fields.items() if name not in ("role", "content")}
    if message.fields and not isinstance(fields.get("content", ""), str):
        more["content"] = fields["content"]
    below = json.dumps(more, indent=2, ensure_ascii=False) if more else ""
    return Turn(message.role, "\n".join(filter(None, [message.content, below])))
