"""Records of training data, and reading them from JSONL in TRL's dataset formats.

A text is a string (TRL's standard format) or a tuple of messages (its conversational format). Each line of a file is one
object:

| TRL's dataset type | keys | record |
|---|---|---|
| preference, explicit prompt | `prompt`, `chosen`, `rejected`, optional `margin` | `Preference` |
| preference, implicit prompt | `chosen`, `rejected` with a common prefix | `Preference`; the prefix becomes the prompt |
| (ranking, not in TRL) | `prompt`, `completions`, best first, or with `ranks` (1 is best, equal ranks tie) | `Ranking` |
| unpaired preference | `prompt`, `completion`, `label` (true is desirable) | `UnpairedPreference` |
| prompt-completion | `prompt`, `completion` | `Demonstration` |
| language modeling | `text`, or `messages` | `Demonstration` without a prompt |
| prompt-only | `prompt` | `Prompt` |

If `prompt` is a list of messages `{"role", "content"}`, completions must be lists of messages too. In a `.txt` file each
line is one text.
"""

import gzip
import itertools
import json
import math
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple


class DataError(Exception):
    """Data that cannot be read; the message names the file, the line and the remedy."""


class Message(NamedTuple):
    """One turn of a conversation; the roles of chat templates are "system", "user", "assistant" and "tool"."""

    role: str
    content: str


Text = str | tuple[Message, ...]


class Preference(NamedTuple):
    """Two completions of a prompt, the preferred one first, and the margin if the data has one."""

    prompt: Text
    chosen: Text
    rejected: Text
    margin: float | None = None


class Ranking(NamedTuple):
    """Completions of a prompt and their ranks; 1 is the best, equal ranks are ties."""

    prompt: Text
    completions: tuple[Text, ...]
    ranks: tuple[int, ...]


class UnpairedPreference(NamedTuple):
    """A completion labelled by itself: True is desirable, False undesirable."""

    prompt: Text
    completion: Text
    label: bool


class Demonstration(NamedTuple):
    """A completion to imitate. Without a prompt, that is the whole text (of a conversation, the assistant's turns)."""

    prompt: Text
    completion: Text


class Prompt(NamedTuple):
    """A prompt without a completion, for online sampling."""

    prompt: Text


Record = Preference | Ranking | UnpairedPreference | Demonstration | Prompt


class BadLine(NamedTuple):
    """A line that could not be read: its file, its number, and why."""

    path: pathlib.Path
    line: int
    reason: str


class Records(NamedTuple):
    """The records in the order of files and lines, and the lines that were skipped."""

    records: list
    bad: list[BadLine]


def read_records(
    path: str | pathlib.Path, parse: Callable[[Any], Any] | None = None, *, skip_bad: bool = False
) -> Records:
    """Reads a `.jsonl` or `.txt` file, gzipped (`.gz`) or not, or all such files below a folder, sorted by name.

    Args:
        path: the file or folder. In a folder, `.txt` files are read only if there is no `.jsonl` file. Links that lead
            out of the folder are refused.
        parse: maps a line's JSON value to a record and raises ValueError with a reason; `parse_record` by default.
        skip_bad: collects bad lines instead of stopping at the first.

    Raises:
        DataError: there is no data, a file is not readable, or a line is bad.
    """
    parse = parse_record if parse is None else parse
    records, bad = [], []
    for file in data_files(path):
        for number, line in numbered_lines(file):
            try:
                records.append(parse({"text": line.rstrip("\r\n")} if _is_plain_text(file) else _parse_json(line)))
            except ValueError as error:
                bad.append(BadLine(file, number, str(error)))
                if not skip_bad:
                    raise DataError(
                        f"{file}, line {number}: {error} Mend the line, or skip such lines with --skip-bad."
                    ) from None
    if not records and not bad:
        raise DataError(f"{path} holds no line of data.")
    return Records(records, bad)


def data_files(path: str | pathlib.Path) -> list[pathlib.Path]:
    """Returns the data files at a path, in the order of their names.

    Raises:
        DataError: there are none, or one lies outside the folder.
    """
    path = pathlib.Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise DataError(f"There is no file or folder {path}.")
    root = path.resolve()

    def below(*patterns: str) -> list[pathlib.Path]:
        return sorted(file for pattern in patterns for file in path.rglob(pattern) if file.is_file())

    files = below("*.jsonl", "*.jsonl.gz") or below("*.txt", "*.txt.gz")
    for file in files:
        if not file.resolve().is_relative_to(root):
            raise DataError(f"{file} leads out of the folder {path}; copy the file into it.")
    if not files:
        raise DataError(f"The folder {path} holds no .jsonl or .txt file, gzipped or not.")
    return files


def numbered_lines(file: pathlib.Path) -> Iterator[tuple[int, str]]:
    """Yields the non-blank lines with their numbers, from 1.

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
    """Returns the record of a line's JSON object; its keys determine the kind.

    Raises:
        ValueError: the object is malformed; the message says how.
    """
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, got {type(value).__name__}.")
    keys = set(value)
    if {"chosen", "rejected"} <= keys:
        return _preference(value)
    if {"prompt", "completions"} <= keys:
        return _ranking(value)
    if {"prompt", "completion", "label"} <= keys:
        if not isinstance(value["label"], bool):
            raise ValueError(f"label must be true or false, got {value['label']!r}.")
        prompt, completion = _texts(value, "prompt", "completion")
        return UnpairedPreference(prompt, completion, value["label"])
    if {"prompt", "completion"} <= keys:
        prompt, completion = _texts(value, "prompt", "completion")
        return Demonstration(prompt, completion)
    if "messages" in keys:
        return Demonstration((), parse_text(value["messages"], "messages"))
    if "text" in keys:
        return Demonstration("", parse_text(value["text"], "text"))
    if "prompt" in keys:
        return Prompt(parse_text(value["prompt"], "prompt"))
    raise ValueError(
        f"no known format has the keys {', '.join(sorted(keys)) or '(none)'}; preferences have chosen and rejected, "
        "demonstrations prompt and completion, text or messages."
    )


def ranking_pairs(ranking: Ranking) -> list[Preference]:
    """Returns every pair of a ranking's completions that is not a tie, the better one chosen."""
    ordered = sorted(zip(ranking.ranks, ranking.completions, strict=True), key=lambda entry: entry[0])
    return [
        Preference(ranking.prompt, better, worse)
        for (better_rank, better), (worse_rank, worse) in itertools.combinations(ordered, 2)
        if better_rank < worse_rank
    ]


def split_prompt(chosen: Text, rejected: Text) -> tuple[Text, Text, Text]:
    """Returns the common prefix of two texts, and the rest of each.

    The prefix of strings ends with a whole word: letters inside a word, and spaces before the first difference, belong to
    the completions. The prefix of conversations is whole messages.

    Raises:
        ValueError: the prefix is empty, or the texts are equal.
    """
    if chosen == rejected:
        raise ValueError("chosen and rejected are the same.")
    pairs = zip(chosen, rejected, strict=False)
    length = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    if isinstance(chosen, str) and isinstance(rejected, str):
        while length and (_inside_word(chosen, length) or _inside_word(rejected, length)):
            length -= 1
        while length and chosen[length - 1].isspace():
            length -= 1
    if not length:
        raise ValueError("chosen and rejected share no beginning to be the prompt; give one.")
    return chosen[:length], chosen[length:], rejected[length:]


def parse_text(value: Any, name: str) -> Text:
    """Returns a string as it is, or a list of messages as a tuple.

    Raises:
        ValueError: the value is neither; the message calls it `name`.
    """
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError(f"{name} must be a string or a list of messages, got {type(value).__name__}.")
    for index, message in enumerate(value):
        if not (
            isinstance(message, dict)
            and isinstance(message.get("role"), str)
            and isinstance(message.get("content"), str)
        ):
            raise ValueError(f"{name}[{index}] must be an object with the strings role and content, got {message!r}.")
    return tuple(Message(message["role"], message["content"]) for message in value)


def _inside_word(text: str, index: int) -> bool:
    return index < len(text) and text[index - 1].isalnum() and text[index].isalnum()


def _preference(value: dict) -> Preference:
    margin = value.get("margin")
    if margin is not None and (isinstance(margin, bool) or not isinstance(margin, int | float)):
        raise ValueError(f"margin must be a number, got {margin!r}.")
    margin = None if margin is None else float(margin)
    if margin is not None and not math.isfinite(margin):
        raise ValueError(f"margin must be finite, got {margin}.")
    if value.get("prompt") is None:
        chosen, rejected = _texts(value, "chosen", "rejected")
        return Preference(*split_prompt(chosen, rejected), margin)
    prompt, chosen, rejected = _texts(value, "prompt", "chosen", "rejected")
    if chosen == rejected:
        raise ValueError("chosen and rejected are the same.")
    return Preference(prompt, chosen, rejected, margin)


def _ranking(value: dict) -> Ranking:
    completions = value["completions"]
    if not isinstance(completions, list) or len(completions) < 2:
        raise ValueError("completions must be a list of at least two.")
    ranks = value.get("ranks", list(range(1, len(completions) + 1)))
    if not isinstance(ranks, list) or not all(isinstance(rank, int) and not isinstance(rank, bool) for rank in ranks):
        raise ValueError(f"ranks must be a list of whole numbers, got {ranks!r}.")
    if len(ranks) != len(completions):
        raise ValueError(f"there are {len(completions)} completions and {len(ranks)} ranks.")
    values = {"prompt": value["prompt"]} | {f"completions[{n}]": text for n, text in enumerate(completions)}
    prompt, *texts = _texts(values, *values)
    return Ranking(prompt, tuple(texts), tuple(ranks))


def _texts(value: dict, *names: str) -> list:
    """Returns the texts under these names; raises ValueError unless all are strings or all are conversations."""
    texts = [parse_text(value[name], name) for name in names]
    kinds = {isinstance(text, str) for text in texts}
    if len(kinds) > 1:
        raise ValueError(f"{', '.join(names)} must all be strings, or all lists of messages.")
    return texts


def _is_plain_text(file: pathlib.Path) -> bool:
    return file.name.endswith((".txt", ".txt.gz"))


def _parse_json(line: str) -> Any:
    try:
        value = json.loads(line)
        # JSON can escape half of a surrogate pair, which UTF-8 cannot encode.
        json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at column {error.colno}).") from None
    except UnicodeEncodeError:
        raise ValueError("a text holds half of a surrogate pair.") from None
    except RecursionError:
        raise ValueError("nested too deeply.") from None
    return value
