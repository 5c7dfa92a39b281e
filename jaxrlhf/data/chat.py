"""Chat templates: conversations as the text that a model was trained on, and which of it the assistant said.

Templates are Jinja from a model's folder, so they are run in a sandbox that reaches no Python, and see messages and the
special tokens only; no clock, so that a text is the same tomorrow.
"""

import functools
import json
import pathlib
import re
from typing import Any, NamedTuple

import jinja2
import jinja2.nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from jaxrlhf.data.records import DataError, Message

# Around what a template says the assistant generates; of Unicode's private use, refused inside messages.
BEGINS, ENDS = "\uf8f0", "\uf8f1"

TRANSCRIPT = """\
{%- for message in messages -%}
{{ "\\n\\n" + {"user": "Human", "assistant": "Assistant"}[message.role] + ":" -}}
{%- if message.role == "assistant" -%}
{% generation %}{{ " " + message.content + (eos_token if loop.last else "") }}{% endgeneration -%}
{%- else %}{{ " " + message.content }}{% endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ "\\n\\nAssistant:" }}{% endif -%}"""
"""Human and Assistant turns as in HH-RLHF, for models that bring no template. The end of text ends the last turn; the
space behind a colon is the speaker's, as tokenizers join it to the word that follows."""


class Rendered(NamedTuple):
    """A text, and the spans `(first, last + 1)` of its characters that the assistant said, in order."""

    text: str
    spans: tuple[tuple[int, int], ...]


class ChatTemplate(NamedTuple):
    """A Jinja source, and the special tokens that it may name, such as `bos_token` and `eos_token`."""

    source: str
    tokens: dict[str, str]


class _Generation(Extension):
    """The blocks `{% generation %}...{% endgeneration %}`, which mark what the assistant says."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller):
        return BEGINS + caller() + ENDS


def load_chat_template(directory: str | pathlib.Path) -> ChatTemplate | None:
    """Returns a model folder's template, of `chat_template.jinja` or `tokenizer_config.json`; None where there is none.

    Raises:
        DataError: a file is damaged.
    """
    directory = pathlib.Path(directory)
    path = directory / "tokenizer_config.json"
    settings: Any = {}
    if path.exists():
        try:
            settings = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(f"{path} is not JSON ({error}); copy it again.") from None
    if not isinstance(settings, dict):
        raise DataError(f"{path} holds no object; copy it again.")
    source = settings.get("chat_template")
    if isinstance(source, list):
        named = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, dict)}
        source = named.get("default")
    alone = directory / "chat_template.jinja"
    if alone.exists():
        try:
            source = alone.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{alone} is not readable as text ({error}); copy it again.") from None
    if source is None:
        return None
    if not isinstance(source, str):
        raise DataError(f"{path}: chat_template must be a text or a list of named ones, got {type(source).__name__}.")
    return ChatTemplate(source, special_tokens(settings))


def special_tokens(settings: dict) -> dict[str, str]:
    """Returns the special tokens' texts of a `tokenizer_config.json`."""
    found = {}
    for name, value in settings.items():
        text = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(text, str):
            found[name] = text
    return found


def render(template: ChatTemplate, messages: tuple[Message, ...], *, generation_prompt: bool = False) -> Rendered:
    """Returns a conversation's text and the assistant's spans.

    The spans are the template's generation blocks. Where it has none, a turn of the assistant is what its message adds to
    the text of the messages before it with a generation prompt.

    Args:
        template: of the model.
        messages: the conversation.
        generation_prompt: ends with what makes the assistant speak.

    Raises:
        ValueError: the template fails or refuses the conversation, a message holds the marks, or the template has no
            generation blocks and does not write turns one behind the other.
    """
    if any(mark in message.content for message in messages for mark in (BEGINS, ENDS)):
        raise ValueError("A message holds the private characters U+F8F0 or U+F8F1; take them out.")
    text, spans = _unmarked(_run(template, messages, generation_prompt))
    if not spans:
        spans = tuple(_by_turn(template, messages, text))
    return Rendered(text, spans)


def split_completion(
    template: ChatTemplate, prompt: tuple[Message, ...], completion: tuple[Message, ...]
) -> tuple[str, str]:
    """Returns the text of a prompt, which asks the assistant to speak, and of what follows it.

    Raises:
        ValueError: as `render`; or the whole does not begin with the prompt.
    """
    before = render(template, prompt, generation_prompt=True).text
    whole = render(template, prompt + completion).text
    if not whole.startswith(before):
        raise ValueError(
            "The chat template writes the prompt differently once an answer follows, so no completion can be told apart; "
            "mend the template."
        )
    return before, whole[len(before) :]


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

    told = [{"role": message.role, "content": message.content} for message in messages]
    try:
        return _compiled(template.source).render(
            messages=told, add_generation_prompt=generation_prompt, raise_exception=refuse, **template.tokens
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


def _unmarked(marked: str) -> tuple[str, tuple[tuple[int, int], ...]]:
    """Takes the marks out of a text, and returns where they stood."""
    parts, spans, place, first = [], [], 0, 0
    for piece in re.split(f"([{BEGINS}{ENDS}])", marked):
        if piece == BEGINS:
            first = place
        elif piece == ENDS:
            spans.append((first, place))
        else:
            parts.append(piece)
            place += len(piece)
    return "".join(parts), tuple(spans)


def _by_turn(template: ChatTemplate, messages: tuple[Message, ...], text: str):
    for number, message in enumerate(messages):
        if message.role != "assistant":
            continue
        before = _unmarked(_run(template, messages[:number], True))[0]
        after = _unmarked(_run(template, messages[: number + 1], False))[0]
        end = len(after)
        if not text.startswith(after):
            # What only a last turn has behind its words, such as an end of text, is not part of an earlier one.
            said = next(
                (said for said in (message.content, message.content.strip()) if said in text[len(before) :]), None
            )
            end = -1 if said is None else text.index(said, len(before)) + len(said)
        if end < len(before) or not (after.startswith(before) and text.startswith(before)):
            raise ValueError(
                "The chat template has no {% generation %} blocks and does not write turns one behind the other, so the "
                "assistant's words cannot be told apart; add the blocks around them."
            )
        yield len(before), end
