"""Tokenization of texts, with completion masks from character offsets.

Prompt and completion are tokenized as one text, as a model sees it, and a token belongs to the completion if its last
character does: a token that begins before the boundary is masked in, one that runs into the next turn is not. The
completion ends with the token that stops the sampler (`turns`), whatever a template writes behind it. If a
tokenizer merges the end of a prompt with what follows, the text has fewer prompt tokens than the prompt alone; templates
rarely end that way.
"""

from typing import NamedTuple

import numpy as np
import tokenizers

from jaxrlhf.data.chat import TRANSCRIPT, ChatTemplate, render, render_completion, render_prompt
from jaxrlhf.data.records import Preference, Text
from jaxrlhf.data.turns import end_of_turn, up_to_stop


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
        bos: id of the token that begins a text, or None. A conversation begins as the model's template writes it.
        eos: the end-of-text token as a string, such as "</s>"; empty if there is none.
        template: the chat template.
        vocabulary_size: the model's, or None; a text with a token beyond it cannot be encoded.
        stop_ids: tokens that stop the sampler; a completion ends with the first of them behind its content.
        transcript: whether the template is `TRANSCRIPT`, as the model has none.
    """

    backend: tokenizers.Tokenizer
    bos: int | None
    eos: str
    template: ChatTemplate
    vocabulary_size: int | None = None
    stop_ids: tuple[int, ...] = ()
    transcript: bool = False


def chat_tokenizer(
    tokenizer: tokenizers.Tokenizer,
    *,
    bos: int | None = None,
    eos: int | None = None,
    template: ChatTemplate | None = None,
    vocabulary_size: int | None = None,
    stop_ids: tuple[int, ...] | None = None,
) -> ChatTokenizer:
    """Returns a chat tokenizer; without a template conversations become `TRANSCRIPT`s.

    Without `stop_ids` a text ends with `eos` or with the special token that ends a turn of the template.

    Raises:
        ValueError: the tokenizer does not know a special id.
    """
    for name, token in (("bos", bos), ("eos", eos)):
        if token is not None and tokenizer.id_to_token(token) is None:
            raise ValueError(f"The {name} id {token} is not one of the tokenizer's; take ids of the same model.")
    eos_text = "" if eos is None else str(tokenizer.id_to_token(eos))
    used = template or ChatTemplate(TRANSCRIPT, {"eos_token": eos_text})
    if stop_ids is None:
        ends = dict.fromkeys((eos, template_stop(tokenizer, template)))
        stop_ids = tuple(token for token in ends if token is not None)
    return ChatTokenizer(tokenizer, bos, eos_text, used, vocabulary_size, stop_ids, template is None)


def template_stop(tokenizer: tokenizers.Tokenizer, template: ChatTemplate | None) -> int | None:
    """Returns the token that ends a turn of the template (`end_of_turn`), None if there is none."""
    if template is None:
        return None
    # Some tokenizers add tokens for runs of spaces, which end no turn.
    added = {number for number, token in tokenizer.get_added_tokens_decoder().items() if token.content.strip()}
    return end_of_turn(template, lambda text: tokenizer.encode(text, add_special_tokens=False).ids, added)


def encode(tokenizer: ChatTokenizer, prompt: Text, completion: Text) -> Encoded:
    """Returns the tokens of a prompt and its completion, with an end of text.

    The mask ends with the stop token that ends the completion; the tokens are all that the template writes. Strings are
    concatenated as they are, the end-of-text token appended. In a conversation the mask covers every turn of the assistant
    in the completion; a last turn of the prompt that is the assistant's is continued.

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
        return _encode_spans(tokenizer, rendered.text, rendered.spans, templated=True)
    rendered = render_completion(tokenizer.template, prompt, completion)[1]
    return _encode_spans(tokenizer, rendered.text, rendered.spans, templated=True)


def encode_pair(tokenizer: ChatTokenizer, pair: Preference) -> EncodedPair:
    """Returns the tokens of both texts of a preference, each up to the end of its completion (`up_to_end`).

    Raises:
        ValueError: as `encode`.
    """
    margin = float("nan") if pair.margin is None else pair.margin
    chosen, rejected = (
        up_to_end(encode(tokenizer, pair.prompt, completion)) for completion in (pair.chosen, pair.rejected)
    )
    return EncodedPair(chosen, rejected, margin)


def up_to_end(text: Encoded) -> Encoded:
    """Returns a text without what follows its completion: it ends where the sampler stops and a reward is read."""
    learned = np.flatnonzero(text.completion_mask)
    return text if not len(learned) else Encoded(*(part[: learned[-1] + 1] for part in text))


def encode_prompt(tokenizer: ChatTokenizer, prompt: Text) -> np.ndarray:
    """Returns the tokens `[P]` of a prompt, a conversation's with its generation prompt. No end-of-text token.

    If the last turn of a conversation is the assistant's, the tokens end with its words, which the model continues.

    Raises:
        ValueError: the template refuses the conversation.
    """
    if isinstance(prompt, str):
        return _encode_spans(tokenizer, prompt, ()).tokens
    return _encode_spans(tokenizer, render_prompt(tokenizer.template, prompt), (), templated=True).tokens


def _encode_spans(
    tokenizer: ChatTokenizer, text: str, spans: tuple[tuple[int, int], ...], *, templated: bool = False
) -> Encoded:
    """Returns a text's tokens, and the mask of those whose last character lies in one of the spans, up to its stop."""
    try:
        encoding = tokenizer.backend.encode(text, add_special_tokens=False)
    except TypeError:
        raise ValueError("A text holds half of a surrogate pair, which no tokenizer takes; take it out.") from None
    tokens, last_characters, covered = list(encoding.ids), [], 0
    if tokenizer.vocabulary_size is not None and max(tokens, default=0) >= tokenizer.vocabulary_size:
        token = tokenizer.backend.id_to_token(max(tokens))
        raise ValueError(f"A text holds the token {token}, which is not in the model's vocabulary.")
    for start, stop in encoding.offsets:
        # A token without characters belongs to its position. One of spaces whose offsets were trimmed belongs to the
        # spaces that no other token covers.
        last_characters.append(stop - 1 if stop > start or covered < start else start)
        covered = max(covered, stop)
    last, mask = np.array(last_characters, int), np.zeros(len(tokens), bool)
    blank = [not text[start:stop].strip() for start, stop in encoding.offsets]
    for first, end in spans:
        mask |= up_to_stop((first <= last) & (last < end), tokens, blank, tokenizer.stop_ids)
    if _begins_with_bos(tokenizer, tokens, templated):
        tokens, mask = [tokenizer.bos, *tokens], np.concatenate([[False], mask])
    return Encoded(np.array(tokens, np.int32), mask)


def _begins_with_bos(tokenizer: ChatTokenizer, tokens: list[int], templated: bool) -> bool:
    """Returns whether BOS is to be put before a text; a template writes it itself, or leaves it out on purpose."""
    if tokenizer.bos is None or (templated and not tokenizer.transcript):
        return False
    return tokens[:1] != [tokenizer.bos]
