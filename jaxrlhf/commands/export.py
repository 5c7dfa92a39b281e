"""Exports a model as a Hugging Face directory: `jaxrlhf export`."""

import dataclasses
import pathlib
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from jaxrlhf.commands.models import TokenizerBundle, find, open_model, save_model
from jaxrlhf.training.progress import bytes_text


@dataclasses.dataclass(frozen=True)
class Export:
    """Exports a policy or reward model as a Hugging Face directory, and verifies it by reading it back."""

    source: pathlib.Path
    """The run's folder, or a Hugging Face directory."""
    to: pathlib.Path
    """Directory to write."""
    kind: Literal["policy", "reward"] = "policy"
    """Which model of the run to export."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type of the exported tensors."""


def main(config: Export) -> pathlib.Path:
    """Exports the model; returns the directory.

    Raises:
        ValueError: the model cannot be read, the directory is the source, or the exported model reads back differently.
    """
    source = find(config.source, config.kind)
    if config.to.exists() and config.to.resolve() == source.resolve():
        raise ValueError(f"{config.to} is the source itself; give another directory.")
    dtype = jnp.dtype(config.dtype)
    model = open_model(source, config.kind, dtype=dtype)
    save_model(config.to, model, config.kind)
    again = open_model(config.to, config.kind, dtype=dtype)
    equal = jax.tree.map(lambda a, b: bool(np.all(np.asarray(a) == np.asarray(b))), model.params, again.params)
    same_tokenizer = _tokenizer_of(again.bundle) == _tokenizer_of(model.bundle)
    if again.config != model.config or not all(jax.tree.leaves(equal)) or not same_tokenizer:
        raise ValueError(f"What was written to {config.to} reads otherwise than {source}; is the disk full?")
    size = sum(leaf.size * jnp.dtype(dtype).itemsize for leaf in jax.tree.leaves(model.params))
    Console().print(f"A {config.kind} of {bytes_text(size)} in {config.dtype}, read back and verified, is in:")
    Console().print(str(config.to), soft_wrap=True, markup=False, highlight=False)
    return config.to


def _tokenizer_of(bundle: TokenizerBundle) -> tuple:
    return bundle.template, bundle.tokenizer.to_str()
