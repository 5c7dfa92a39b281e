"""Loads and saves decoders, reward models and tokenizers as Hugging Face directories (`families` lists which).

Weights are read from and written to safetensors only: reading a pickle can run any code.
"""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers

from jaxrlhf.lm.hugging_face.families import Kind, config_from
from jaxrlhf.lm.hugging_face.files import (
    WeightsError,
    read_json,
    read_tensors,
    write_atomically,
    write_json,
    write_tensors,
)
from jaxrlhf.lm.hugging_face.settings import settings_from
from jaxrlhf.lm.hugging_face.tensors import params_from, tensor_shapes, tensors_from
from jaxrlhf.lm.transformer.config import DecoderConfig
from jaxrlhf.lm.transformer.model import decoder


class SpecialIds(NamedTuple):
    """Special token ids.

    Attributes:
        bos: at the beginning of a text, or None.
        eos: any of these ends a completion; may be empty.
        pad: padding, or None.
    """

    bos: int | None = None
    eos: tuple[int, ...] = ()
    pad: int | None = None


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
    config, tensors = read_model(directory, "policy")
    return config, on_device(params_from(tensors, config, "policy"), dtype)


def save_decoder(
    directory: str | Path,
    config: DecoderConfig,
    params: dict,
    *,
    special: SpecialIds | None = None,
    tokenizer: tokenizers.Tokenizer | None = None,
) -> None:
    """Writes a directory for `load_decoder` and transformers' `AutoModelForCausalLM`.

    Args:
        directory: created if it does not exist; files of the same names are replaced.
        config: the decoder's configuration.
        params: its parameters; they are stored in their own dtype.
        special: special token ids, for `config.json` and `generation_config.json`.
        tokenizer: written to `tokenizer.json`.

    Raises:
        WeightsError: the parameters do not match the configuration, or its family cannot describe it.
    """
    check_params(config, params, decoder(config).init)
    write_model(Path(directory), config, tensors_from(params, config, "policy"), "policy", special, tokenizer)


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
    config, tensors = read_model(directory, "reward")
    trunk = params_from(tensors, config, "reward")
    head = trunk.pop("head")
    return config, on_device({"trunk": trunk, "head": head}, dtype)


def save_reward_model(
    directory: str | Path,
    config: DecoderConfig,
    params: dict,
    *,
    special: SpecialIds | None = None,
    tokenizer: tokenizers.Tokenizer | None = None,
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

    Raises:
        WeightsError: the parameters do not match the configuration.
    """

    def init(key):
        trunk = decoder(config).init(key)
        trunk.pop("output_head", None)
        return {"trunk": trunk, "head": jnp.zeros(config.width)}

    check_params(config, params, init)
    tensors = tensors_from(params["trunk"] | {"head": params["head"]}, config, "reward")
    write_model(Path(directory), config, tensors, "reward", special, tokenizer)


def load_tokenizer(directory: str | Path) -> tokenizers.Tokenizer:
    """Returns the tokenizer of a model directory, with truncation and padding switched off.

    Args:
        directory: holds `tokenizer.json` and the `config.json` of the model it belongs to.

    Returns:
        The tokenizer.

    Raises:
        WeightsError: either file is missing or damaged, or the tokenizer has ids outside the model's vocabulary.
    """
    size = read_json(directory, "config.json").get("vocab_size")
    read_json(directory, "tokenizer.json")
    path = Path(directory) / "tokenizer.json"
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise WeightsError(f"{path} is not a tokenizer ({error}): copy or save it again.") from error
    # Settings that it was saved with would silently truncate and pad texts.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    # Some models have special tokens beyond their vocabulary, for images say, that never occur in text.
    special = {token for token, added in tokenizer.get_added_tokens_decoder().items() if added.special}
    largest = max({*tokenizer.get_vocab(with_added_tokens=True).values()} - special, default=0)
    if isinstance(size, int) and largest >= size:
        raise WeightsError(
            f"{path} has token ids up to {largest} but the model's vocabulary ends at {size - 1}: use the "
            "tokenizer that the model was trained with."
        )
    return tokenizer


def special_ids(directory: str | Path) -> SpecialIds:
    """Returns the special token ids of a model directory: of `generation_config.json` where present, else `config.json`.

    Args:
        directory: a Hugging Face model directory.

    Returns:
        The ids; negative ids are ignored.

    Raises:
        WeightsError: a file is damaged or an id is not a number.
    """
    settings = read_json(directory, "config.json")
    if (Path(directory) / "generation_config.json").is_file():
        generation = read_json(directory, "generation_config.json")
        settings = settings | {name: value for name, value in generation.items() if value is not None}

    def ids(name: str) -> tuple[int, ...]:
        value = settings.get(name)
        values = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(token, int) and not isinstance(token, bool) for token in values):
            raise WeightsError(f"{name} in {directory} is {value!r}: make it a token id or a list of them.")
        return tuple(token for token in values if token >= 0)

    first = {name: next(iter(ids(f"{name}_token_id")), None) for name in ("bos", "pad")}
    return SpecialIds(first["bos"], ids("eos_token_id"), first["pad"])


def read_model(directory: str | Path, kind: Kind) -> tuple[DecoderConfig, dict[str, np.ndarray]]:
    """Returns configuration and checked tensors of a model directory."""
    settings = read_json(directory, "config.json")
    config = config_from(settings, kind, str(Path(directory) / "config.json"))
    # Some checkpoints were saved from the inner module, without its name as prefix.
    return config, read_tensors(directory, tensor_shapes(config, kind), optional_prefix="transformer.")


def write_model(directory, config, tensors, kind: Kind, special, tokenizer) -> None:
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
    write_json(directory, "config.json", settings | ids)
    if kind == "policy":
        write_json(directory, "generation_config.json", ids)
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
