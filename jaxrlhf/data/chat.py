"""Chat templates: a conversation as the text that a model was trained on, and the spans that the assistant wrote.

Templates are Jinja files from a model's folder, so they run in a sandbox without access to Python. They see messages and
special tokens only, and no clock, so that rendering is reproducible.
"""

import functools
import json
import pathlib
import re
from collections.abc import Iterator
from typing import NamedTuple

import jinja2
import jinja2.nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from jaxrlhf.data.records import DataError, Message
from jaxrlhf.data.special_tokens import template_tokens, tokenizer_settings

# Markers around a template's generation blocks, from Unicode's private use area; refused inside messages.
BEGIN, END = "\uf8f0", "\uf8f1"

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
    """A Jinja source, and the special tokens that it may use, such as `bos_token` and `eos_token`."""

    source: str
    tokens: dict[str, str]


class _Generation(Extension):
    """The blocks `{% generation %}...{% endgeneration %}`, which mark what the assistant wrote."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller):
        return BEGIN + caller() + END


def load_chat_template(directory: str | pathlib.Path) -> ChatTemplate | None:
    """Returns a model folder's template, from `chat_template.jinja` or `tokenizer_config.json`; None if there is none.

    Raises:
        DataError: a file is damaged.
    """
    directory = pathlib.Path(directory)
    path = directory / "tokenizer_config.json"
    source = tokenizer_settings(directory).get("chat_template")
    if isinstance(source, list):
        by_name = {str(entry.get("name")): entry.get("template") for entry in source if isinstance(entry, dict)}
        source = by_name.get("default")
        if source is None and not (directory / "chat_template.jinja").exists():
            names = ", ".join(by_name) or "nothing"
            raise DataError(f"{path}: chat_template names {names} and no default; name one of the templates so.")
    jinja_path = directory / "chat_template.jinja"
    if jinja_path.exists():
        try:
            source = jinja_path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{jinja_path} is not readable as text ({error}); copy it again.") from None
    if source is None:
        return None
    if not isinstance(source, str):
        raise DataError(f"{path}: chat_template must be a text or a list of named ones, got {type(source).__name__}.")
    return ChatTemplate(source, template_tokens(directory))


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
    if any(marker in message.content for message in messages for marker in (BEGIN, END)):
        raise ValueError("A message holds the private characters U+F8F0 or U+F8F1; take them out.")
    text, spans = _strip_markers(_run(template, messages, generation_prompt))
    if not spans:
        spans = tuple(_spans_by_turn(template, messages, text))
    return Rendered(text, spans)


def rendered_text(template: ChatTemplate, messages: tuple[Message, ...], *, generation_prompt: bool = False) -> str:
    """Returns a conversation's text, whether or not the assistant's spans can be located in it.

    Raises:
        ValueError: the template fails or refuses the conversation.
    """
    return _strip_markers(_run(template, messages, generation_prompt))[0]


def split_completion(
    template: ChatTemplate, prompt: tuple[Message, ...], completion: tuple[Message, ...]
) -> tuple[str, str]:
    """Returns the text of a prompt, with its generation prompt, and the text of the completion that follows it.

    Raises:
        ValueError: as `render`; or the conversation's text does not begin with the prompt's.
    """
    prompt_text = render(template, prompt, generation_prompt=True).text
    text = render(template, prompt + completion).text
    if not text.startswith(prompt_text):
        raise ValueError(
            "The chat template writes the prompt differently once a completion follows, so the two cannot be separated; "
            "fix the template."
        )
    return prompt_text, text[len(prompt_text) :]


@functools.lru_cache(maxsize=16)
def _compiled(source: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    return environment.from_string(source)


def _run(template: ChatTemplate, messages: tuple[Message, ...], generation_prompt: bool) -> str:
    def refuse(message):
        raise jinja2.TemplateError(message)

    dicts = [{"role": message.role, "content": message.content} for message in messages]
    try:
        return _compiled(template.source).render(
            messages=dicts, add_generation_prompt=generation_prompt, raise_exception=refuse, **template.tokens
        )
    except (
        jinja2.TemplateError,
        TypeError,
        ValueError,
        ArithmeticError,
        LookupError,
        AttributeError,
        RecursionError,
        MemoryError,
    ) as error:
        raise ValueError(f"The chat template fails on a conversation of {len(messages)} messages: {error}.") from None


def _strip_markers(marked: str) -> tuple[str, tuple[tuple[int, int], ...]]:
    """Returns a text without its markers, and the spans that they enclosed."""
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


def _spans_by_turn(template: ChatTemplate, messages: tuple[Message, ...], text: str) -> Iterator[tuple[int, int]]:
    """Yields the assistant's spans of a text, from what each of its messages adds."""
    for index, message in enumerate(messages):
        if message.role != "assistant":
            continue
        before = _strip_markers(_run(template, messages[:index], True))[0]
        after = _strip_markers(_run(template, messages[: index + 1], False))[0]
        start, stop = len(before), len(after)
        if not text.startswith(after):
            # What a template appends to the last turn only, such as an end of text, is not part of an earlier turn.
            candidates = (message.content, message.content.strip())
            content = next((candidate for candidate in candidates if candidate in text[start:]), None)
            stop = -1 if content is None else text.index(content, start) + len(content)
        if stop < start or not (after.startswith(before) and text.startswith(before)):
            raise ValueError(
                "The chat template has no {% generation %} blocks and does not simply append each turn, so the "
                "assistant's turns cannot be located; add the blocks around them."
            )
        yield start, stop
