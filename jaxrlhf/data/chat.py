"""Chat templates: a conversation as the text that a model was trained on, and the spans that the assistant wrote.

Templates are Jinja files from a model's folder, so they run in a sandbox without access to Python. They see what
transformers 5 gives them: the messages, `tools` and `documents` (None without), special tokens, `strftime_now` (today's
date), and what a record has in `chat_template_kwargs`.
"""

import functools
import itertools
import json
import pathlib
import re
from typing import Any, NamedTuple

from jaxrlhf.data.jinja import ANY_KEY, BEGIN, END, HERE, has_generation_blocks, names_read, render_template
from jaxrlhf.data.messages import CALLS, REASONING, message_of
from jaxrlhf.data.records import DataError, Message
from jaxrlhf.data.spans import turn_span
from jaxrlhf.data.special_tokens import template_tokens, tokenizer_settings

TRANSCRIPT = """\
{%- for message in messages -%}
{{ "\\n\\n" + {"user": "Human", "assistant": "Assistant"}[message.role] + ":" -}}
{%- if message.role == "assistant" -%}
{% generation %}{{ " " + message.content + (eos_token if loop.last else "") }}{% endgeneration -%}
{%- else %}{{ " " + message.content }}{% endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ "\\n\\nAssistant:" }}{% endif -%}"""
"""Human and Assistant turns as in HH-RLHF, for models without a template. The end-of-text token ends the last turn; the
space after a colon belongs to the turn, as tokenizers merge it with the word that follows."""


class Rendered(NamedTuple):
    """A text, and the character spans `(start, stop)` that the assistant wrote, in order."""

    text: str
    spans: tuple[tuple[int, int], ...]


class ChatTemplate(NamedTuple):
    """A model's chat template.

    Attributes:
        source: in Jinja; None if there are several templates and none is the default.
        tokens: the special tokens that it may use, such as `bos_token` and `eos_token`.
        named: all templates by name, if none is the default or one, "tool_use", is for conversations with tools.
    """

    source: str | None
    tokens: dict[str, str]
    named: tuple[tuple[str, str], ...] = ()


def load_chat_template(directory: str | pathlib.Path) -> ChatTemplate | None:
    """Returns a model folder's template, from its `.jinja` files or `tokenizer_config.json`; None if there is none.

    Raises:
        DataError: a file is damaged.
    """
    directory = pathlib.Path(directory)
    path = directory / "tokenizer_config.json"
    named = _template_files(directory) or _templates_of(tokenizer_settings(directory).get("chat_template"), path)
    if not named:
        return None
    several = tuple(named.items()) if "tool_use" in named or "default" not in named else ()
    return ChatTemplate(named.get("default"), template_tokens(directory), several)


def render(template: ChatTemplate, messages: tuple[Message, ...], *, generation_prompt: bool = False) -> Rendered:
    """Returns a conversation's text and the assistant's spans.

    The spans are the template's generation blocks. If it has none, an assistant's span is what its message adds to the
    text of the preceding messages with a generation prompt.

    Args:
        template: the model's.
        messages: the conversation.
        generation_prompt: appends the generation prompt, after which the assistant replies.

    Raises:
        ValueError: the template fails or refuses the conversation, a message contains the markers, or the template has
            no generation blocks and does not simply append each turn.
    """
    _check(template, messages)
    text, spans = _strip_markers(write(template, messages, generation_prompt))
    if not has_generation_blocks(source_of(template, messages)):
        spans = tuple(_spans_of_turns(template, messages, text, range(len(messages))))
    return Rendered(text, spans)


def rendered_text(template: ChatTemplate, messages: tuple[Message, ...], *, generation_prompt: bool = False) -> str:
    """Returns a conversation's text, whether or not the assistant's spans can be located in it.

    Raises:
        ValueError: the template fails or refuses the conversation.
    """
    return _strip_markers(write(template, messages, generation_prompt))[0]


def render_prompt(template: ChatTemplate, prompt: tuple[Message, ...]) -> str:
    """Returns the text that the assistant continues: with the generation prompt, or up to the end of its last turn.

    A prompt whose last turn is the assistant's holds the beginning of that turn, as with `continue_final_message` in
    transformers.

    Raises:
        ValueError: the template fails or refuses the conversation, or does not write the content of the last turn.
    """
    _check(template, prompt)
    if not (prompt and prompt[-1].role == "assistant"):
        return _strip_markers(write(template, prompt, True))[0]
    # The space shows whether the template strips contents.
    last = _with_content(prompt[-1], prompt[-1].content + HERE + " ")
    text, here, after = _strip_markers(write(template, (*prompt[:-1], last), False))[0].rpartition(HERE)
    if not here or _has_calls(prompt[-1]):
        raise ValueError(
            "The prompt ends with a turn of the assistant that cannot be continued; end it with another turn."
        )
    return text if after.startswith(" ") else text.rstrip()


def render_completion(
    template: ChatTemplate, prompt: tuple[Message, ...], completion: tuple[Message, ...]
) -> tuple[str, Rendered]:
    """Returns the text of a prompt, and the text of the conversation with the assistant's spans in the completion.

    Turns before the assistant's first belong to the prompt. If the prompt then ends with the assistant's turn, the first
    turn of the completion continues it.

    Raises:
        ValueError: as `render`; the completion has no turn of the assistant; or the conversation's text does not begin
            with the prompt's.
    """
    index = next((index for index, message in enumerate(completion) if message.role == "assistant"), None)
    if index is None:
        raise ValueError("The completion has no turn with the role assistant.")
    prompt, completion = prompt + completion[:index], completion[index:]
    first = len(prompt)
    if prompt and prompt[-1].role == "assistant":
        prefix, first = render_prompt(template, prompt), first - 1
        messages = (*prompt[:-1], _continued(prompt[-1], completion[0]), *completion[1:])
    else:
        messages = prompt + completion
        _check(template, messages)
        prefix = _strip_markers(write(template, prompt, True))[0]
    text, spans = _strip_markers(write(template, messages, False))
    if not text.startswith(prefix):
        raise _not_separated(template, prefix, text)
    if not has_generation_blocks(source_of(template, messages)):
        later = range(first + 1, len(messages))
        spans = (
            ((len(prefix), len(text)),)
            if not later
            else _spans_of_turns(template, messages, text, range(first, len(messages)))
        )
    return prefix, Rendered(text, tuple((max(start, len(prefix)), stop) for start, stop in spans if stop > len(prefix)))


def split_completion(
    template: ChatTemplate, prompt: tuple[Message, ...], completion: tuple[Message, ...]
) -> tuple[str, str]:
    """Returns the text of a prompt, with its generation prompt, and the text of the completion that follows it.

    Raises:
        ValueError: as `render_completion`.
    """
    before, rendered = render_completion(template, prompt, completion)
    return before, rendered.text[len(before) :]


def _template_files(directory: pathlib.Path) -> dict[str, str]:
    """Returns the templates in files of their own, by name; they take precedence over those in the settings."""
    paths = {"default": directory / "chat_template.jinja"} if (directory / "chat_template.jinja").exists() else {}
    paths |= {path.stem: path for path in sorted((directory / "additional_chat_templates").glob("*.jinja"))}
    sources = {}
    for name, path in paths.items():
        try:
            sources[name] = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path} is not readable as text ({error}); copy it again.") from None
    return sources


def _templates_of(value: Any, path: pathlib.Path) -> dict[str, str]:
    """Returns the templates in a tokenizer's settings, by name."""
    if value is None:
        return {}
    sources = value if isinstance(value, dict) else {"default": value}
    if isinstance(value, list) and all(isinstance(entry, dict) for entry in value):
        sources = {str(entry.get("name")): entry.get("template") for entry in value}
    if not sources or not all(isinstance(source, str) for source in sources.values()):
        raise DataError(f"{path}: chat_template must be a text or a list of named ones.")
    return sources


def source_of(template: ChatTemplate, messages: tuple[Message, ...]) -> str:
    """Returns the template for a conversation; as in transformers, "tool_use" is for those with tools.

    Raises:
        ValueError: there are several, and none is the default.
    """
    named = dict(template.named)
    source = named.get("tool_use") if variables_of(messages).get("tools") is not None else None
    source = template.source if source is None else source
    if source is None:
        raise ValueError(
            f"The model's chat_template has the names {', '.join(sorted(named))} and no default; name one of them so."
        )
    return source


def variables_of(messages: tuple[Message, ...]) -> dict[str, Any]:
    """Returns what the row of a conversation gives its template beside the messages."""
    return json.loads(messages[0].variables) if messages and messages[0].variables else {}


def _check(template: ChatTemplate, messages: tuple[Message, ...]) -> None:
    """Raises ValueError if a conversation holds markers, or what its template must not leave out."""
    for message in messages:
        if any(marker in part for marker in (BEGIN, END, HERE) for part in message):
            raise ValueError("A message holds the private characters U+F8F0, U+F8F1 or U+F8F2; take them out.")
    roles = sorted({message.role for message in messages} - {"user", "assistant"})
    if template.source == TRANSCRIPT and roles:
        raise ValueError(
            f"The model has no chat template, and a plain transcript knows the roles user and assistant, not {roles[0]}; "
            "take a model with a template, or take such turns out."
        )
    if any(_has_calls(message) for message in messages):
        read = names_read(source_of(template, messages))
        for message in messages:
            missing = [name for name in CALLS if message.as_dict().get(name) and name not in read]
            if missing and ANY_KEY not in read:
                raise ValueError(
                    f"{_name(template)} does not write {missing[0]}, so the assistant's turn would lack its call; use one "
                    "that does."
                )


def _not_separated(template: ChatTemplate, prefix: str, text: str) -> ValueError:
    shared = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(prefix, text, strict=False))
    rest, detail = prefix[sum(1 for _ in shared) :], ""
    if len(rest) <= 24:
        # What follows the assistant's header is the same for all records, and so one reason.
        detail = f": its generation prompt ends in {rest!r}, and a finished turn has no such words"
    return ValueError(
        f"{_name(template)} writes the prompt differently once a completion follows, so the two cannot be "
        f"separated{detail}; fix the template."
    )


def _name(template: ChatTemplate) -> str:
    return (
        "The plain transcript of a model without a chat template"
        if template.source == TRANSCRIPT
        else "The chat template"
    )


def write(template: ChatTemplate, messages: tuple[Message, ...], generation_prompt: bool) -> str:
    """Returns a conversation's text with markers around generation blocks.

    Raises:
        ValueError: the template fails or refuses the conversation.
    """
    dicts = [message.as_dict() for message in messages]
    for entry in dicts:
        # As in transformers: the names of reasoning stand for each other.
        reasoning = next((entry[name] for name in REASONING if entry.get(name) is not None), None)
        if reasoning is not None:
            entry |= {"thinking": entry.get("thinking", reasoning), "reasoning_content": reasoning}
    variables = {"tools": None, "documents": None, **template.tokens, **variables_of(messages)}
    variables |= {"messages": dicts, "add_generation_prompt": generation_prompt}
    try:
        text = render_template(source_of(template, messages), variables)
    except ValueError as error:
        if template.source is None:
            raise
        raise ValueError(f"{_name(template)} fails on a conversation of {len(messages)} messages: {error}.") from None
    for entry in dicts:
        content = entry.get("content")
        if isinstance(content, list | dict) and content and str(content) in text:
            raise ValueError(
                "The chat template writes a content that is a list or an object as Python prints it; write a string."
            )
    return text


def _strip_markers(marked: str) -> tuple[str, tuple[tuple[int, int], ...]]:
    """Returns a text without the markers of generation blocks, and the spans that they enclosed."""
    parts, spans, position, start = [], [], 0, 0
    for piece in re.split(f"([{BEGIN}{END}])", marked):
        if piece == BEGIN:
            start = position
        elif piece == END:
            spans.append((start, position))
        else:
            parts.append(piece)
            position += len(piece)
    return "".join(parts), tuple(spans)


def _spans_of_turns(
    template: ChatTemplate, messages: tuple[Message, ...], text: str, indices: range
) -> list[tuple[int, int]]:
    """Returns the spans of those of the assistant's turns that have these indices, from what each message adds."""
    written = functools.partial(write, template)
    return [turn_span(written, messages, index, text) for index in indices if messages[index].role == "assistant"]


def _has_calls(message: Message) -> bool:
    return bool(message.fields) and message.role == "assistant" and any(map(message.as_dict().get, CALLS))


def _with_content(message: Message, content: str) -> Message:
    return message_of({**message.as_dict(), "content": content})._replace(variables=message.variables)


def _continued(beginning: Message, rest: Message) -> Message:
    """Returns one turn of a beginning and the rest; raises ValueError if both give a key other than role and content."""
    one, other = beginning.as_dict(), rest.as_dict()
    both = sorted(set(one) & set(other) - {"role", "content"})
    if both:
        raise ValueError(f"The last turn of the prompt and its continuation both give {both[0]}; give it once.")
    joined = message_of({**one, **other, "content": beginning.content + rest.content})
    return joined._replace(variables=beginning.variables)
