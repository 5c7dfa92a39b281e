"""JSON objects that must not be taken for a record, and why."""

from typing import Any

from jaxrlhf.data.records import Preference, Record, Text, texts_of

SYSTEM = ("system", "system_prompt", "system_message")
PROMPTS = ("question", "instruction", "input", "query", "context", "history", "user", "human", "problem")
"""Keys under which published data sets keep a prompt."""
MEDIA = ("images", "videos", "audios")
# The keys of a format, its name, and what to do.
OTHER_FORMATS = (
    ({"prompt", "completions", "labels"}, "TRL's stepwise supervision (a label for each step of one answer)", ""),
    ({"conversations"}, "ShareGPT's format", "; rename conversations to messages, from to role and value to content"),
    ({"instruction", "output"}, "Alpaca's format", "; rename instruction and output to prompt and completion"),
    ({"question", "answer"}, "question and answer", "; rename them to prompt and completion"),
    ({"instruction", "completions"}, "UltraFeedback before it was made into pairs", "; take the binarized version"),
)
PARTNERS = {
    "chosen": "rejected",
    "rejected": "chosen",
    "completion": "prompt",
    "completions": "prompt",
    "label": "completion",
    "ranks": "completions",
}


def unknown_format(given: dict) -> str:
    """Returns why an object without the keys of a format is none, by the name of its format if that is known."""
    for keys, name, remedy in OTHER_FORMATS:
        if keys <= set(given):
            return f"this is {name}, which is not read here{remedy}."
    names = ", ".join([*sorted(given)[:12], *(["..."] if len(given) > 12 else [])]) or "(none)"
    return (
        f"no known format has the keys {names}; preferences have chosen and rejected, "
        "demonstrations prompt and completion, text or messages."
    )


def check_half(given: dict, nulls: set[str]) -> None:
    """Refuses an object with one of two keys that belong together, which would pass for a prompt or a text.

    Raises:
        ValueError: one key is missing, or null.
    """
    if "messages" in given or "text" in given:
        return
    if "prompt" not in given and any(keys <= set(given) for keys, _, _ in OTHER_FORMATS):
        raise ValueError(unknown_format(given))
    for name in ("completion", "completions", "chosen", "rejected"):
        if name in nulls and "prompt" in given:
            raise ValueError(f"{name} is null; give it, or take the key out.")
    for name, partner in PARTNERS.items():
        if name in given and partner not in given:
            raise ValueError(f"there is {name} and no {partner}; the two belong together.")


def check_order(given: dict) -> None:
    """Refuses completions that are stepwise, or whose order another key may give.

    Raises:
        ValueError: the object has `labels`, or has no `ranks` and a number for each completion under another key.
    """
    if "labels" in given:
        raise ValueError(unknown_format({"prompt": "", **given}))
    count = len(given["completions"])
    for name, value in given.items():
        if name in ("prompt", "completions") or "ranks" in given:
            continue
        if isinstance(value, list) and len(value) == count and all(map(_is_number, value)):
            raise ValueError(
                f"completions without ranks are read as the best first, and {name} has a number for each; give ranks, or "
                f"order the completions and take {name} out."
            )


def check_unread(record: Record, given: dict, unread: tuple[str, ...]) -> None:
    """Refuses an object with a key that no format reads and that would change the text.

    These are a system's words, pictures and sound, and, where the prompt is what two texts share, keys that hold a prompt:
    unless the record's own texts hold the same words.

    Raises:
        ValueError: there is one; the message says what to do.
    """
    for name in unread:
        value = given[name]
        if name in MEDIA and value:
            raise ValueError(f"{name} cannot be read here, only text; take the key out.")
        if name in SYSTEM and _is_missing(value, texts_of(record)):
            raise ValueError(
                f"{name} is not read; write its words as the first message, with the role system, or take it out."
            )
        inferred = isinstance(record, Preference) and "prompt" not in given
        if inferred and name in PROMPTS and _is_missing(value, [record.prompt]):
            raise ValueError(
                f"there is no prompt, and {name} is not read; rename {name} to prompt if it is the prompt, or take it out."
            )


def _is_missing(value: Any, texts: list[Text]) -> bool:
    """Returns whether a value has words that none of the texts holds."""
    if not isinstance(value, str):
        return bool(value) and isinstance(value, list | dict)
    contents = [text for text in texts if isinstance(text, str)]
    contents += [message.content for text in texts if not isinstance(text, str) for message in text]
    return bool(value.strip()) and not any(value.strip() in content for content in contents)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
