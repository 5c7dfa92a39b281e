"""What conversations have that their chat template does not write: keys of messages, tools, documents, variables."""

import collections
import json
from collections.abc import Iterable

from jaxrlhf.data.chat import ChatTemplate, source_of, variables_of, write
from jaxrlhf.data.jinja import ANY_KEY, names_read
from jaxrlhf.data.messages import REASONING, message_of
from jaxrlhf.data.records import Message, Text


class Unwritten:
    """Counts the records that have something which the template writes for none of them."""

    def __init__(self, template: ChatTemplate):
        self._template = template
        self._counts: collections.Counter[str] = collections.Counter()
        self._written: set[str] = set()

    def add(self, texts: Iterable[Text]) -> None:
        """Counts a record by its whole texts; strings have nothing but words."""
        names = set()
        for text in texts:
            if isinstance(text, tuple) and any(message.fields or message.variables for message in text):
                names |= self._names(text)
        self._counts.update(names)

    def counts(self) -> dict[str, int]:
        """Returns the number of records by name, of names that were written in no text."""
        return {name: count for name, count in self._counts.items() if name not in self._written}

    def _names(self, messages: tuple[Message, ...]) -> set[str]:
        """Returns what a conversation has that is not written in it, and remembers what is."""
        keys = {key for message in messages if message.fields for key in message.as_dict()} - {"role", "content"}
        variables = {name for name, value in variables_of(messages).items() if value not in ([], None)}
        try:
            read, text = names_read(source_of(self._template, messages)), write(self._template, messages, True)
        except ValueError:
            # Such a text is dropped for that reason.
            return set()
        if not read.isdisjoint(REASONING):
            read |= set(REASONING)
        for name in (keys | variables) - self._written:
            mentioned = name in read or (name in keys and ANY_KEY in read)
            if mentioned and self._changes(text, messages, name):
                self._written.add(name)
        return (keys | variables) - self._written

    def _changes(self, text: str, messages: tuple[Message, ...], name: str) -> bool:
        """Returns whether a conversation has another text without a name."""
        without = []
        for message in messages:
            fields = message.as_dict()
            if name in REASONING:
                # They stand for each other.
                fields = {key: value for key, value in fields.items() if key not in REASONING}
            variables = json.loads(message.variables) if message.variables else {}
            variables.pop(name, None)
            fields.pop(name, None)
            without.append(message_of(fields)._replace(variables=json.dumps(variables) if variables else ""))
        try:
            return write(self._template, tuple(without), True) != text
        except ValueError:
            return True
