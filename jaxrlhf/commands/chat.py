"""A conversation with a policy in the terminal: `jaxrlhf chat`."""

import contextlib
import dataclasses
import pathlib
import sys
from collections.abc import Callable, Generator, Iterator
from typing import Any, ClassVar, TextIO

import jax
import jax.numpy as jnp
import numpy as np

from jaxrlhf.commands.compilation import CompilationConfig
from jaxrlhf.commands.flags import check_flags
from jaxrlhf.commands.models import Model, open_model
from jaxrlhf.commands.options import Groups
from jaxrlhf.data.encode import encode_prompt
from jaxrlhf.data.records import Message
from jaxrlhf.lm.stream import Stream, open_stream, text_pieces
from jaxrlhf.lm.transformer.model import decoder

HUMAN = "\n\nHuman:"
"""Begins the user's turn in the transcript of a model without a chat template, and so ends the model's."""
HELP = "Commands: /reset begins anew, /quit ends; so does the end of the input."


@dataclasses.dataclass(frozen=True)
class Chat(CompilationConfig):
    """Talks with a policy in the terminal, or answers each line that is piped in.

    The model's chat template is used if it has one, and else a plain transcript. /reset begins anew, /quit or the end of
    the input ends the conversation, Ctrl-C cuts a reply short.
    """

    GROUPS: ClassVar[Groups] = {
        "main settings": ("policy", "system", "temperature", "top_p", "max_new_tokens", "max_length", "seed")
    }

    policy: pathlib.Path
    """Model to talk with: a Hugging Face directory, or a run's folder."""
    system: str = ""
    """System message, for a model whose chat template has one."""
    temperature: float = 1.0
    """Sampling temperature; 0 is greedy decoding."""
    top_p: float = 1.0
    """Probability mass of nucleus sampling; 1 samples from all tokens."""
    max_new_tokens: int = 256
    """Maximum length of a reply in tokens."""
    max_length: int = 2048
    """Maximum length of the conversation in tokens, reply included; the oldest turns are left out beyond it."""
    seed: int = 0
    """Random seed."""


def main(config: Chat) -> list[Message]:
    """Talks until /quit or the end of the input; returns the conversation.

    Raises:
        ValueError: the model cannot be read, a setting is out of range, or the template refuses the system message.
    """
    check_flags(config)
    model = open_model(config.policy, "policy")
    for note in (*model.notes, *model.bundle.found.notes):
        print(note, file=sys.stderr)
    conversation = Conversation(config, model)
    interactive = sys.stdin.isatty()
    if interactive:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (edits lines)
        print(HELP, file=sys.stderr)
    for line in _lines(sys.stdin, interactive):
        text = line.strip()
        if text == "/quit":
            break
        if text == "/reset":
            conversation.reset()
        elif text.startswith("/"):
            print(f"There is no command {text.split()[0]}. {HELP}", file=sys.stderr)
        elif text:
            _answer(conversation, text)
    return conversation.messages


def _lines(stream: TextIO, interactive: bool) -> Iterator[str]:
    while True:
        try:
            line = input("> ") if interactive else stream.readline()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if not line and not interactive:
            return
        yield line


def _answer(conversation: "Conversation", text: str) -> None:
    try:
        # An interrupt may also come while a piece is printed.
        with contextlib.suppress(KeyboardInterrupt), contextlib.closing(conversation.reply(text)) as pieces:
            for piece in pieces:
                print(piece, end="", flush=True)
    except ValueError as error:
        print(f"{' '.join(str(error).split())} The message is left out.", file=sys.stderr)
    print(flush=True)


class Conversation:
    """Turns so far, and what samples the next.

    Attributes:
        messages: the turns.
    """

    def __init__(self, config: Chat, model: Model):
        """Begins a conversation.

        Raises:
            ValueError: the reply leaves no room in the conversation, or the template refuses the system message.
        """
        columns = min(config.max_length, model.config.context_length)
        self._longest = columns - config.max_new_tokens
        if self._longest < 2:
            raise ValueError(
                f"--max-new-tokens {config.max_new_tokens} leaves no room for a message: the conversation has {columns} "
                "tokens at most, by --max-length and the model's context."
            )
        self._tokenizer = model.bundle.chat_tokenizer()
        self._start = [Message("system", config.system)] if config.system else []
        self.messages, self._source = list(self._start), np.random.default_rng(config.seed)
        # The template says now whether it takes a system message.
        encode_prompt(self._tokenizer, (*self._start, Message("user", "?")))
        self._decode: Callable[[list[int]], str] = model.bundle.tokenizer.decode
        self._stream: Stream = open_stream(
            decoder(model.config),
            jax.tree.map(jnp.asarray, model.params),
            columns=columns,
            max_new_tokens=config.max_new_tokens,
            stop_ids=model.bundle.stop_ids,
            temperature=config.temperature,
            top_p=config.top_p,
        )

    def reset(self) -> None:
        """Begins anew."""
        self.messages = list(self._start)

    def reply(self, text: str) -> Generator[str, None, None]:
        """Returns the reply to a message, piece by piece; both become turns of the conversation.

        An interrupt ends the reply.

        Raises:
            ValueError: the message alone is too long, or cannot be written in the template.
        """
        turns, prompt = self._fitted([*self.messages, Message("user", text)])
        pieces, shown = text_pieces(self._stream(prompt, self._source), prompt.tolist(), self._decode), ""
        try:
            for piece in _until(pieces, HUMAN if self._tokenizer.transcript else ""):
                # The space behind the transcript's colon is not shown.
                piece = piece if shown else piece.lstrip()
                shown += piece
                yield piece
        except KeyboardInterrupt:
            pass
        finally:
            self.messages = [*turns, Message("assistant", shown.strip())]

    def _fitted(self, turns: list[Message]) -> tuple[list[Message], Any]:
        """Returns the turns without the oldest that do not fit, and their tokens."""
        first = len(self._start)
        while True:
            prompt = encode_prompt(self._tokenizer, tuple(turns))
            if len(prompt) <= self._longest:
                return turns, prompt
            if len(turns) - first < 3:
                raise ValueError(f"The message has {len(prompt)} tokens with its template, and {self._longest} fit.")
            print("(The two oldest turns are left out: the conversation is too long.)", file=sys.stderr)
            turns = [*turns[:first], *turns[first + 2 :]]


def _until(pieces: Iterator[str], end: str) -> Iterator[str]:
    """Returns the pieces up to an end that may be spread over several; all of them without one."""
    held = ""
    for piece in pieces:
        held += piece
        if end and end in held:
            if not held.startswith(end):
                yield held[: held.index(end)]
            return
        # What could begin the end is held back.
        kept = max((size for size in range(1, len(end)) if held.endswith(end[:size])), default=0)
        if len(held) > kept:
            yield held[: len(held) - kept]
            held = held[len(held) - kept :]
    if held:
        yield held
