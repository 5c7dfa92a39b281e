"""Where a text ends: at the first token that stops the sampler, behind what the assistant wrote.

Many templates write a line break, or a second end token, behind the end of a turn. The sampler never gets there, so
nothing behind the stop token is learned, and a reward is not read there.
"""

import functools
from collections.abc import Callable, Collection, Sequence

import numpy as np

from jaxrlhf.data.chat import ChatTemplate, rendered_text
from jaxrlhf.data.records import Message

_PROBES = ("apple", "pear")
_SYSTEM = Message("system", "plum")


@functools.lru_cache(maxsize=64)
def _turn_ending(template: ChatTemplate, tokens: tuple[tuple[str, str], ...]) -> str | None:
    template = template._replace(tokens=dict(tokens))
    question, answer = _PROBES
    talk = (Message("user", question), Message("assistant", answer))
    for messages in (talk, (_SYSTEM, *talk)):
        try:
            text = rendered_text(template, messages)
        except ValueError:
            continue
        if answer in text:
            return text[text.rindex(answer) + len(answer) :]
    return None


def turn_ending(template: ChatTemplate) -> str | None:
    """Returns what a template writes behind the content of the assistant's last turn.

    None where the template refuses an ordinary conversation: it then fails where it is used.
    """
    # Without its dict, which cannot be hashed.
    return _turn_ending(template._replace(tokens=()), tuple(sorted(template.tokens.items())))  # pyright: ignore[reportArgumentType]


def end_of_turn(template: ChatTemplate, tokens: Callable[[str], Sequence[int]], added: Collection[int]) -> int | None:
    """Returns the token that ends a turn: the first added token that the template writes behind the content.

    Args:
        template: the model's.
        tokens: `(text) -> ` its token ids.
        added: ids of the tokens that the tokenizer never splits, such as its special ones.

    Returns:
        The id; None where the template ends turns in ordinary text, or not at all.
    """
    ending = turn_ending(template)
    return None if ending is None else next((token for token in tokens(ending) if token in added), None)


def up_to_stop(mask: np.ndarray, tokens: Sequence[int], blank: Sequence[bool], stops: Collection[int]) -> np.ndarray:
    """Returns the mask `[T]` of one span without what follows the stop token that ends it.

    Spaces and further stop tokens at the end of the span are taken off. A span that ends in anything else, such as one of
    a template that writes no end, is unchanged.

    Args:
        mask: True on the span's tokens.
        tokens: `[T]`.
        blank: `[T]`, whether a token is made of spaces only.
        stops: tokens that stop the sampler.
    """
    inside, stop = np.flatnonzero(mask), None
    for index in reversed(inside):
        if tokens[index] in stops:
            stop = index
        elif not blank[index]:
            break
    return mask if stop is None else mask & (np.arange(len(mask)) <= stop)
