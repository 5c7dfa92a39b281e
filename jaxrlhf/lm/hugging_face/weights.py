"""Decoders, reward models and tokenizers from and to Hugging Face directories of the families in `lm.families`.

Weights are read from and written to safetensors only: a pickle could run any code when it is read.
"""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers

from jaxrlhf.lm.hugging_face.families import Kind, config_from
from jaxrlhf.lm.hugging_face.files import WeightsError, in_one_piece, read_json, read_tensors, write_json, write_tensors
from jaxrlhf.lm.hugging_face.settings import settings_from
from jaxrlhf.lm.hugging_face.tensors import params_from, tensor_shapes, tensors_from
from jaxrlhf.lm.transformer.config import DecoderConfig
from jaxrlhf.lm.transformer.model import decoder


class SpecialIds(NamedTuple):
    """Token ids with a meaning.

    Attributes:
        bos: begins a text, or None.
        eos: any of these ends a completion; may be empty.
        pad: fills rows, or None.
    """

    bos: int | None = None
    eos: tuple[int, ...] = ()
    pad: int | None = None


def load_decoder(directory: str | Path, *, dtype: Any = jnp.float32) -> tuple[DecoderConfig, dict]:
    """A language model from `config.json` and safetensors, sharded or not.

    Args:
        directory: a Hugging Face model directory.
        dtype: of the parameters, whatever the file's.

    Returns:
        The configuration and the parameters, for `decoder(config)`; the arrays lie on JAX's default device
        (`jax.default_device` chooses another).

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
    """Writes a directory that `load_decoder` and transformers' `AutoModelForCausalLM` read.

    Args:
        directory: made if it does not exist; files of the same names are replaced.
        config: the decoder's shape.
        params: its parameters; they are stored in their own dtype.
        special: special token ids, for `config.json` and `generation_config.json`.
        tokenizer: written to `tokenizer.json`.

    Raises:
        WeightsError: the parameters do not belong to the configuration, or its family cannot hold it.
    """
    check_params(config, params, decoder(config).init)
    write_model(Path(directory), config, tensors_from(params, config, "policy"), "policy", special, tokenizer)


def load_reward_model(directory: str | Path, *, dtype: Any = jnp.float32) -> tuple[DecoderConfig, dict]:
    """A sequence classifier with one label, as `reward_model(decoder(config))` reads it.

    Args:
        directory: a Hugging Face model directory.
        dtype: of the parameters, whatever the file's.

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
    """Writes a directory that `load_reward_model` and transformers' `AutoModelForSequenceClassification` read.

    Transformers finds the last token by comparing with the pad id: without `special.pad` it scores one row at a
    time only, and a pad id that also occurs in texts misleads it.

    Args:
        directory: made if it does not exist; files of the same names are replaced.
        config: the trunk's shape.
        params: `{"trunk": ..., "head": [D]}`; stored in their own dtype.
        special: special token ids.
        tokenizer: written to `tokenizer.json`.

    Raises:
        WeightsError: the parameters do not belong to the configuration.
    """

    def init(key):
        trunk = decoder(config).init(key)
        trunk.pop("output_head", None)
        return {"trunk": trunk, "head": jnp.zeros(config.width)}

    check_params(config, params, init)
    tensors = tensors_from(params["trunk"] | {"head": params["head"]}, config, "reward")
    write_model(Path(directory), config, tensors, "reward", special, tokenizer)


def load_tokenizer(directory: str | Path) -> tokenizers.Tokenizer:
    """The tokenizer of a model directory; it neither cuts nor fills texts, whatever it was saved with.

    Args:
        directory: holds `tokenizer.json` and the `config.json` of the model it belongs to.

    Returns:
        The tokenizer.

    Raises:
        WeightsError: either file is missing or damaged, or the tokenizer knows more words than the model.
    """
    size = read_json(directory, "config.json").get("vocab_size")
    read_json(directory, "tokenizer.json")
    path = Path(directory) / "tokenizer.json"
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise WeightsError(f"{path} is not a tokenizer ({error}): copy or save it again.") from error
    # What it was saved with would cut and fill texts in silence.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    # Some models have special tokens beyond their vocabulary, for pictures say, which no text may use.
    special = {token for token, added in tokenizer.get_added_tokens_decoder().items() if added.special}
    largest = max({*tokenizer.get_vocab(with_added_tokens=True).values()} - special, default=0)
    if isinstance(size, int) and largest >= size:
        raise WeightsError(
            f"{path} has token ids up to {largest} but the model's vocabulary ends at {size - 1}: use the "
            "tokenizer that the model was trained with."
        )
    return tokenizer


def special_ids(directory: str | Path) -> SpecialIds:
    """Special token ids of a model directory: `generation_config.json` where it names them, else `config.json`.

    Args:
        directory: a Hugging Face model directory.

    Returns:
        The ids; a negative id counts as none.

    Raises:
        WeightsError: a file is damaged or an id is not a number.
    """
    named = read_json(directory, "config.json")
    if (Path(directory) / "generation_config.json").is_file():
        generation = read_json(directory, "generation_config.json")
        named = named | {name: value for name, value in generation.items() if value is not None}

    def ids(name: str) -> tuple[int, ...]:
        value = named.get(name)
        values = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(one, int) and not isinstance(one, bool) for one in values):
            raise WeightsError(f"{name} in {directory} is {value!r}: make it a token id or a list of them.")
        return tuple(one for one in values if one >= 0)

    first = {name: next(iter(ids(f"{name}_token_id")), None) for name in ("bos", "pad")}
    return SpecialIds(first["bos"], ids("eos_token_id"), first["pad"])


def read_model(directory: str | Path, kind: Kind) -> tuple[DecoderConfig, dict[str, np.ndarray]]:
    """Configuration and checked tensors of a model directory."""
    settings = read_json(directory, "config.json")
    config = config_from(settings, kind, str(Path(directory) / "config.json"))
    # Some checkpoints of the bare decoder leave out the name of the module around it.
    return config, read_tensors(directory, tensor_shapes(config, kind), optional_prefix="transformer.")


def write_model(directory, config, tensors, kind: Kind, special, tokenizer) -> None:
    """Writes the files of a model directory, the weights first: without a config nobody loads half a model."""
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
        # Another model's would be believed.
        (directory / "generation_config.json").unlink(missing_ok=True)
    if tokenizer is not None:
        in_one_piece(directory / "tokenizer.json", lambda path: tokenizer.save(str(path)))


def on_device(params: dict, dtype: Any) -> dict:
    """Arrays of the given dtype on JAX's default device."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), params)


def check_params(config: DecoderConfig, params: Any, init) -> None:
    """Raises WeightsError unless `params` has the structure and shapes of `init(key)`."""

    def shapes(tree):
        return {jax.tree_util.keystr(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}

    wanted, given = shapes(jax.eval_shape(init, jax.random.key(0))), shapes(params)
    for name in sorted(wanted.keys() | given.keys()):
        if wanted.get(name) != given.get(name):
            raise WeightsError(
                f"Parameter {name} has shape {given.get(name)} where {config} asks for {wanted.get(name)}: save "
                "parameters with the configuration they were made for."
            )
