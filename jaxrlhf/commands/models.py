"""Models on disk as the commands see them: a Hugging Face directory, or the folder of the run that made it."""

import pathlib
import shutil
from typing import Any, NamedTuple

import jax.numpy as jnp
import tokenizers

from jaxrlhf.base.types import Params
from jaxrlhf.data.chat import ChatTemplate, load_chat_template
from jaxrlhf.data.encode import ChatTokenizer, chat_tokenizer
from jaxrlhf.lm.hugging_face.families import Kind
from jaxrlhf.lm.hugging_face.files import read_json, write_json
from jaxrlhf.lm.hugging_face.weights import (
    SpecialIds,
    WeightsError,
    load_decoder,
    load_reward_model,
    load_tokenizer,
    save_decoder,
    save_reward_model,
    special_ids,
)
from jaxrlhf.lm.reward import reward_model
from jaxrlhf.lm.transformer.config import DecoderConfig
from jaxrlhf.lm.transformer.model import decoder

# Files of a tokenizer, which are copied unchanged.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


class TokenizerBundle(NamedTuple):
    """The tokenizer, special ids and chat template of a model directory.

    Attributes:
        directory: that they were read from.
        tokenizer: of the `tokenizers` library.
        special: ids of BOS, EOS and padding.
        template: None where there is none.
        size: of the model's vocabulary, None where its configuration has none.
        prepends_bos: whether texts begin with BOS, which the tokenizer's own settings may switch off.
    """

    directory: pathlib.Path
    tokenizer: tokenizers.Tokenizer
    special: SpecialIds
    template: ChatTemplate | None
    size: int | None
    prepends_bos: bool

    def chat_tokenizer(self) -> ChatTokenizer:
        """Returns the encoder that `jaxrlhf.data` uses."""
        eos = self.special.eos[0] if self.special.eos else None
        bos = self.special.bos if self.prepends_bos else None
        return chat_tokenizer(self.tokenizer, bos=bos, eos=eos, template=self.template, vocabulary_size=self.size)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end a completion; BOS too, as some models were trained with only BOS between texts."""
        bos = () if self.special.bos is None else (self.special.bos,)
        return tuple(sorted({*self.special.eos, *bos}))

    @property
    def pad_id(self) -> int:
        """The padding token; masks mark the real tokens, so any will do."""
        return 0 if self.special.pad is None else self.special.pad


class Model(NamedTuple):
    """A policy or a reward model with its tokenizer."""

    config: DecoderConfig
    params: Params
    bundle: TokenizerBundle


def find(path: pathlib.Path, kind: Kind) -> pathlib.Path:
    """Returns the model directory at a path: the path itself, or the `policy` or `reward` that a run saved in it.

    Raises:
        WeightsError: there is none.
    """
    for directory in (path, path / kind):
        # A run's folder also has a config.json, with the settings of the run.
        if (directory / "config.json").is_file() and "architectures" in read_json(directory, "config.json"):
            return directory
    raise WeightsError(
        f"{path} holds no {kind} model: give a Hugging Face directory, or the folder of a run that made a {kind}."
    )


def kind_of(directory: pathlib.Path) -> Kind:
    """Returns whether a model directory holds a policy or a reward model."""
    architectures = read_json(directory, "config.json").get("architectures") or []
    return "reward" if any(str(name).endswith("ForSequenceClassification") for name in architectures) else "policy"


def open_bundle(directory: pathlib.Path) -> TokenizerBundle:
    """Returns the tokenizer of a model directory."""
    name = "tokenizer_config.json"
    settings = read_json(directory, name) if (directory / name).is_file() else {}
    prepends_bos = settings.get("bos_token", "") is not None and settings.get("add_bos_token") is not False
    tokenizer, template = load_tokenizer(directory), load_chat_template(directory)
    size = read_json(directory, "config.json").get("vocab_size")
    return TokenizerBundle(directory, tokenizer, special_ids(directory), template, size, prepends_bos)


def open_model(path: str | pathlib.Path, kind: Kind, *, dtype: Any = jnp.float32) -> Model:
    """Returns the model at a path; see `find`."""
    directory = find(pathlib.Path(path), kind)
    config, params = (load_decoder if kind == "policy" else load_reward_model)(directory, dtype=dtype)
    return Model(config, params, open_bundle(directory))


def open_reward(path: pathlib.Path, *, dtype: Any = jnp.float32) -> Model:
    """Returns the reward model at a path, or one with a zero head on the trunk of the policy there.

    Where a run saved both, the reward model.
    """
    directory = path / "reward" if (path / "reward" / "config.json").is_file() else find(path, "policy")
    if kind_of(directory) == "reward":
        return open_model(directory, "reward", dtype=dtype)
    return reward_on(open_model(directory, "policy", dtype=dtype))


def reward_on(policy: Model) -> Model:
    """Returns a reward model with a zero head on a copy of a policy's trunk."""
    return policy._replace(params=reward_model(decoder(policy.config)).from_trunk(policy.params))


def save_model(directory: pathlib.Path, model: Model, kind: Kind) -> pathlib.Path:
    """Writes a directory that this library and transformers can read, tokenizer and template unchanged; returns it."""
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"{directory} is a file; name a directory to write the model to.")
    special = model.bundle.special
    if kind == "reward":
        special = special._replace(pad=_reward_pad(special))
    save = save_decoder if kind == "policy" else save_reward_model
    save(directory, model.config, model.params, special=special)
    for name in TOKENIZER_FILES:
        source = model.bundle.directory / name
        if source.is_file() and source.resolve() != (directory / name).resolve():
            shutil.copyfile(source, directory / name)
        elif not source.is_file():
            # A file left over from another model would be taken for this one's.
            (directory / name).unlink(missing_ok=True)
    if kind == "reward" and (directory / "tokenizer_config.json").is_file():
        settings = read_json(directory, "tokenizer_config.json")
        write_json(
            directory,
            "tokenizer_config.json",
            settings | {"pad_token": model.bundle.tokenizer.id_to_token(special.pad or 0)},
        )
    return directory


def _reward_pad(special: SpecialIds) -> int:
    """Returns a padding id for a reward model, by which transformers finds the last token of a text.

    It must not be a token that texts end with, or their last token would count as padding.
    """
    if special.pad is not None and special.pad not in special.eos:
        return special.pad
    if special.bos is not None and special.bos not in special.eos:
        return special.bos
    return next(token for token in range(len(special.eos) + 1) if token not in special.eos)
