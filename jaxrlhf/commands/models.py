"""Models on disk as the commands see them: a Hugging Face directory, or the folder of the run that made it."""

import contextlib
import dataclasses
import pathlib
import shutil
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import tokenizers

from jaxrlhf.base.types import Params
from jaxrlhf.commands.hub import cached_name, local_directory
from jaxrlhf.data.chat import ChatTemplate, load_chat_template
from jaxrlhf.data.encode import ChatTokenizer, chat_tokenizer, encode_prompt
from jaxrlhf.data.records import Message
from jaxrlhf.lm.hugging_face.adapters import is_adapter, open_adapter, save_adapter
from jaxrlhf.lm.hugging_face.families import Kind
from jaxrlhf.lm.hugging_face.files import read_json, vocabulary_size
from jaxrlhf.lm.hugging_face.generation import generation_settings, printed_settings
from jaxrlhf.lm.hugging_face.settings import kept_settings
from jaxrlhf.lm.hugging_face.special import SpecialIds, SpecialTokens, read_special_tokens
from jaxrlhf.lm.hugging_face.tokenizer_files import (
    Padding,
    first_difference,
    load_tokenizer,
    mark_ends,
    padding_for,
    vocabulary_with,
    write_padding,
)
from jaxrlhf.lm.hugging_face.weights import WeightsError, read_parameters, save_decoder, save_reward_model
from jaxrlhf.lm.reward import reward_model
from jaxrlhf.lm.transformer.config import DecoderConfig
from jaxrlhf.lm.transformer.model import decoder

# Files of a tokenizer, which are copied unchanged.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
MORE_TEMPLATES = "additional_chat_templates"


class TokenizerBundle(NamedTuple):
    """The tokenizer, special tokens and chat template of a model directory.

    Attributes:
        directory: that they were read from.
        tokenizer: of the `tokenizers` library.
        special: ids of BOS, EOS and padding.
        template: None where there is none.
        size: of the model's vocabulary, None where its configuration has none.
        prepends_bos: whether texts begin with BOS, which the tokenizer's own settings may switch off.
        found: where the special tokens came from, and what disagreed.
        inherits: whether models saved with it keep the directory's settings; not a new model with its tokenizer.
    """

    directory: pathlib.Path
    tokenizer: tokenizers.Tokenizer
    special: SpecialIds
    template: ChatTemplate | None
    size: int | None
    prepends_bos: bool
    found: SpecialTokens
    inherits: bool = True

    def chat_tokenizer(self) -> ChatTokenizer:
        """Returns the encoder that `jaxrlhf.data` uses."""
        known = (token for token in self.special.eos if self.tokenizer.id_to_token(token) is not None)
        return chat_tokenizer(
            self.tokenizer,
            bos=self.special.bos if self.prepends_bos else None,
            eos=next(known, None),
            template=self.template,
            vocabulary_size=self.size,
            stop_ids=self.stop_ids,
        )

    def for_vocabulary(self, size: int) -> "TokenizerBundle":
        """Returns the bundle for a new model, which may have fewer tokens than the model of the directory."""
        bos, eos, pad = self.special
        kept = tuple(token for token in eos if token < size)
        bos, pad = (None if token is None or token >= size else token for token in (bos, pad))
        sources = {
            kind: tuple(each for each in found if each.token < size) for kind, found in self.found.sources.items()
        }
        found = self.found._replace(sources=sources)
        return self._replace(special=SpecialIds(bos, kept, pad), size=size, found=found, inherits=False)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end a completion; BOS too, as some models were trained with only BOS between texts."""
        bos = () if self.special.bos is None else (self.special.bos,)
        return tuple(sorted({*self.special.eos, *bos}))

    @property
    def pad_id(self) -> int:
        """The padding token; masks mark the real tokens, so any will do."""
        return 0 if self.special.pad is None else self.special.pad

    def plan_rows(self) -> dict[str, str]:
        """Returns the rows of a plan that say what begins, ends and pads a text, and where each came from."""
        ends = [self._described(*found) for found in self.found.sources["eos"]]
        bos, pad = (", ".join(self._described(*found) for found in self.found.sources[kind]) for kind in ("bos", "pad"))
        if self.special.bos is not None and self.special.bos not in self.special.eos:
            ends.append(self._described(self.special.bos, "BOS of the next text"))
        begins = bos or "nothing" if self.prepends_bos else "nothing, as the tokenizer's settings say"
        if self.template is not None:
            begins += "; a conversation as its template writes it"
        rows = {
            "completions end": "\n".join(ends) or "nowhere: they have the full --max-new-tokens",
            "texts begin": begins,
            "padding": pad or "none named: masks mark the real tokens",
        }
        settings = printed_settings(self.directory) if self.inherits else {}
        if settings:
            listed = ", ".join(f"{name} {value}" for name, value in settings.items())
            rows["generation_config.json"] = f"{listed} (kept for exports, not used here)"
        return rows | ({"special tokens": "\n".join(self.found.notes)} if self.found.notes else {})

    def _described(self, token: int, source: str) -> str:
        text = self.tokenizer.id_to_token(token)
        return f"{'unnamed' if text is None else repr(text)} ({token}; {source})"


class Model(NamedTuple):
    """A policy or a reward model with its tokenizer.

    Attributes:
        config, params, bundle: of the model.
        notes: on its files, such as tensors that were not read.
        adapted: whether an adapter was merged into the model of the bundle's directory.
    """

    config: DecoderConfig
    params: Params
    bundle: TokenizerBundle
    notes: tuple[str, ...] = ()
    adapted: bool = False

    def remarks(self, name: str) -> list[str]:
        """Returns what is to be said of the files of a further model, by its name in the plan."""
        return [f"{name}: {note}" for note in (*self.notes, *self.bundle.found.notes)]

    def plan_rows(self) -> dict[str, str]:
        """Returns the rows of a plan on the model's files: special tokens, and tensors that were not read."""
        return self.bundle.plan_rows() | ({"weights": "\n".join(self.notes)} if self.notes else {})


def find(path: pathlib.Path, kind: Kind) -> pathlib.Path:
    """Returns the model directory at a path: the path itself, or the `policy` or `reward` that a run saved in it.

    A path that is not there may be a name on the hub (`hub.local_directory`).

    Raises:
        WeightsError: there is none.
        ValueError: it is a name, and the hub does not give the model.
    """
    path = local_directory(path)
    for directory in (path, path / kind):
        if is_adapter(directory):
            return directory
        # A run's folder also has a config.json, with the settings of the run.
        if (directory / "config.json").is_file() and "architectures" in read_json(directory, "config.json"):
            return directory
    raise WeightsError(
        f"{path} holds no {kind} model: give a Hugging Face directory, or the folder of a run that made a {kind}."
    )


def kind_of(directory: pathlib.Path) -> Kind:
    """Returns whether a model directory holds a policy or a reward model."""
    if is_adapter(directory):
        return open_adapter(directory, local_directory).kind
    architectures = read_json(directory, "config.json").get("architectures")
    names = architectures if isinstance(architectures, list) else []
    return "reward" if any(str(name).endswith("ForSequenceClassification") for name in names) else "policy"


def open_bundle(directory: pathlib.Path) -> TokenizerBundle:
    """Returns the tokenizer of a model directory; of an adapter, that of its base.

    Raises:
        WeightsError: an adapter brings a tokenizer with other tokens.
    """
    if is_adapter(directory):
        bundle = open_bundle(open_adapter(directory, local_directory).base)
        if (directory / "tokenizer.json").is_file():
            difference = first_difference(bundle.tokenizer, load_tokenizer(directory), bundle.size or 0)
            if difference is not None:
                raise WeightsError(
                    f"The adapter {directory} has another tokenizer than its base (the same id is {difference}): merge "
                    "it with PEFT, which makes the embeddings larger."
                )
        return bundle
    tokenizer, template = load_tokenizer(directory), load_chat_template(directory)
    found = read_special_tokens(directory, tokenizer, template)
    mark_ends(tokenizer, found.ids.eos)
    size = vocabulary_size(directory)
    return TokenizerBundle(directory, tokenizer, found.ids, template, size, found.prepends_bos, found)


def open_model(path: str | pathlib.Path, kind: Kind, *, dtype: Any = jnp.float32) -> Model:
    """Returns the model at a path; see `find`."""
    directory = find(pathlib.Path(path), kind)
    # First the tokenizer: its settings are read in a moment, weights are not.
    bundle = open_bundle(directory)
    config, params, notes = read_parameters(directory, kind, dtype, find_base=local_directory)
    return Model(config, params, bundle, notes, is_adapter(directory))


def open_reward(path: pathlib.Path, *, dtype: Any = jnp.float32) -> Model:
    """Returns the reward model at a path, or one with a zero head on the trunk of the policy there.

    Where a run saved both, the reward model.
    """
    path = local_directory(path)
    directory = path / "reward" if (path / "reward" / "config.json").is_file() else find(path, "policy")
    if kind_of(directory) == "reward":
        return open_model(directory, "reward", dtype=dtype)
    return reward_on(open_model(directory, "policy", dtype=dtype))


def reward_on(policy: Model) -> Model:
    """Returns a reward model with a zero head on a copy of a policy's trunk."""
    return policy._replace(params=reward_model(decoder(policy.config)).from_trunk(policy.params))


def save_model(directory: pathlib.Path, model: Model, kind: Kind) -> pathlib.Path:
    """Writes a directory that this library and transformers can read; returns it.

    Tokenizer, template and settings that are not read here are the source's, but for two things: the special ids are
    those of all the source's files together, and a reward model whose padding could stand in a text is given a padding
    token, for which its embeddings have further rows.
    """
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"{directory} is a file; name a directory to write the model to.")
    special, source = model.bundle.special, model.bundle.directory
    # Read first: the directory may be the source.
    generation = generation_settings(source) if model.bundle.inherits else {}
    further = kept_settings(read_json(source, "config.json"), model.config) if model.bundle.inherits else {}
    if kind == "policy":
        save_decoder(directory, model.config, model.params, special=special, generation=generation, further=further)
        _copy_tokenizer(source, directory)
        return directory
    padding = reward_padding(model.bundle)
    model = as_saved(model, kind)
    special = special._replace(pad=padding.token)
    save_reward_model(directory, model.config, model.params, special=special, further=further)
    _copy_tokenizer(source, directory)
    if (directory / "tokenizer.json").is_file():
        write_padding(directory, padding)
    return directory


def save_trained_adapter(
    directory: pathlib.Path,
    start: Model,
    trained: Params,
    kind: Kind,
    *,
    scaling: float = 1.0,
    dropout: float = 0.0,
) -> None:
    """Writes a trained adapter as a PEFT directory, `directory/adapter`.

    Not where the base is itself a model with an adapter merged, which no directory holds.

    Args:
        directory: of the merged model.
        start: the model that was adapted.
        trained: an adapter; of a reward model with its head.
        kind: of the model.
        scaling: alpha over the rank.
        dropout: with which it was trained.
    """
    if start.adapted:
        return
    adapter, head = (trained, None) if kind == "policy" else (trained["adapter"], np.asarray(trained["head"]))
    named = cached_name(start.bundle.directory)
    base = str(start.bundle.directory) if named is None else named.repository
    revision = None if named is None else named.revision
    save_adapter(
        directory / "adapter",
        start.config,
        adapter,
        base,
        revision=revision,
        head=head,
        scaling=scaling,
        dropout=dropout,
    )


def as_saved(model: Model, kind: Kind) -> Model:
    """Returns the model as `save_model` writes it: a reward model may get rows for its padding token."""
    return model if kind == "policy" else _with_row_for(reward_padding(model.bundle).token, model)


def reward_padding(bundle: TokenizerBundle) -> Padding:
    """Returns the padding of a reward model, by which transformers finds the last token of a text.

    No text may hold it, or transformers would read the reward elsewhere.
    """
    used = {*bundle.stop_ids}
    if bundle.template is not None:
        # A template may refuse this conversation.
        with contextlib.suppress(ValueError):
            used |= {*encode_prompt(bundle.chat_tokenizer(), (Message("user", "Hello"),)).tolist()}
    return padding_for(bundle.tokenizer, bundle.special.pad, used)


def check_tokens(policy: TokenizerBundle, reader: TokenizerBundle, name: str) -> None:
    """Raises ValueError unless a reward model reads the tokens that a policy writes."""
    size = min(policy.size or reader.size or 0, reader.size or policy.size or 0)
    difference = first_difference(policy.tokenizer, reader.tokenizer, size)
    if difference is not None:
        raise ValueError(
            f"{name} has another tokenizer than the policy (the same id is {difference}); take models of one tokenizer."
        )


def _with_row_for(token: int, model: Model) -> Model:
    size = model.config.vocabulary_size
    rows = vocabulary_with(token, size) - size if token >= size else 0
    if not rows:
        return model
    trunk = model.params["trunk"]
    embedding = np.pad(np.asarray(trunk["embedding"]), ((0, rows), (0, 0)))
    config = dataclasses.replace(model.config, vocabulary_size=size + rows)
    return model._replace(config=config, params=model.params | {"trunk": trunk | {"embedding": embedding}})


def _copy_tokenizer(source: pathlib.Path, directory: pathlib.Path) -> None:
    if source.resolve() == directory.resolve():
        return
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, directory / name)
        else:
            # A file left over from another model would be taken for this one's.
            (directory / name).unlink(missing_ok=True)
    shutil.rmtree(directory / MORE_TEMPLATES, ignore_errors=True)
    if (source / MORE_TEMPLATES).is_dir():
        shutil.copytree(source / MORE_TEMPLATES, directory / MORE_TEMPLATES)
