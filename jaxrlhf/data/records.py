"""What training data holds, and reading it from JSONL in the formats that users of TRL know.

A text is a string, or a conversation: a tuple of messages. One line of a file is one object:

| kind | keys | record |
|---|---|---|
| paired, explicit prompt | `prompt`, `chosen`, `rejected`, optional `margin` | `Preference` |
| paired, implicit prompt | `chosen`, `rejected` that begin alike | `Preference`; the prompt is what they share |
| ranked | `prompt`, `completions`, best first, or with `ranks` (1 is best, equal ranks tie) | `Ranked` |
| unpaired | `prompt`, `completion`, `label` (true is good) | `Judged` |
| prompt and completion | `prompt`, `completion` | `Demonstration` |
| whole texts | `text`, or `messages` | `Demonstration` without a prompt |
| prompts alone | `prompt` | `Prompt` |

Where `prompt` is a list of messages `{"role", "content"}`, completions are lists of messages too. A `.txt` file is one
whole text a line.
"""

import gzip
import itertools
import json
import math
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple


class DataError(Exception):
    """Data cannot be read; the message names the file, the line and the remedy."""


class Message(NamedTuple):
    """One turn of a conversation; the roles of chat templates are "system", "user", "assistant" and "tool"."""

    role: str
    content: str


Text = str | tuple[Message, ...]


class Preference(NamedTuple):
    """Two completions of a prompt, of which the first was preferred, by a margin where the data says one."""

    prompt: Text
    chosen: Text
    rejected: Text
    margin: float | None = None


class Ranked(NamedTuple):
    """Completions of a prompt and their ranks, 1 the best; equal ranks are ties."""

    prompt: Text
    completions: tuple[Text, ...]
    ranks: tuple[int, ...]


class Judged(NamedTuple):
    """A completion that was called good or bad by itself."""

    prompt: Text
    completion: Text
    good: bool


class Demonstration(NamedTuple):
    """A completion to imitate; without a prompt the whole text is one (the assistant's turns of a conversation)."""

    prompt: Text
    completion: Text


class Prompt(NamedTuple):
    """A prompt alone, for online sampling."""

    prompt: Text


Record = Preference | Ranked | Judged | Demonstration | Prompt


class BadLine(NamedTuple):
    """A line that could not be read: where it stands, and why."""

    path: pathlib.Path
    line: int
    reason: str


class Records(NamedTuple):
    """What was read, in the order of files and lines, and what was skipped."""

    records: list
    bad: list[BadLine]


def read_records(
    path: str | pathlib.Path, parse: Callable[[Any], Any] | None = None, *, skip_bad: bool = False
) -> Records:
    """Reads a `.jsonl` or `.txt` file, gzipped (`.gz`) or not, or the files below a folder, by name.

    Args:
        path: the file or folder. Of a folder, `.txt` files are data where there is no `.jsonl` file, else notes. Links
            that lead out of it are refused.
        parse: from a line's JSON value to a record, raising ValueError with a reason; `parse_record` by default.
        skip_bad: collects bad lines in place of stopping at the first.

    Raises:
        DataError: there is no such data, a file is not readable, or a line is bad.
    """
    parse = parse_record if parse is None else parse
    records, bad = [], []
    for file in files_of(path):
        for number, line in lines_of(file):
            try:
                records.append(parse({"text": line.rstrip("\r\n")} if _is_plain(file) else _object(line)))
            except ValueError as error:
                bad.append(BadLine(file, number, str(error)))
                if not skip_bad:
                    raise DataError(
                        f"{file}, line {number}: {error} Mend the line, or skip such lines with --skip-bad."
                    ) from None
    if not records and not bad:
        raise DataError(f"{path} holds no line of data.")
    return Records(records, bad)


def files_of(path: str | pathlib.Path) -> list[pathlib.Path]:
    """Returns the data files at a path, in the order of their names.

    Raises:
        DataError: there are none, or one lies outside of the folder.
    """
    path = pathlib.Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise DataError(f"There is no file or folder {path}.")
    root = path.resolve()

    def below(*patterns: str) -> list[pathlib.Path]:
        return sorted(file for pattern in patterns for file in path.rglob(pattern) if file.is_file())

    found = below("*.jsonl", "*.jsonl.gz") or below("*.txt", "*.txt.gz")
    for file in found:
        if not file.resolve().is_relative_to(root):
            raise DataError(f"{file} leads out of the folder {path}; copy the file into it.")
    if not found:
        raise DataError(f"The folder {path} holds no .jsonl or .txt file, gzipped or not.")
    return found


def lines_of(file: pathlib.Path) -> Iterator[tuple[int, str]]:
    """Yields the lines that are not blank, and their numbers from 1.

    Raises:
        DataError: the file is not readable text.
    """
    opened = gzip.open if file.name.endswith(".gz") else open
    number = 0
    try:
        with opened(file, "rt", encoding="utf-8") as stream:
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    yield number, line
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise DataError(f"{file}, after line {number}: not readable as text ({error}); copy the file again.") from None


def parse_record(value: Any) -> Record:
    """Returns the record that a line's JSON object stands for, by its keys.

    Raises:
        ValueError: saying what is wrong.
    """
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, got {type(value).__name__}.")
    keys = set(value)
    if {"chosen", "rejected"} <= keys:
        return _preference(value)
    if {"prompt", "completions"} <= keys:
        return _ranked(value)
    if {"prompt", "completion", "label"} <= keys:
        if not isinstance(value["label"], bool):
            raise ValueError(f"label must be true or false, got {value['label']!r}.")
        prompt, completion = _alike(value, "prompt", "completion")
        return Judged(prompt, completion, value["label"])
    if {"prompt", "completion"} <= keys:
        prompt, completion = _alike(value, "prompt", "completion")
        return Demonstration(prompt, completion)
    if "messages" in keys:
        return Demonstration((), text_of(value["messages"], "messages"))
    if "text" in keys:
        return Demonstration("", text_of(value["text"], "text"))
    if "prompt" in keys:
        return Prompt(text_of(value["prompt"], "prompt"))
    raise ValueError(
        f"no known format has the keys {', '.join(sorted(keys)) or '(none)'}; preferences have chosen and rejected, "
        "demonstrations prompt and completion, text or messages."
    )


def pairs_of(ranked: Ranked) -> list[Preference]:
    """Returns every pair of a ranking that is no tie, the better one chosen."""
    ordered = sorted(zip(ranked.ranks, ranked.completions, strict=True), key=lambda entry: entry[0])
    return [
        Preference(ranked.prompt, better, worse)
        for (first, better), (second, worse) in itertools.combinations(ordered, 2)
        if first < second
    ]


def split_prompt(chosen: Text, rejected: Text) -> tuple[Text, Text, Text]:
    """Returns what two texts share at their beginning, and what is left of each.

    Strings share whole words: a common end of letters inside a word, and the spaces before the first difference, stay with
    the completions. Conversations share whole messages.

    Raises:
        ValueError: nothing is shared, or nothing differs.
    """
    if chosen == rejected:
        raise ValueError("chosen and rejected are the same.")
    shared = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False)))
    if isinstance(chosen, str) and isinstance(rejected, str):
        while shared and (_inside_word(chosen, shared) or _inside_word(rejected, shared)):
            shared -= 1
        while shared and chosen[shared - 1].isspace():
            shared -= 1
    if not shared:
        raise ValueError("chosen and rejected share no beginning to be the prompt; give one.")
    return chosen[:shared], chosen[shared:], rejected[shared:]


def text_of(value: Any, name: str) -> Text:
    """Returns a string, or a list of messages as a tuple.

    Raises:
        ValueError: the value is neither; `name` says which.
    """
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError(f"{name} must be a string or a list of messages, got {type(value).__name__}.")
    for number, message in enumerate(value):
        if not (
            isinstance(message, dict)
            and isinstance(message.get("role"), str)
            and isinstance(message.get("content"), str)
        ):
            raise ValueError(f"{name}[{number}] must be an object with the strings role and content, got {message!r}.")
    return tuple(Message(message["role"], message["content"]) for message in value)


def _inside_word(text: str, place: int) -> bool:
    return place < len(text) and text[place - 1].isalnum() and text[place].isalnum()


def _preference(value: dict) -> Preference:
    margin = value.get("margin")
    if margin is not None and (isinstance(margin, bool) or not isinstance(margin, int | float)):
        raise ValueError(f"margin must be a number, got {margin!r}.")
    margin = None if margin is None else float(margin)
    if margin is not None and not math.isfinite(margin):
        raise ValueError(f"margin must be finite, got {margin}.")
    if value.get("prompt") is None:
        chosen, rejected = _alike(value, "chosen", "rejected")
        return Preference(*split_prompt(chosen, rejected), margin)
    prompt, chosen, rejected = _alike(value, "prompt", "chosen", "rejected")
    if chosen == rejected:
        raise ValueError("chosen and rejected are the same.")
    return Preference(prompt, chosen, rejected, margin)


def _ranked(value: dict) -> Ranked:
    completions = value["completions"]
    if not isinstance(completions, list) or len(completions) < 2:
        raise ValueError("completions must be a list of at least two.")
    ranks = value.get("ranks", list(range(1, len(completions) + 1)))
    if not isinstance(ranks, list) or not all(isinstance(rank, int) and not isinstance(rank, bool) for rank in ranks):
        raise ValueError(f"ranks must be a list of whole numbers, got {ranks!r}.")
    if len(ranks) != len(completions):
        raise ValueError(f"there are {len(completions)} completions and {len(ranks)} ranks.")
    named = {"prompt": value["prompt"]} | {f"completions[{n}]": text for n, text in enumerate(completions)}
    prompt, *texts = _alike(named, *named)
    return Ranked(prompt, tuple(texts), tuple(ranks))


def _alike(value: dict, *names: str) -> list:
    """Returns the texts of these names, all strings or all conversations."""
    texts = [text_of(value[name], name) for name in names]
    kinds = {isinstance(text, str) for text in texts}
    if len(kinds) > 1:
        raise ValueError(f"{', '.join(names)} must all be strings, or all lists of messages.")
    return texts


def _is_plain(file: pathlib.Path) -> bool:
    return file.name.endswith((".txt", ".txt.gz"))


def _object(line: str) -> Any:
    try:
        value = json.loads(line)
        # JSON can spell half of a surrogate pair, which no text file can hold.
        json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at column {error.colno}).") from None
    except UnicodeEncodeError:
        raise ValueError("a text holds half of a surrogate pair.") from None
    except RecursionError:
        raise ValueError("nested too deeply.") from None
    return value
