"""Special tokens as a tokenizer's files name them, in the order in which transformers reads the files.

`special_tokens_map.json` counts before `tokenizer_config.json`, unless the latter lists its `added_tokens_decoder`; what
neither names has the default of the tokenizer's class; last comes the padding that `tokenizer.json` was saved with.
"""

import functools
import json
import pathlib
from typing import Any, NamedTuple

from jaxrlhf.data.records import DataError

SETTINGS, MAP, ADDED, TOKENIZER = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.json",
)
NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_LLAMA = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
_GEMMA = {
    "bos_token": "<bos>",
    "eos_token": "<eos>",
    "unk_token": "<unk>",
    "pad_token": "<pad>",
    "mask_token": "<mask>",
}
_END = "<|endoftext|>"
CLASS_DEFAULTS = {
    "LlamaTokenizer": _LLAMA,
    "GemmaTokenizer": _GEMMA,
    "GPT2Tokenizer": {"bos_token": _END, "eos_token": _END, "unk_token": _END},
    "Qwen2Tokenizer": {"eos_token": _END, "unk_token": _END, "pad_token": _END},
}
"""What transformers' classes name where no file does."""
CLASS_OF = {
    "gpt2": "GPT2Tokenizer",
    "qwen2": "Qwen2Tokenizer",
    "qwen3": "Qwen2Tokenizer",
    "gemma2": "GemmaTokenizer",
    "gemma3_text": "GemmaTokenizer",
}
"""The class of a `model_type` whose files name none."""


class NamedToken(NamedTuple):
    """The text of a special token, None where a file says that there is none; and the file that names it."""

    text: str | None
    source: str


def tokenizer_settings(directory: str | pathlib.Path) -> dict[str, Any]:
    """Returns the contents of `tokenizer_config.json`, empty where there is no such file.

    Raises:
        DataError: the file is damaged.
    """
    return _object(pathlib.Path(directory), SETTINGS)


def named_tokens(directory: str | pathlib.Path) -> dict[str, NamedToken]:
    """Returns the special tokens of a model's folder by name, such as `eos_token`.

    Raises:
        DataError: a file is damaged, or a token is neither a text nor an object with its `content`.
    """
    directory = pathlib.Path(directory)
    settings = _object(directory, SETTINGS)
    sources = [(SETTINGS, settings)]
    if "added_tokens_decoder" not in settings:
        sources.append((MAP, _object(directory, MAP)))
    found: dict[str, NamedToken] = {}
    for source, content in sources:
        for name, value in _tokens_in(content).items():
            if name in NAMES or _text(value) is not None:
                found[name] = NamedToken(_checked_text(directory / source, name, value), source)
    padding = _known(directory).padding
    if padding is not None:
        found.setdefault("pad_token", NamedToken(padding, TOKENIZER))
    class_name, defaults = _class_defaults(directory, settings)
    for name, text in defaults.items():
        found.setdefault(name, NamedToken(text, f"the default of {class_name}"))
    return found


def template_tokens(directory: str | pathlib.Path) -> dict[str, str]:
    """Returns the texts that a chat template may use by name.

    Raises:
        DataError: as `named_tokens`.
    """
    return {name: token.text for name, token in named_tokens(directory).items() if token.text is not None}


class AddedToken(NamedTuple):
    """A token that a tokenizer never splits; `flags` are those of the `tokenizers` library that a file sets."""

    text: str
    special: bool
    flags: dict[str, bool]


def added_tokens(directory: str | pathlib.Path) -> dict[int, AddedToken]:
    """Returns the tokens that `tokenizer_config.json` or `added_tokens.json` add to the tokenizer, by id.

    Raises:
        DataError: a file is damaged, or an entry is not a token with its id.
    """
    directory = pathlib.Path(directory)
    settings, found = _object(directory, SETTINGS), {}
    if "added_tokens_decoder" in settings:
        path, listed = directory / SETTINGS, settings["added_tokens_decoder"]
        entries = listed.items() if isinstance(listed, dict) else [] if listed is None else [(listed, None)]
    else:
        path, listed = directory / ADDED, _object(directory, ADDED)
        special = {token.text for token in named_tokens(directory).values()} if listed else set()
        entries = [(number, {"content": text, "special": text in special}) for text, number in listed.items()]
    for number, token in entries:
        is_id = isinstance(number, int) and not isinstance(number, bool) and number >= 0
        text = _text(token)
        if not (is_id or (isinstance(number, str) and number.isascii() and number.isdecimal())) or not text:
            raise DataError(f"{path} lists no token with its id but {number!r}: {token!r}; copy the file again.")
        found[int(number)] = _added(text, token)
    return dict(sorted(found.items()))


def special_texts(directory: str | pathlib.Path) -> dict[str, AddedToken]:
    """Returns the special tokens that the tokenizer's settings name or list, by their texts.

    Raises:
        DataError: as `named_tokens`; or `additional_special_tokens` is no list of tokens.
    """
    directory = pathlib.Path(directory)
    settings = _object(directory, SETTINGS)
    contents = [settings, {} if "added_tokens_decoder" in settings else _object(directory, MAP)]
    found: dict[str, AddedToken] = {}
    for content in contents:
        for key in ("additional_special_tokens", "extra_special_tokens"):
            listed = content.get(key)
            values = [] if listed is None else list(listed.values()) if isinstance(listed, dict) else listed
            if not isinstance(values, list) or not all(_text(value) for value in values):
                raise DataError(f"{key} in {directory} is {listed!r}; make it a list of tokens.")
            found |= {str(_text(value)): _added(str(_text(value)), value, special=True) for value in values}
    named = {token.text for token in named_tokens(directory).values() if token.text is not None}
    given = {text: value for content in contents for value in _tokens_in(content).values() if (text := _text(value))}
    return {text: _added(text, given.get(text), special=True) for text in sorted(named)} | found


def _added(text: str, value: Any, *, special: bool | None = None) -> AddedToken:
    given = value if isinstance(value, dict) else {}
    flags = {name: given[name] for name in ("lstrip", "rstrip", "single_word") if isinstance(given.get(name), bool)}
    is_special = special if special is not None else given.get("special") is True
    normalized = given.get("normalized")
    flags["normalized"] = normalized if isinstance(normalized, bool) else not is_special
    return AddedToken(text, is_special, flags)


def _object(directory: pathlib.Path, name: str) -> dict[str, Any]:
    path = directory / name
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON ({error}); copy it again.") from None
    if not isinstance(content, dict):
        raise DataError(f"{path} holds no object; copy it again.")
    return content


def _tokens_in(content: dict[str, Any]) -> dict[str, Any]:
    """Returns what a file names: its keys that end in `_token`, and the extra tokens that have names."""
    found = {name: value for name, value in content.items() if name.endswith("_token")}
    extra = content.get("extra_special_tokens")
    return found | (extra if isinstance(extra, dict) else {})


def _text(value: Any) -> str | None:
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None


def _checked_text(path: pathlib.Path, name: str, value: Any) -> str | None:
    text = _text(value)
    if text is None and value is not None:
        raise DataError(f'{name} in {path} is {value!r}; make it the text of a token, such as "</s>", or null.')
    # An empty text is no token.
    return text or None


class _Known(NamedTuple):
    """What is needed of a `tokenizer.json`: its padding, whether it is byte-level, and the default tokens it has."""

    padding: str | None
    byte_level: bool
    defaults: frozenset[str]


def _known(directory: pathlib.Path) -> _Known:
    path = directory / TOKENIZER
    try:
        return _known_of(path.read_bytes()) if path.exists() else _Known(None, False, frozenset())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON ({error}); copy it again.") from None


@functools.lru_cache(maxsize=2)
def _known_of(content: bytes) -> _Known:
    # A tokenizer's file is large, and several readers ask.
    parsed = json.loads(content.decode("utf-8-sig"))
    if not isinstance(parsed, dict):
        raise ValueError("no object")
    padding, model, added = parsed.get("padding"), parsed.get("model"), parsed.get("added_tokens")
    words = model.get("vocab") if isinstance(model, dict) else None
    texts = {_text(token) for token in added} if isinstance(added, list) else set()
    wanted = {text for defaults in CLASS_DEFAULTS.values() for text in defaults.values()}
    has = frozenset(text for text in wanted if text in texts or (isinstance(words, dict) and text in words))
    pad = padding.get("pad_token") if isinstance(padding, dict) else None
    byte_level = '"ByteLevel"' in json.dumps(parsed.get("pre_tokenizer"))
    return _Known(pad if isinstance(pad, str) else None, byte_level, has)


def _class_defaults(directory: pathlib.Path, settings: dict[str, Any]) -> tuple[str, dict[str, str]]:
    """Returns the class that transformers gives the tokenizer, and its default tokens that the tokenizer has."""
    model, known = _object(directory, "config.json"), _known(directory)
    declared = (
        settings.get("tokenizer_class") or model.get("tokenizer_class") or CLASS_OF.get(str(model.get("model_type")))
    )
    name = str(declared or "").removesuffix("Fast")
    # A byte-level tokenizer under this name is one of Llama 3's kind, which transformers gives no defaults.
    if name == "LlamaTokenizer" and known.byte_level:
        return name, {}
    return name, {key: text for key, text in CLASS_DEFAULTS.get(name, {}).items() if text in known.defaults}
