"""From texts to tokens, with the mask of what is to be learned, by characters.

Prompt and completion are tokenised as one text, as a model sees it, and a token is the completion's if its last character
is: one that begins before the border is learned, one that runs on into the next turn is not. Where a tokenizer joins the
end of a prompt to what follows, the tokens before the border are fewer than the prompt's own; templates rarely end so.
"""

from typing import NamedTuple

import numpy as np
import tokenizers

from jaxrlhf.data.chat import TRANSCRIPT, ChatTemplate, render, split_completion
from jaxrlhf.data.records import Preference, Text


class Encoded(NamedTuple):
    """Tokens `[T]` int32, and True `[T]` on those of the completion (of the assistant's turns)."""

    tokens: np.ndarray
    completion: np.ndarray


class EncodedPair(NamedTuple):
    """Both texts of a preference, and the margin, NaN where there is none."""

    chosen: Encoded
    rejected: Encoded
    margin: float


class Codec(NamedTuple):
    """What turns texts into tokens.

    Attributes:
        tokenizer: of the model.
        bos: the id that begins a text, or None.
        eos: the text that ends one, such as "</s>"; empty where there is none.
        template: of conversations.
        size: of the model's vocabulary, or None; a text with a token beyond it cannot be encoded.
    """

    tokenizer: tokenizers.Tokenizer
    bos: int | None
    eos: str
    template: ChatTemplate
    size: int | None = None


def codec(
    tokenizer: tokenizers.Tokenizer,
    *,
    bos: int | None = None,
    eos: int | None = None,
    template: ChatTemplate | None = None,
    size: int | None = None,
) -> Codec:
    """Returns a codec; conversations are transcripts where the model has no template.

    Raises:
        ValueError: a special id is not the tokenizer's.
    """
    for name, token in (("bos", bos), ("eos", eos)):
        if token is not None and tokenizer.id_to_token(token) is None:
            raise ValueError(f"The {name} id {token} is not one of the tokenizer's; take ids of the same model.")
    end = "" if eos is None else str(tokenizer.id_to_token(eos))
    return Codec(tokenizer, bos, end, template or ChatTemplate(TRANSCRIPT, {"eos_token": end}), size)


def encode(codec: Codec, prompt: Text, completion: Text) -> Encoded:
    """Returns a prompt with its completion, which ends the text.

    Strings are taken as they are, the end of text put behind. Of a conversation without a prompt every turn of the
    assistant is to be learned.

    Raises:
        ValueError: one is a string and the other a conversation, or the template refuses them.
    """
    if isinstance(prompt, str) and isinstance(completion, str):
        return _spanned(codec, prompt + completion + codec.eos, ((len(prompt), len(prompt + completion + codec.eos)),))
    if isinstance(prompt, str) or isinstance(completion, str):
        raise ValueError("Prompt and completion must both be strings, or both conversations.")
    if not prompt:
        rendered = render(codec.template, completion)
        return _spanned(codec, rendered.text, rendered.spans)
    before, after = split_completion(codec.template, prompt, completion)
    return _spanned(codec, before + after, ((len(before), len(before + after)),))


def encode_pair(codec: Codec, pair: Preference) -> EncodedPair:
    """Returns both texts of a preference.

    Raises:
        ValueError: as `encode`.
    """
    margin = float("nan") if pair.margin is None else pair.margin
    return EncodedPair(encode(codec, pair.prompt, pair.chosen), encode(codec, pair.prompt, pair.rejected), margin)


def encode_prompt(codec: Codec, prompt: Text) -> np.ndarray:
    """Returns a prompt's tokens `[P]`, a conversation's with what makes the assistant speak. No end of text.

    Raises:
        ValueError: the template refuses the conversation.
    """
    text = prompt if isinstance(prompt, str) else render(codec.template, prompt, generation_prompt=True).text
    return _spanned(codec, text, ()).tokens


def _spanned(codec: Codec, text: str, spans: tuple[tuple[int, int], ...]) -> Encoded:
    found = codec.tokenizer.encode(text, add_special_tokens=False)
    tokens, learned, reached = list(found.ids), [], 0
    if codec.size is not None and max(tokens, default=0) >= codec.size:
        raise ValueError(f"A text holds the token {codec.tokenizer.id_to_token(max(tokens))}, which the model has not.")
    for begin, end in found.offsets:
        # A token without characters of its own belongs to where it stands; one of spaces whose offsets were trimmed, to
        # the spaces that no other token covers.
        ends_at = end - 1 if end > begin or reached < begin else begin
        learned.append(any(first <= ends_at < last for first, last in spans))
        reached = max(reached, end)
    if codec.bos is not None and tokens[:1] != [codec.bos]:
        # A template may have written it already.
        tokens, learned = [codec.bos, *tokens], [False, *learned]
    return Encoded(np.array(tokens, np.int32), np.array(learned, bool))
