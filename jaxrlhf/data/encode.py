"""Tokenization of texts, with completion masks from character offsets.

Prompt and completion are tokenized as one text, as a model sees it, and a token belongs to the completion if its last
character does: a token that begins before the boundary is masked in, one that runs into the next turn is not. If a
tokenizer merges the end of a prompt with what follows, the text has fewer prompt tokens than the prompt alone; templates
rarely end that way.
"""

from typing import NamedTuple

import numpy as np
import tokenizers

from jaxrlhf.data.chat import TRANSCRIPT, ChatTemplate, render, render_completion, render_prompt
from jaxrlhf.data.records import Preference, Text


class Encoded(NamedTuple):
    """Tokens `[T]` int32, and their mask `[T]` bool: True on the completion (the assistant's turns)."""

    tokens: np.ndarray
    completion_mask: np.ndarray


class EncodedPair(NamedTuple):
    """Both texts of a preference, and the margin, NaN if there is none."""

    chosen: Encoded
    rejected: Encoded
    margin: float


class ChatTokenizer(NamedTuple):
    """A tokenizer with its special tokens and chat template.

    Attributes:
        backend: the model's tokenizer.
        bos: id of the token that begins a text, or None.
        eos: the end-of-text token as a string, such as "</s>"; empty if there is none.
        template: the chat template.
        vocabulary_size: the model's, or None; a text with a token beyond it cannot be encoded.
    """

    backend: tokenizers.Tokenizer
    bos: int | None
    eos: str
    template: ChatTemplate
    vocabulary_size: int | None = None


def chat_tokenizer(
    tokenizer: tokenizers.Tokenizer,
    *,
    bos: int | None = None,
    eos: int | None = None,
    template: ChatTemplate | None = None,
    vocabulary_size: int | None = None,
) -> ChatTokenizer:
    """Returns a chat tokenizer; without a template conversations become `TRANSCRIPT`s.

    Raises:
        ValueError: the tokenizer does not know a special id.
    """
    for name, token in (("bos", bos), ("eos", eos)):
        if token is not None and tokenizer.id_to_token(token) is None:
            raise ValueError(f"The {name} id {token} is not one of the tokenizer's; take ids of the same model.")
    eos_text = "" if eos is None else str(tokenizer.id_to_token(eos))
    template = template or ChatTemplate(TRANSCRIPT, {"eos_token": eos_text})
    return ChatTokenizer(tokenizer, bos, eos_text, template, vocabulary_size)


def encode(tokenizer: ChatTokenizer, prompt: Text, completion: Text) -> Encoded:
    """Returns the tokens of a prompt and its completion, with an end of text.

    Strings are concatenated as they are, the end-of-text token appended. In a conversation the mask covers every turn of
    the assistant in the completion; a last turn of the prompt that is the assistant's is continued.

    Raises:
        ValueError: one is a string and the other a conversation, or the template refuses them.
    """
    if isinstance(prompt, str) and isinstance(completion, str):
        text = prompt + completion + tokenizer.eos
        return _encode_spans(tokenizer, text, ((len(prompt), len(text)),))
    if isinstance(prompt, str) or isinstance(completion, str):
        raise ValueError("Prompt and completion must both be strings, or both conversations.")
    if not prompt:
        rendered = render(tokenizer.template, completion)
        return _encode_spans(tokenizer, rendered.text, rendered.spans)
    rendered = render_completion(tokenizer.template, prompt, completion)[1]
    return _encode_spans(tokenizer, rendered.text, rendered.spans)


def encode_pair(tokenizer: ChatTokenizer, pair: Preference) -> EncodedPair:
    """Returns the tokens of both texts of a preference.

    Raises:
        ValueError: as `encode`.
    """
    margin = float("nan") if pair.margin is None else pair.margin
    chosen, rejected = (encode(tokenizer, pair.prompt, completion) for completion in (pair.chosen, pair.rejected))
    return EncodedPair(chosen, rejected, margin)


def encode_prompt(tokenizer: ChatTokenizer, prompt: Text) -> np.ndarray:
    """Returns the tokens `[P]` of a prompt, a conversation's with its generation prompt. No end-of-text token.

    If the last turn of a conversation is the assistant's, the tokens end with its words, which the model continues.

    Raises:
        ValueError: the template refuses the conversation.
    """
    text = prompt if isinstance(prompt, str) else render_prompt(tokenizer.template, prompt)
    return _encode_spans(tokenizer, text, ()).tokens


def _encode_spans(tokenizer: ChatTokenizer, text: str, spans: tuple[tuple[int, int], ...]) -> Encoded:
    """Returns a text's tokens, and the mask of those whose last character lies in one of the spans."""
    try:
        encoding = tokenizer.backend.encode(text, add_special_tokens=False)
    except TypeError:
        raise ValueError("A text holds half of a surrogate pair, which no tokenizer takes; take it out.") from None
    tokens, mask, covered = list(encoding.ids), [], 0
    if tokenizer.vocabulary_size is not None and max(tokens, default=0) >= tokenizer.vocabulary_size:
        token = tokenizer.backend.id_to_token(max(tokens))
        raise ValueError(f"A text holds the token {token}, which is not in the model's vocabulary.")
    for start, stop in encoding.offsets:
        # A token without characters belongs to its position. One of spaces whose offsets were trimmed belongs to the
        # spaces that no other token covers.
        last = stop - 1 if stop > start or covered < start else start
        mask.append(any(first <= last < end for first, end in spans))
        covered = max(covered, stop)
    if tokenizer.bos is not None and tokens[:1] != [tokenizer.bos]:
        # A template may have written it already.
        tokens, mask = [tokenizer.bos, *tokens], [False, *mask]
    return Encoded(np.array(tokens, np.int32), np.array(mask, bool))
