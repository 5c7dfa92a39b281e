"""Records of JSON objects in TRL's dataset formats, recognised by their keys and the types of their values.

| TRL's dataset type | keys | record |
|---|---|---|
| preference, explicit prompt | `prompt`, `chosen`, `rejected`, optional `margin` | `Preference` |
| preference, implicit prompt | `chosen`, `rejected` with a common prefix | `Preference`; the prefix becomes the prompt |
| preference, prompt given twice | `prompt`, and conversations `chosen`, `rejected` that begin with it | `Preference` |
| (ranking, not in TRL) | `prompt`, `completions`, best first, or with `ranks` (1 is best, equal ranks tie) | `Ranking` |
| unpaired preference | `prompt`, `completion`, `label` (true is desirable) | `UnpairedPreference` |
| prompt-completion | `prompt`, `completion` | `Demonstration` |
| language modeling | `text`, or `messages` | `Demonstration` without a prompt |
| prompt-only | `prompt` | `Prompt` |

Beside conversations, `tools`, `documents` and `chat_template_kwargs` are given to the chat template. A key whose value is
null is absent. Other keys are returned as unread, unless they would change the text (`jaxrlhf.data.refusals`).
"""

import json
import math
from typing import Any

from jaxrlhf.data import refusals
from jaxrlhf.data.messages import parse_messages, shown, to_json
from jaxrlhf.data.records import (
    Demonstration,
    Message,
    Parsed,
    Preference,
    Prompt,
    Ranking,
    Record,
    Text,
    UnpairedPreference,
    split_prompt,
)

VARIABLES = ("tools", "documents", "chat_template_kwargs")
# Arguments of transformers' apply_chat_template that are not variables of a template, and those given otherwise.
NOT_VARIABLES = {
    "conversation", "messages", "chat_template", "add_generation_prompt", "continue_final_message", "tokenize",
    "padding", "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask",
    "tokenizer_kwargs", "sanitize_control_tokens",
}  # fmt: skip
INT64 = 2**63


def parse_record(value: Any) -> Record:
    """Returns the record of a line's JSON object; its keys determine the kind.

    Raises:
        ValueError: the object is malformed; the message says how.

    Examples:
        >>> from jaxrlhf.data import parse_record
        >>> parse_record({"prompt": "Hello", "chosen": " there", "rejected": " you"}).chosen
        ' there'
    """
    return read(value).record


def read(value: Any) -> Parsed:
    """Returns the record of a line's JSON object, and the keys that nothing reads.

    Raises:
        ValueError: the object is malformed, or a key that nothing reads would change the text; the message says how.
    """
    if not isinstance(value, dict):
        advice = " Write one object a line." if isinstance(value, list) else ""
        raise ValueError(f"expected a JSON object, got {'null' if value is None else type(value).__name__}.{advice}")
    given = {name: entry for name, entry in value.items() if entry is not None}
    record, keys = _record(given, nulls=set(value) - set(given))
    record = _with_variables(record, given)
    unread = tuple(name for name in given if name not in keys and name not in VARIABLES)
    refusals.check_unread(record, given, unread)
    return Parsed(record, unread)


def parse_text(value: Any, name: str) -> Text:
    """Returns a string as it is, or a list of messages as a tuple.

    Raises:
        ValueError: the value is neither; the message calls it `name`.
    """
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError(f"{name} must be a string or a list of messages, got {type(value).__name__}.")
    return parse_messages(value, name)


def _record(given: dict, nulls: set[str]) -> tuple[Record, set[str]]:
    """Returns the record of an object without its nulls, and the keys that were read."""
    keys = set(given)
    if {"chosen", "rejected"} <= keys:
        return _preference(given), {"prompt", "chosen", "rejected", "margin"}
    if {"prompt", "completions"} <= keys:
        return _ranking(given), {"prompt", "completions", "ranks"}
    if {"prompt", "completion"} <= keys:
        prompt, completion = _texts(given, "prompt", "completion")
        completion = _without_prompt(prompt, completion, "completion")[0]
        if "label" not in keys | nulls:
            return Demonstration(prompt, completion), {"prompt", "completion"}
        if not isinstance(given.get("label"), bool):
            raise ValueError(f"label must be true or false, got {shown(given.get('label'))}.")
        return UnpairedPreference(prompt, completion, given["label"]), {"prompt", "completion", "label"}
    refusals.check_half(given, nulls)
    if "messages" in keys:
        if not isinstance(given["messages"], list) or not given["messages"]:
            raise ValueError("messages must be a list of at least one message.")
        return Demonstration((), parse_messages(given["messages"], "messages")), {"messages"}
    if "text" in keys:
        if not isinstance(given["text"], str):
            raise ValueError(f"text must be a string, got {type(given['text']).__name__}; conversations are messages.")
        return Demonstration("", given["text"]), {"text"}
    if "prompt" in keys:
        if given["prompt"] == []:
            raise ValueError("prompt must have at least one message.")
        return Prompt(parse_text(given["prompt"], "prompt")), {"prompt"}
    raise ValueError(refusals.unknown_format(given))


def _preference(given: dict) -> Preference:
    margin = _margin(given.get("margin"))
    chosen, rejected = _texts(given, "chosen", "rejected")
    if "prompt" not in given:
        return Preference(*split_prompt(chosen, rejected), margin)
    prompt = parse_text(given["prompt"], "prompt")
    if chosen == rejected:
        raise ValueError("chosen and rejected are the same.")
    if isinstance(prompt, str) and not isinstance(chosen, str):
        return Preference(*_split_at(prompt, chosen, rejected), margin)
    if isinstance(prompt, str) != isinstance(chosen, str):
        raise ValueError("prompt, chosen, rejected must all be strings, or all lists of messages.")
    chosen, rejected = _without_prompt(prompt, chosen, "chosen", rejected, "rejected")
    return Preference(prompt, chosen, rejected, margin)


def _split_at(prompt: str, chosen: Text, rejected: Text) -> tuple[Text, Text, Text]:
    """Returns the prompt that conversations share, which must hold the words of a prompt given as a string as well."""
    try:
        shared, chosen, rejected = split_prompt(chosen, rejected)
    except ValueError:
        shared = ()
    if not any(isinstance(turn, Message) and prompt.strip() in turn.content for turn in shared):
        raise ValueError(
            "prompt, chosen, rejected must all be strings, or all lists of messages, unless the beginning that chosen and "
            "rejected share holds the prompt."
        )
    return shared, chosen, rejected


def _without_prompt(prompt: Text, *named: Any) -> list[Text]:
    """Returns completions, given before their names, without the turns of the prompt that all of them repeat."""
    completions, names = named[::2], named[1::2]
    if isinstance(prompt, str):
        return list(completions)
    repeated = [_repeated(prompt, completion) for completion in completions]
    if all(repeated) or not any(repeated):
        return [completion[count:] for completion, count in zip(completions, repeated, strict=True)]
    name = next(name for name, count in zip(names, repeated, strict=True) if count)
    raise ValueError(f"{name} repeats the prompt and another completion does not; give the completions alone.")


def _repeated(prompt: tuple[Message, ...], completion: tuple[Message, ...]) -> int:
    """Returns how many turns at the end of a prompt a completion begins with; the first of them is not the assistant's."""
    if not completion or completion[0].role == "assistant":
        return 0
    counts = range(min(len(prompt), len(completion)), 0, -1)
    return next((count for count in counts if completion[:count] == prompt[len(prompt) - count :]), 0)


def _margin(margin: Any) -> float | None:
    if margin is None:
        return None
    if isinstance(margin, bool) or not isinstance(margin, int | float):
        raise ValueError(f"margin must be a number, got {shown(margin)}.")
    if isinstance(margin, int) and abs(margin) >= INT64:
        raise ValueError("margin must lie between -2^63 and 2^63.")
    if not math.isfinite(margin):
        raise ValueError(f"margin must be finite, got {margin}.")
    return float(margin)


def _ranking(given: dict) -> Ranking:
    completions = given["completions"]
    if not isinstance(completions, list) or len(completions) < 2:
        raise ValueError("completions must be a list of at least two.")
    refusals.check_order(given)
    ranks = given.get("ranks", list(range(1, len(completions) + 1)))
    if not isinstance(ranks, list) or not all(isinstance(rank, int) and not isinstance(rank, bool) for rank in ranks):
        raise ValueError(f"ranks must be a list of whole numbers, got {shown(ranks)}.")
    if len(ranks) != len(completions):
        raise ValueError(f"there are {len(completions)} completions and {len(ranks)} ranks.")
    if any(abs(rank) >= INT64 for rank in ranks):
        raise ValueError("ranks must lie between -2^63 and 2^63.")
    names = [f"completions[{index}]" for index in range(len(completions))]
    values = {"prompt": given["prompt"]} | dict(zip(names, completions, strict=True))
    prompt, *texts = _texts(values, *values)
    named = (entry for pair in zip(texts, names, strict=True) for entry in pair)
    return Ranking(prompt, tuple(_without_prompt(prompt, *named)), tuple(ranks))


def _texts(given: dict, *names: str) -> list:
    """Returns the texts under these names; raises ValueError unless all are strings or all are conversations."""
    texts = [parse_text(given[name], name) for name in names]
    kinds = {isinstance(text, str) for text in texts}
    if len(kinds) > 1:
        raise ValueError(f"{', '.join(names)} must all be strings, or all lists of messages.")
    return texts


def _with_variables(record: Record, given: dict) -> Record:
    """Returns a record whose conversations carry what the object gives the chat template beside the messages."""
    variables = _variables(given)
    if not variables:
        return record
    if isinstance(record.prompt, str):
        names = " and ".join(name for name in VARIABLES if given.get(name))
        if not names:
            return record
        raise ValueError(f"{names} can be given to a chat template only, and the texts are strings; write messages.")
    encoded = to_json(variables, " and ".join(name for name in VARIABLES if name in given))

    def carrying(text: Text) -> Text:
        return (text[0]._replace(variables=encoded), *text[1:]) if isinstance(text, tuple) and text else text

    if record.prompt:
        return record._replace(prompt=carrying(record.prompt))
    if isinstance(record, Ranking):
        return record._replace(completions=tuple(carrying(text) for text in record.completions))
    texts = {name: carrying(getattr(record, name)) for name in record._fields if name not in ("margin", "label")}
    return record._replace(**texts)


def _variables(given: dict) -> dict[str, Any]:
    variables = {}
    for name in ("tools", "documents"):
        entries = given.get(name)
        if isinstance(entries, str):
            # TRL reads tools that are stored as JSON.
            try:
                entries = json.loads(entries)
            except ValueError:
                raise ValueError(f"{name} is a string that is not JSON; write a list of objects.") from None
        if entries is None:
            continue
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise ValueError(f"{name} must be a list of objects.")
        variables[name] = entries
    extra = given.get("chat_template_kwargs", {})
    if not isinstance(extra, dict):
        raise ValueError("chat_template_kwargs must be an object.")
    refused = sorted(set(extra) & (NOT_VARIABLES | set(variables)))
    if refused:
        raise ValueError(
            f"chat_template_kwargs must not hold {', '.join(refused)}, which no template takes from there."
        )
    return variables | extra
