"""Which tokens begin, end and pad texts: what a model directory's files and its chat template say, read together.

Five sources can name the end of a text: `generation_config.json`, `config.json`, the tokenizer's files, the chat template,
and the defaults of transformers. transformers' `generate` stops at the first that exists, which need not be where the
template ends a turn. Here a completion ends at any of them; `SpecialTokens` says which came from where, and what
disagreed.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers

from jaxrlhf.data.chat import ChatTemplate, load_chat_template
from jaxrlhf.data.encode import template_stop
from jaxrlhf.data.records import DataError
from jaxrlhf.data.special_tokens import named_tokens, tokenizer_settings
from jaxrlhf.lm.hugging_face.files import WeightsError, read_json, vocabulary_size
from jaxrlhf.lm.hugging_face.tokenizer_files import load_tokenizer, stands_in_texts

GENERATION, MODEL, TEMPLATE = "generation_config.json", "config.json", "the chat template"
_GEMMA = {"bos": 2, "eos": 1, "pad": 0}
FAMILY_DEFAULTS = {
    "llama": {"bos": 1, "eos": 2},
    "mistral": {"bos": 1, "eos": 2},
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "gpt2": {"bos": 50256, "eos": 50256},
}
"""Ids of transformers' configurations where `config.json` has no such key."""


class SpecialIds(NamedTuple):
    """Special token ids.

    Attributes:
        bos: at the beginning of a text, or None.
        eos: any of these ends a completion, the first ends a text; may be empty.
        pad: padding, or None.
    """

    bos: int | None = None
    eos: tuple[int, ...] = ()
    pad: int | None = None


class Found(NamedTuple):
    """An id, and the file or files that name it."""

    token: int
    source: str


class SpecialTokens(NamedTuple):
    """The special tokens of a model directory.

    Attributes:
        ids: resolved.
        sources: `(id, sources)` of all ends, and of BOS and padding, by "eos", "bos" and "pad".
        prepends_bos: whether texts begin with BOS, which the tokenizer's settings may switch off.
        notes: what disagreed or was left out, a sentence each.
    """

    ids: SpecialIds
    sources: dict[str, tuple[Found, ...]]
    prepends_bos: bool
    notes: tuple[str, ...]


def special_ids(directory: str | Path) -> SpecialIds:
    """Returns the special token ids of a model directory, from all files that name them (`read_special_tokens`).

    Args:
        directory: a Hugging Face model directory; the tokenizer and its template may be absent.

    Raises:
        WeightsError: a file is damaged, an id is not a number, or a token is no text.
    """
    read_json(directory, MODEL)
    if not (Path(directory) / "tokenizer.json").exists():
        return read_special_tokens(directory).ids
    try:
        return read_special_tokens(directory, load_tokenizer(directory), load_chat_template(directory)).ids
    except DataError as error:
        raise WeightsError(str(error)) from None


def read_special_tokens(
    directory: str | Path, tokenizer: tokenizers.Tokenizer | None = None, template: ChatTemplate | None = None
) -> SpecialTokens:
    """Returns the special tokens that a model directory's files name.

    A completion ends at the ids of `generation_config.json`, or of `config.json` where the former has none; at the
    tokenizer's `eos_token`, which comes first as it also ends a text; and at the token that ends a turn of the template.
    BOS and padding are the tokenizer's, else the configuration's. Defaults of transformers count where nothing else names
    one. Negative ids, and ids outside the model's or the tokenizer's vocabulary, are left out.

    Args:
        directory: a Hugging Face model directory.
        tokenizer: the directory's, without which only the configuration is read.
        template: the directory's.

    Raises:
        WeightsError: a file is damaged, or a value is no token id.
        DataError: a token of the tokenizer's files is no text.
    """
    reader = _Reader(Path(directory), tokenizer)
    notes: list[str] = []
    tokens = {kind: reader.of_tokenizer(kind, notes) for kind in ("bos", "eos", "pad")}
    configured = {kind: reader.of_configuration(kind, notes) for kind in ("bos", "eos", "pad")}
    ended = _in_vocabulary(template_stop(tokenizer, template) if tokenizer else None, reader.size)
    turn = [] if ended is None else [Found(ended, TEMPLATE)]
    sources = {
        "eos": _merged([*tokens["eos"], *configured["eos"], *turn]) or reader.of_family("eos"),
        "bos": _merged(_one("bos", tokens["bos"], configured["bos"], reader, notes)) or reader.of_family("bos"),
        "pad": _merged(_one("pad", tokens["pad"], configured["pad"], reader, notes)),
    }
    notes += reader.disagreements(tokens["eos"], configured["eos"], turn)
    if tokenizer is not None:
        notes += _notes_on_padding(tokenizer, sources["pad"])
    if template is not None and tokenizer is not None:
        notes += _notes_on_template(template, ended)
    bos, pad = (sources[kind][0].token if sources[kind] else None for kind in ("bos", "pad"))
    ids = SpecialIds(bos, tuple(found.token for found in sources["eos"]), pad)
    return SpecialTokens(ids, sources, reader.prepends_bos(), tuple(notes))


class _Reader:
    """Reads the files of a directory once."""

    def __init__(self, directory: Path, tokenizer: tokenizers.Tokenizer | None):
        self.directory, self.tokenizer = directory, tokenizer
        self.model = read_json(directory, MODEL)
        has_generation = (directory / GENERATION).is_file()
        self.generation = read_json(directory, GENERATION) if has_generation else {}
        self.size = vocabulary_size(directory)
        self.named = named_tokens(directory) if tokenizer is not None else {}

    def text(self, token: int) -> str:
        known = None if self.tokenizer is None else self.tokenizer.id_to_token(token)
        return f"{token}" if known is None else f"{known!r} ({token})"

    def of_tokenizer(self, kind: str, notes: list[str]) -> list[Found]:
        named = self.named.get(f"{kind}_token")
        if named is None or named.text is None or self.tokenizer is None:
            return []
        token = _in_vocabulary(self.tokenizer.token_to_id(named.text), self.size)
        if token is None:
            notes.append(f"The {kind}_token {named.text!r} of {named.source} is not in the vocabulary; it is left out.")
            return []
        return [Found(token, named.source)]

    def of_configuration(self, kind: str, notes: list[str]) -> list[Found]:
        """Returns the ids of `generation_config.json` where it has any, else those of `config.json`."""
        both = {}
        for source, settings in ((GENERATION, self.generation), (MODEL, self.model)):
            ids = self._ids(source, settings.get(f"{kind}_token_id"), kind)
            both[source] = [token for token in ids if self._stands(token, kind, source, notes)]
        if both[GENERATION] and both[MODEL] and set(both[GENERATION]).isdisjoint(both[MODEL]):
            texts = [" or ".join(self.text(token) for token in both[source]) for source in (GENERATION, MODEL)]
            notes.append(f"{kind} is {texts[0]} in {GENERATION} and {texts[1]} in {MODEL}; the former counts.")
        source = GENERATION if both[GENERATION] else MODEL
        agree = both[GENERATION] == both[MODEL]
        return [Found(token, f"{GENERATION}, {MODEL}" if agree else source) for token in both[source]]

    def of_family(self, kind: str) -> tuple[Found, ...]:
        """Returns the default of the family, where `config.json` leaves it out and the token is a special one."""
        family = str(self.model.get("model_type"))
        token = FAMILY_DEFAULTS.get(family, {}).get(kind)
        if token is None or f"{kind}_token_id" in self.model or self.tokenizer is None:
            return ()
        added = self.tokenizer.get_added_tokens_decoder()
        if _in_vocabulary(token, self.size) is None or token not in added or not added[token].special:
            return ()
        return (Found(token, f"the default of {family}"),)

    def disagreements(self, tokens: list[Found], configured: list[Found], turn: list[Found]) -> list[str]:
        """Returns a sentence for each end that a source names and another does not."""
        notes, known = [], {found.token for found in configured}
        for found in tokens:
            if known and found.token not in known:
                others = " or ".join(self.text(token) for token in sorted(known))
                notes.append(
                    f"{found.source} ends a text with {self.text(found.token)}, {configured[0].source} with {others}; "
                    "all of them end a completion."
                )
            known.add(found.token)
        for found in turn:
            if known and found.token not in known:
                others = " or ".join(self.text(token) for token in sorted(known))
                notes.append(
                    f"The chat template ends a turn with {self.text(found.token)}, which no file names beside {others}; "
                    "it ends a completion too."
                )
        return notes

    def prepends_bos(self) -> bool:
        settings = tokenizer_settings(self.directory)
        adds = settings.get("add_bos_token")
        if adds is not None and not isinstance(adds, bool):
            raise WeightsError(
                f"add_bos_token in {self.directory / 'tokenizer_config.json'} is {adds!r}: make it true or false."
            )
        named = self.named.get("bos_token")
        return (named is None or named.text is not None) and adds is not False

    def _ids(self, source: str, value: Any, kind: str) -> list[int]:
        values = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(token, int) and not isinstance(token, bool) for token in values):
            raise WeightsError(
                f"{kind}_token_id in {self.directory / source} is {value!r}: make it a token id or a list of them."
            )
        if kind != "eos" and len(values) > 1:
            raise WeightsError(f"{kind}_token_id in {self.directory / source} is {value!r}: make it one token id.")
        return list(dict.fromkeys(values))

    def _stands(self, token: int, kind: str, source: str, notes: list[str]) -> bool:
        if token < 0:
            return False
        unknown = self.tokenizer is not None and kind != "eos" and self.tokenizer.id_to_token(token) is None
        if _in_vocabulary(token, self.size) is None or unknown:
            whose = "tokenizer's" if unknown else "model's"
            notes.append(f"{kind}_token_id {token} of {source} is outside the {whose} vocabulary; it is left out.")
            return False
        return True


def _notes_on_padding(tokenizer: tokenizers.Tokenizer, found: Sequence[Found]) -> list[str]:
    return [
        f"The padding {tokenizer.id_to_token(pad)!r} ({pad}; {source}) can stand in a text; an exported reward model gets "
        "another."
        for pad, source in found
        if stands_in_texts(tokenizer, pad)
    ]


def _notes_on_template(template: ChatTemplate, ended: int | None) -> list[str]:
    # As in transformers, which leaves empty what it does not know.
    used = sorted(
        {*re.findall(r"\b(?:bos|eos|unk|pad|sep|cls|mask)_token\b", template.source or "")} - template.tokens.keys()
    )
    notes = [
        f"The chat template writes {name}, which no file of the tokenizer names; it is left empty." for name in used
    ]
    return (
        notes if ended is not None else [*notes, "The chat template ends the assistant's turn in no token of its own."]
    )


def _in_vocabulary(token: int | None, size: int | None) -> int | None:
    return None if token is None or (size is not None and token >= size) else token


def _one(kind: str, tokens: list[Found], configured: list[Found], reader: _Reader, notes: list[str]) -> list[Found]:
    """Returns the tokenizer's token and the configuration's where they agree, else the tokenizer's or the only one."""
    if tokens and configured and tokens[0].token != configured[0].token:
        notes.append(
            f"{kind} is {reader.text(tokens[0].token)} in {tokens[0].source} and {reader.text(configured[0].token)} in "
            f"{configured[0].source}; the tokenizer's counts."
        )
        return tokens
    return [*tokens, *configured]


def _merged(found: list[Found]) -> tuple[Found, ...]:
    """Returns each id once, in order of appearance, with all its sources."""
    sources: dict[int, list[str]] = {}
    for token, source in found:
        sources.setdefault(token, []).append(source)
    return tuple(Found(token, ", ".join(names)) for token, names in sources.items())
