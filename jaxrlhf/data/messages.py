"""Messages of JSON objects, as OpenAI, transformers and TRL write them."""

import json
from typing import Any

from jaxrlhf.data.records import Message

CALLS = ("tool_calls", "function_call")
REASONING = ("reasoning_content", "thinking", "reasoning")
"""The names of a message's reasoning, in transformers' order."""
RESULTS = ("tool", "function", "ipython", "observation")
"""Roles whose content may be any JSON value: what a tool returned."""


def parse_messages(value: list, name: str) -> tuple[Message, ...]:
    """Returns the messages of a list of objects.

    Raises:
        ValueError: one is malformed; the message calls the list `name`.
    """
    return tuple(_message(entry, f"{name}[{index}]") for index, entry in enumerate(value))


def message_of(fields: dict[str, Any], name: str = "the message") -> Message:
    """Returns the message that chat templates see as these fields; those that are null are absent, as in transformers.

    Raises:
        ValueError: a number is not finite.
    """
    fields = {key: entry for key, entry in fields.items() if entry is not None}
    content = fields.get("content", "")
    if isinstance(content, list):
        content = "".join(part["text"] for part in content if isinstance(part, dict) and _is_text(part))
    if set(fields) == {"role", "content"} and isinstance(fields["content"], str):
        return Message(fields["role"], fields["content"])
    return Message(fields["role"], content if isinstance(content, str) else "", to_json(fields, name))


def to_json(value: Any, name: str) -> str:
    """Returns JSON that keeps the order of keys; raises ValueError if a number or another value has no JSON form."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except ValueError:
        raise ValueError(f"{name} holds a number that is not finite.") from None
    except TypeError as error:
        raise ValueError(f"{name} holds a value that is no JSON ({error}).") from None


def shown(value: Any) -> str:
    """Returns a value as messages show it, in at most 200 characters."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:197]}..."


def _message(value: Any, name: str) -> Message:
    expected = f"{name} must be an object with the strings role and content, got {shown(value)}."
    if not isinstance(value, dict):
        raise ValueError(expected)
    if "role" not in value and {"from", "value"} <= set(value):
        raise ValueError(f"{name} is in ShareGPT's format; rename from and value to role and content.")
    role, content = value.get("role"), value.get("content")
    if not isinstance(role, str) or not role:
        raise ValueError(expected)
    if value.get("tool_calls") is not None and not _is_objects(value["tool_calls"]):
        raise ValueError(f"{name}.tool_calls must be a list of objects.")
    speaks = role == "assistant" and any(value.get(key) for key in (*CALLS, *REASONING))
    if content is None and not speaks:
        raise ValueError(expected)
    if isinstance(content, list) and role not in RESULTS:
        other = next((part for part in content if not (isinstance(part, dict) and _is_text(part))), None)
        if other is not None:
            kind = other.get("type") if isinstance(other, dict) else type(other).__name__
            raise ValueError(f"{name}.content has a part of the type {kind!r}; only parts of text are read here.")
    elif not isinstance(content, str | None) and role not in RESULTS:
        raise ValueError(expected)
    return message_of(value, name)


def _is_text(part: dict) -> bool:
    return part.get("type") == "text" and isinstance(part.get("text"), str)


def _is_objects(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(entry, dict) for entry in value)
