"""Records of training data: preferences, rankings, demonstrations and prompts.

A text is a string (TRL's standard format) or a tuple of messages (its conversational format). `jaxrlhf.data.formats` makes
records from JSON objects, `jaxrlhf.data.reading` from files.
"""

import itertools
import json
import unicodedata
from typing import Any, NamedTuple


class DataError(Exception):
    """Data that cannot be read; the message names the file, the line and the remedy."""


class Message(NamedTuple):
    """One turn of a conversation.

    Attributes:
        role: as chat templates name it: "system", "user", "assistant" or "tool".
        content: the text; empty if there is none. A list of text parts is joined here.
        fields: JSON of the whole message as the template sees it, if it is more than a role and a string, such as
            `tool_calls` or `reasoning_content`; else empty.
        variables: on the first message of a conversation, JSON of what its row gives the template beside the messages:
            `tools`, `documents` and the entries of `chat_template_kwargs`; else empty.
    """

    role: str
    content: str
    fields: str = ""
    variables: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Returns the message as chat templates see it."""
        return json.loads(self.fields) if self.fields else {"role": self.role, "content": self.content}


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
    """A prompt without a completion, for online sampling. If its last turn is the assistant's, that turn is continued."""

    prompt: Text


Record = Preference | Ranking | UnpairedPreference | Demonstration | Prompt


class Parsed(NamedTuple):
    """A record, and the keys of its JSON object that nothing reads."""

    record: Record
    unread: tuple[str, ...] = ()


def texts_of(record: Record) -> list[Text]:
    """Returns the prompt and the completions of a record."""
    completions = [getattr(record, name) for name in ("chosen", "rejected", "completion") if hasattr(record, name)]
    return [record.prompt, *(record.completions if isinstance(record, Ranking) else completions)]


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
    the completions. The prefix of conversations is whole messages, and does not end between two turns of the assistant.

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
    # Two turns of the assistant in a row: the second does not continue the first, as it would after a prompt.
    while length and all(_speaks(text, index) for text in (chosen, rejected) for index in (length - 1, length)):
        length -= 1
    if not length:
        raise ValueError("chosen and rejected share no beginning to be the prompt; give one.")
    return chosen[:length], chosen[length:], rejected[length:]


def _speaks(text: Text, index: int) -> bool:
    return isinstance(text, tuple) and index < len(text) and text[index].role == "assistant"


WITHOUT_SPACES = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN")
"""First words of the Unicode names of letters that are written without spaces between words."""
JOINER = "\u200d"


def _inside_word(text: str, index: int) -> bool:
    """Returns whether a cut before `text[index]` would split a word, or in scripts without spaces a character."""
    if index >= len(text):
        return False
    before, after = text[index - 1], text[index]
    if JOINER in (before, after) or unicodedata.category(after) in ("Mn", "Mc", "Me", "Sk"):
        return True
    return all(_in_words(character) for character in (before, after))


def _in_words(character: str) -> bool:
    if not character.isalnum():
        return unicodedata.category(character).startswith("M")
    return not unicodedata.name(character, "").startswith(WITHOUT_SPACES)
