"""Copies of a model for elsewhere: `jaxrlhf export`."""

import dataclasses
import pathlib
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from jaxrlhf.commands.models import find, open_model, save_model
from jaxrlhf.training.progress import bytes_text


@dataclasses.dataclass(frozen=True)
class Export:
    """Writes a Hugging Face directory of a run's policy or reward model, and reads it back to compare."""

    source: pathlib.Path
    """A run's folder, or a Hugging Face directory."""
    to: pathlib.Path
    """The directory to make."""
    kind: Literal["policy", "reward"] = "policy"
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the tensors written."""


def main(config: Export) -> pathlib.Path:
    """Runs it; returns the directory.

    Raises:
        ValueError: the model cannot be read, the directory is that of the source, or what was written reads otherwise.
    """
    source = find(config.source, config.kind)
    if config.to.exists() and config.to.resolve() == source.resolve():
        raise ValueError(f"{config.to} is the source itself; give another directory.")
    dtype = jnp.dtype(config.dtype)
    model = open_model(source, config.kind, dtype=dtype)
    save_model(config.to, model, config.kind)
    again = open_model(config.to, config.kind, dtype=dtype)
    same = jax.tree.map(
        lambda one, other: bool(np.all(np.asarray(one) == np.asarray(other))), model.params, again.params
    )
    words = (again.words.template, again.words.tokenizer.to_str()) == (
        model.words.template,
        model.words.tokenizer.to_str(),
    )
    if again.config != model.config or not all(jax.tree.leaves(same)) or not words:
        raise ValueError(f"What was written to {config.to} reads otherwise than {source}; is the disk full?")
    size = sum(leaf.size * jnp.dtype(dtype).itemsize for leaf in jax.tree.leaves(model.params))
    Console().print(f"A {config.kind} of {bytes_text(size)} in {config.dtype}, read back and found equal, is in:")
    Console().print(str(config.to), soft_wrap=True, markup=False, highlight=False)
    return config.to
