"""Loads and saves decoders, reward models and tokenizers as Hugging Face directories (`families` lists which).

Weights are read from and written to safetensors only: reading a pickle can run any code.
"""

import dataclasses
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers

from jaxrlhf.lm.hugging_face.adapters import (
    Adapter,
    FindBase,
    as_it_is,
    check_adapter,
    is_adapter,
    merge_adapter,
    open_adapter,
)
from jaxrlhf.lm.hugging_face.families import Kind, as_reward, config_from
from jaxrlhf.lm.hugging_face.files import (
    HEAD,
    WeightsError,
    equal_tensors,
    read_json,
    read_tensors,
    write_atomically,
    write_json,
    write_tensors,
)
from jaxrlhf.lm.hugging_face.settings import settings_from
from jaxrlhf.lm.hugging_face.special import SpecialIds, special_ids
from jaxrlhf.lm.hugging_face.tensors import params_from, tensor_shapes, tensors_from
from jaxrlhf.lm.hugging_face.tokenizer_files import load_tokenizer
from jaxrlhf.lm.transformer.config import DecoderConfig
from jaxrlhf.lm.transformer.model import decoder

HEAD_OF_REWARD = "score.weight"

__all__ = [
    "Loaded",
    "SpecialIds",
    "WeightsError",
    "load_decoder",
    "load_reward_model",
    "load_tokenizer",
    "read_parameters",
    "save_decoder",
    "save_reward_model",
    "special_ids",
]


def load_decoder(directory: str | Path, *, dtype: Any = jnp.float32) -> tuple[DecoderConfig, dict]:
    """Returns a language model from `config.json` and safetensors, sharded or not.

    Args:
        directory: a Hugging Face model directory.
        dtype: of the parameters, which are converted from the file's.

    Returns:
        The configuration and the parameters, for `decoder(config)`; the arrays are on JAX's default device
        (see `jax.default_device`).

    Raises:
        WeightsError: the directory cannot be read as such a model.
    """
    return _with_warnings(read_parameters(directory, "policy", dtype))


def save_decoder(
    directory: str | Path,
    config: DecoderConfig,
    params: dict,
    *,
    special: SpecialIds | None = None,
    tokenizer: tokenizers.Tokenizer | None = None,
    generation: dict[str, Any] | None = None,
    further: dict[str, Any] | None = None,
) -> None:
    """Writes a directory for `load_decoder` and transformers' `AutoModelForCausalLM`.

    Args:
        directory: created if it does not exist; files of the same names are replaced.
        config: the decoder's configuration.
        params: its parameters; they are stored in their own dtype.
        special: special token ids, for `config.json` and `generation_config.json`.
        tokenizer: written to `tokenizer.json`.
        generation: further settings for `generation_config.json`, such as a temperature.
        further: settings for `config.json` that do not describe the decoder (`kept_settings`).

    Raises:
        WeightsError: the parameters do not match the configuration, or its family cannot describe it.
    """
    check_params(config, params, decoder(config).init)
    tensors = tensors_from(params, config, "policy")
    write_model(Path(directory), config, tensors, "policy", special, tokenizer, generation, further)


def load_reward_model(directory: str | Path, *, dtype: Any = jnp.float32) -> tuple[DecoderConfig, dict]:
    """Returns a sequence classifier with one label, for `reward_model(decoder(config))`.

    Args:
        directory: a Hugging Face model directory.
        dtype: of the parameters, which are converted from the file's.

    Returns:
        The trunk's configuration and `{"trunk": ..., "head": [D]}`.

    Raises:
        WeightsError: the directory cannot be read as such a model.
    """
    return _with_warnings(read_parameters(directory, "reward", dtype))


def save_reward_model(
    directory: str | Path,
    config: DecoderConfig,
    params: dict,
    *,
    special: SpecialIds | None = None,
    tokenizer: tokenizers.Tokenizer | None = None,
    further: dict[str, Any] | None = None,
) -> None:
    """Writes a directory for `load_reward_model` and transformers' `AutoModelForSequenceClassification`.

    Transformers finds the last token by comparing with the pad id: without `special.pad` it can score only one row at a
    time, and a pad id that also occurs in texts gives wrong scores.

    Args:
        directory: created if it does not exist; files of the same names are replaced.
        config: the trunk's configuration.
        params: `{"trunk": ..., "head": [D]}`; stored in their own dtype.
        special: special token ids.
        tokenizer: written to `tokenizer.json`.
        further: as in `save_decoder`.

    Raises:
        WeightsError: the parameters do not match the configuration.
    """

    def init(key):
        trunk = decoder(config).init(key)
        trunk.pop("output_head", None)
        return {"trunk": trunk, "head": jnp.zeros(config.width)}

    check_params(config, params, init)
    tensors = tensors_from(params["trunk"] | {"head": params["head"]}, config, "reward")
    write_model(Path(directory), config, tensors, "reward", special, tokenizer, None, further)


class Loaded(NamedTuple):
    """A model on the default device, and a sentence for each thing in its files that was not read as its config says."""

    config: DecoderConfig
    params: dict
    notes: tuple[str, ...]


def read_parameters(
    directory: str | Path, kind: Kind, dtype: Any = jnp.float32, *, find_base: FindBase = as_it_is
) -> Loaded:
    """Returns a policy's or a reward model's configuration, parameters and notes.

    The directory may be that of an adapter in PEFT's format, which is merged into its base (`find_base`: of
    `open_adapter`).

    Raises:
        WeightsError: the directory cannot be read as such a model.
    """
    adapter = open_adapter(Path(directory), find_base) if is_adapter(Path(directory)) else None
    config, tensors, notes = read_model(directory, kind) if adapter is None else read_adapted(adapter, kind)
    params = params_from(tensors, config, kind)
    if kind == "reward":
        head = params.pop("head")
        params = {"trunk": params, "head": head}
    return Loaded(config, on_device(params, dtype), notes)


def read_adapted(adapter: Adapter, kind: Kind) -> tuple[DecoderConfig, dict[str, np.ndarray], tuple[str, ...]]:
    """Returns configuration and tensors of an adapter's base, with the adapter merged, and notes.

    Raises:
        WeightsError: the adapter is for the other kind, or does not fit its base.
    """
    if adapter.kind != kind:
        raise WeightsError(f"{adapter.directory} is an adapter of a {adapter.kind} model: a {kind} is wanted here.")
    settings = read_json(adapter.base, "config.json")
    own = HEAD_OF_REWARD if kind == "reward" and HEAD_OF_REWARD in adapter.replaced else None
    if own is not None:
        # A classifier's adapter brings the head of its own: its base is mostly a language model.
        settings = as_reward(settings, str(adapter.base / "config.json"))
    config = config_from(settings, kind, str(adapter.base / "config.json"))
    check_adapter(adapter, tensor_shapes(config, kind), config.family)
    config, tensors, notes = read_model(adapter.base, kind, settings, without=() if own is None else (own,))
    return config, merge_adapter(adapter, tensors, config.family), (adapter.note(), *notes)


def read_model(
    directory: str | Path, kind: Kind, settings: dict[str, Any] | None = None, *, without: tuple[str, ...] = ()
) -> tuple[DecoderConfig, dict[str, np.ndarray], tuple[str, ...]]:
    """Returns configuration and checked tensors of a model directory, and notes of what was not read.

    An output head of its own counts before `tie_word_embeddings`, as in transformers 5.

    Args:
        directory: of the model.
        kind: of the model.
        settings: in place of those of its `config.json`.
        without: names of tensors that are left out.
    """
    settings = read_json(directory, "config.json") if settings is None else settings
    config = config_from(settings, kind, str(Path(directory) / "config.json"))
    shapes = {name: shape for name, shape in tensor_shapes(config, kind).items() if name not in without}
    tied = kind == "policy" and config.tied_embeddings
    stored = read_tensors(
        directory,
        shapes,
        optional=(HEAD,) if tied else (),
        # Some checkpoints were saved from the inner module, without its name as prefix.
        optional_prefix="transformer.",
        aliases={next(iter(shapes)): HEAD} if tied else {},
    )
    tensors, notes = stored.tensors, []
    embedding, head = next(iter(tensors.values())), tensors.pop(HEAD, None) if tied else None
    if head is not None and not equal_tensors(head, embedding):
        config = dataclasses.replace(config, tied_embeddings=False)
        if head.shape != embedding.shape:
            raise WeightsError(
                f"{HEAD} in {directory} has shape {head.shape} where config.json ties it to embeddings of shape "
                f"{embedding.shape}: save model and config together."
            )
        tensors[HEAD] = head
        notes.append(
            f"config.json ties the output head to the embeddings, but the file holds a head of its own ({HEAD}); the "
            "head is used."
        )
    return config, tensors, (*notes, *stored.notes)


def _with_warnings(loaded: Loaded) -> tuple[DecoderConfig, dict]:
    for note in loaded.notes:
        warnings.warn(note, UserWarning, stacklevel=3)
    return loaded.config, loaded.params


def write_model(directory, config, tensors, kind: Kind, special, tokenizer, generation=None, further=None) -> None:
    """Writes the files of a model directory, weights first: without a config, a half-written model is not loaded."""
    dtype = next(iter(tensors.values())).dtype.name
    settings = settings_from(config, kind, dtype)
    directory.mkdir(parents=True, exist_ok=True)
    write_tensors(directory, tensors)
    bos, eos, pad = special or SpecialIds()
    ids = {
        "bos_token_id": bos,
        "eos_token_id": eos[0] if len(eos) == 1 else list(eos) or None,
        "pad_token_id": pad,
    }
    write_json(directory, "config.json", (further or {}) | settings | ids)
    if kind == "policy":
        write_json(directory, "generation_config.json", (generation or {}) | ids)
    else:
        # A leftover file of another model would be read.
        (directory / "generation_config.json").unlink(missing_ok=True)
    if tokenizer is not None:
        write_atomically(directory / "tokenizer.json", lambda path: tokenizer.save(str(path)))


def on_device(params: dict, dtype: Any) -> dict:
    """Returns arrays of the given dtype on JAX's default device."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), params)


def check_params(config: DecoderConfig, params: Any, init) -> None:
    """Raises WeightsError unless `params` has the structure and shapes of `init(key)`."""

    def shapes(tree):
        return {jax.tree_util.keystr(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}

    expected, found = shapes(jax.eval_shape(init, jax.random.key(0))), shapes(params)
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise WeightsError(
                f"Parameter {name} has shape {found.get(name)} where {config} asks for {expected.get(name)}: save "
                "parameters with the configuration they were made for."
            )
