"""Where the assistant's turns stand in a text, for chat templates without generation blocks."""

import re
from collections.abc import Callable, Iterator

from jaxrlhf.data.jinja import HERE
from jaxrlhf.data.messages import message_of
from jaxrlhf.data.records import Message

Write = Callable[[tuple[Message, ...], bool], str]
"""Writes a conversation by its template, with a generation prompt or without."""


def turn_span(write: Write, messages: tuple[Message, ...], index: int, text: str) -> tuple[int, int]:
    """Returns the span `(start, stop)` of an assistant's turn in the conversation's text.

    It begins after the generation prompt. If the text goes on as the turn ends when it is the last one, the span ends
    there. Otherwise the template writes the last turn differently: without what it takes out of earlier turns, such as
    reasoning, or with what it appends to the last, such as an end of text; then the part that both have is the span.

    Args:
        write: writes a conversation.
        messages: the conversation.
        index: of the turn.
        text: the conversation's.

    Raises:
        ValueError: the turn cannot be located.
    """
    before, after = _written(write, messages[:index], True), text
    if index + 1 < len(messages):
        after = write(messages[: index + 1], False)
    if before is None or not (text.startswith(before) and after.startswith(before)):
        raise _not_located()
    start = len(before)
    if text.startswith(after):
        return start, len(after)
    body, rest = after[start:], text[start:]
    shared = next((part for part in _suffixes(body, messages[index]) if rest.startswith(part)), None)
    if shared is not None:
        return start, start + len(shared)
    stop = _end_of_content(write, messages, index, text)
    if stop is None or stop < start:
        raise _not_located()
    alone = _end_of_content(write, messages[: index + 1], index, after)
    return start, stop + len(_shared_end("" if alone is None else after[alone:], text[stop:]))


def _suffixes(body: str, message: Message) -> Iterator[str]:
    """Yields the ends of a turn's text, the longest first, that hold its last word or its calls."""
    calls = message.as_dict().get("tool_calls") or []
    needed = [
        str(call.get("function", call).get("name", ""))
        for call in calls
        if isinstance(call.get("function", call), dict)
    ]
    needed = needed or message.content.split()[-1:]
    latest = min((body.rfind(word) for word in needed), default=-1)
    yield from (body[first:] for first in range(latest + 1))


def _end_of_content(write: Write, messages: tuple[Message, ...], index: int, text: str) -> int | None:
    """Returns where the content of a turn ends in a text; None if the template changes it."""
    message = messages[index]
    for content in (message.content, message.content.rstrip()):
        marked = message_of({**message.as_dict(), "content": content + HERE})._replace(variables=message.variables)
        found = write((*messages[:index], marked, *messages[index + 1 :]), False)
        if found.count(HERE) == 1 and found.replace(HERE, "") == text:
            return found.index(HERE)
    return None


def _shared_end(end: str, following: str) -> str:
    """Returns the longest beginning of a turn's end, up to a special token or white space, with which a text goes on."""
    stops = [match.end() for match in re.finditer(r"[>\]]\s*|\s+", end)]
    return max((end[:stop] for stop in stops if following.startswith(end[:stop])), key=len, default="")


def _written(write: Write, messages: tuple[Message, ...], generation_prompt: bool) -> str | None:
    """Returns a text; None if the template refuses a conversation without messages."""
    try:
        return write(messages, generation_prompt)
    except ValueError:
        if messages:
            raise
        return None


def _not_located() -> ValueError:
    return ValueError(
        "The chat template has no {% generation %} blocks and does not simply append each turn, so the assistant's turns "
        "cannot be located; add the blocks around them."
    )
