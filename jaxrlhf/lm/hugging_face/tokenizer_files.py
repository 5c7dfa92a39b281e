"""A model directory's tokenizer: read with the special tokens that all its files name, and written with padding."""

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers

from jaxrlhf.data.records import DataError
from jaxrlhf.data.special_tokens import MAP, SETTINGS, AddedToken, added_tokens, special_texts
from jaxrlhf.lm.hugging_face.files import WeightsError, read_json, vocabulary_size, write_json

PADDING_NAMES = ("<|pad|>", "<|padding|>", "<|reward-pad|>")
"""Texts of a padding token for models that have none, in order of preference."""
RARE = "\u0000\u0378\u2fff\ue123\U0010fffd"
"""Characters that a vocabulary without bytes of its own does not have."""


class Padding(NamedTuple):
    """A padding token: its id, its text, and whether the tokenizer's files have to be given it."""

    token: int
    text: str
    new: bool


def load_tokenizer(directory: str | Path) -> tokenizers.Tokenizer:
    """Returns the tokenizer of a model directory, with truncation and padding switched off.

    As in transformers, tokens that the other files of the tokenizer add or name as special are never split, whether or not
    `tokenizer.json` says so.

    Args:
        directory: holds `tokenizer.json` and the `config.json` of the model it belongs to.

    Returns:
        The tokenizer.

    Raises:
        WeightsError: a file is missing or damaged, the files give a token different ids, or the tokenizer has ids outside
            the model's vocabulary.
    """
    size = vocabulary_size(directory)
    read_json(directory, "tokenizer.json")
    path = Path(directory) / "tokenizer.json"
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise WeightsError(f"{path} is not a tokenizer ({error}): copy or save it again.") from error
    # Settings that it was saved with would silently truncate and pad texts.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    try:
        _add_tokens(tokenizer, added_tokens(directory), special_texts(directory), path)
    except DataError as error:
        raise WeightsError(str(error)) from None
    # Some models have special tokens beyond their vocabulary, for images say, that never occur in text.
    special = {token for token, added in tokenizer.get_added_tokens_decoder().items() if added.special}
    largest = max({*tokenizer.get_vocab(with_added_tokens=True).values()} - special, default=0)
    if size is not None and largest >= size:
        raise WeightsError(
            f"{path} has token ids up to {largest} but the model's vocabulary ends at {size - 1}: use the "
            "tokenizer that the model was trained with."
        )
    return tokenizer


def _add_tokens(
    tokenizer: tokenizers.Tokenizer, listed: dict[int, AddedToken], named: dict[str, AddedToken], path: Path
) -> None:
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    for number, token in listed.items():
        if token.text not in known:
            tokenizer.add_tokens([_library_token(token)])
            found = tokenizer.token_to_id(token.text)
            if found != number:
                raise WeightsError(
                    f"The files beside {path} give the token {token.text!r} the id {number}, the tokenizer gives it "
                    f"{found}: use files that were saved together."
                )
    known |= {token.text for token in listed.values()}
    tokenizer.add_special_tokens([_library_token(token) for text, token in named.items() if text not in known])


def mark_ends(tokenizer: tokenizers.Tokenizer, ends: Sequence[int]) -> None:
    """Makes the ends of texts special tokens of the tokenizer, in place, unless they are ordinary words.

    A text that ends in the token's text then ends in the token, and no annotator sees it.
    """
    added = tokenizer.get_added_tokens_decoder()
    for token in ends:
        text = tokenizer.id_to_token(token)
        if text is None or (token in added and added[token].special):
            continue
        flags = {} if token not in added else {name: getattr(added[token], name) for name in ("lstrip", "rstrip")}
        # Ordinary words are split off by themselves, or are written otherwise than they are spelled in the vocabulary.
        is_word = tokenizer.encode(text, add_special_tokens=False).ids == [token] or tokenizer.decode([token]) != text
        if token in added or not is_word:
            tokenizer.add_special_tokens([tokenizers.AddedToken(text, special=True, normalized=False, **flags)])


def _library_token(token: AddedToken) -> tokenizers.AddedToken:
    return tokenizers.AddedToken(token.text, special=token.special, **token.flags)


def stands_in_texts(tokenizer: tokenizers.Tokenizer, token: int) -> bool:
    """Returns whether a text can hold the token: an ordinary word, or one for unknown characters that it meets.

    A word such as "!" that is named as padding is special too, but only what is written in brackets stands in no text
    unless it is meant.
    """
    added = tokenizer.get_added_tokens_decoder().get(token)
    if added is None or not added.special or not re.fullmatch(r"[<\[{].+[>\]}]", added.content):
        return True
    return any(token in tokenizer.encode(character, add_special_tokens=False).ids for character in RARE)


def padding_for(tokenizer: tokenizers.Tokenizer, declared: int | None, used: set[int]) -> Padding:
    """Returns a padding token that no text holds: the declared one if it is so, else one of `PADDING_NAMES`.

    Args:
        tokenizer: the model's.
        declared: the padding that the model's files name, or None.
        used: tokens that begin, end or divide texts.

    Raises:
        WeightsError: the tokenizer has all the names as ordinary words.
    """
    if declared is not None and declared not in used and not stands_in_texts(tokenizer, declared):
        return Padding(declared, str(tokenizer.id_to_token(declared)), new=False)
    for name in PADDING_NAMES:
        token = tokenizer.token_to_id(name)
        if token is None:
            longer = tokenizers.Tokenizer.from_str(tokenizer.to_str())
            longer.add_special_tokens([name])
            token = longer.token_to_id(name)
            if token is not None and tokenizer.id_to_token(token) is None:
                return Padding(token, name, new=True)
        elif token not in used and not stands_in_texts(tokenizer, token):
            return Padding(token, name, new=False)
    raise WeightsError(
        f"The tokenizer has no token left for padding: add a special token, and name it pad_token in {SETTINGS}."
    )


def vocabulary_with(token: int, size: int) -> int:
    """Returns a vocabulary's size with room for a token, divisible by the same powers of two up to 64.

    A mesh that splits the vocabulary can then still do so.
    """
    step = math.gcd(size, 64)
    return max(size, -(-(token + 1) // step) * step)


def write_padding(directory: Path, padding: Padding) -> None:
    """Names the padding in the tokenizer's files of a directory, and adds the token to them where it is new.

    What was special as the padding before stays a special token, so that texts are split as they were.
    """
    before = special_texts(directory)
    if padding.new:
        content = read_json(directory, "tokenizer.json")
        entry = {"id": padding.token, "content": padding.text, "single_word": False, "lstrip": False, "rstrip": False}
        added = [*(content.get("added_tokens") or []), entry | {"normalized": False, "special": True}]
        write_json(directory, "tokenizer.json", content | {"added_tokens": added})
    settings = read_json(directory, SETTINGS) if (directory / SETTINGS).is_file() else {}
    listed: Any = settings.get("added_tokens_decoder")
    if padding.new and isinstance(listed, dict):
        flags = {"content": padding.text, "lstrip": False, "rstrip": False, "single_word": False}
        settings["added_tokens_decoder"] = listed | {str(padding.token): flags | {"normalized": False, "special": True}}
    write_json(directory, SETTINGS, settings | {"pad_token": padding.text})
    if (directory / MAP).is_file():
        write_json(directory, MAP, read_json(directory, MAP) | {"pad_token": padding.text})
    kept = [text for text in before if text not in special_texts(directory)]
    if kept:
        settings = read_json(directory, SETTINGS)
        write_json(directory, SETTINGS, settings | _still_special(settings, kept))


def _still_special(settings: dict[str, Any], texts: list[str]) -> dict[str, Any]:
    """Returns the setting that lists further special tokens, with these too."""
    extra = settings.get("extra_special_tokens")
    if isinstance(extra, dict) and extra:
        return {"extra_special_tokens": extra | {f"former_padding_{n}_token": text for n, text in enumerate(texts)}}
    if extra:
        return {"extra_special_tokens": [*extra, *texts]}
    return {"additional_special_tokens": [*(settings.get("additional_special_tokens") or []), *texts]}


def tokens_of(tokenizer: tokenizers.Tokenizer) -> dict[int, str]:
    """Returns the texts of a tokenizer's tokens by id."""
    return {token: text for text, token in tokenizer.get_vocab(with_added_tokens=True).items()}


def first_difference(policy: tokenizers.Tokenizer, other: tokenizers.Tokenizer, size: int) -> str | None:
    """Returns what the first token is in both tokenizers where they differ, None where they agree below `size`."""
    ours, theirs = tokens_of(policy), tokens_of(other)
    for token in range(size):
        if token in ours and ours[token] != theirs.get(token):
            return (
                json.dumps(ours[token], ensure_ascii=False)
                + " and "
                + json.dumps(theirs.get(token), ensure_ascii=False)
            )
    return None
