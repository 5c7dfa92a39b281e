"""Exports a model as a Hugging Face directory: `jaxrlhf export`."""

import dataclasses
import pathlib
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from jaxrlhf.commands.model_card import write_exported_card
from jaxrlhf.commands.models import Model, find, open_model, save_model
from jaxrlhf.commands.options import Groups
from jaxrlhf.lm.hugging_face.tokenizer_files import tokens_of
from jaxrlhf.training.progress import bytes_text, print_table


@dataclasses.dataclass(frozen=True)
class Export:
    """Exports a policy or reward model as a Hugging Face directory, and verifies it by reading it back."""

    GROUPS: ClassVar[Groups] = {"main settings": ("source", "to", "kind", "dtype")}

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
    print_table(Console(), "Export", {"model": f"{model.config.family}, {source}"} | model.plan_rows())
    save_model(config.to, model, config.kind)
    again = open_model(config.to, config.kind, dtype=dtype)
    if not _same(model, again):
        raise ValueError(f"What was written to {config.to} reads otherwise than {source}; is the disk full?")
    write_exported_card(config.to, source, config.source, config.kind, config.dtype)
    size = sum(leaf.size * jnp.dtype(dtype).itemsize for leaf in jax.tree.leaves(model.params))
    Console().print(f"A {config.kind} of {bytes_text(size)} in {config.dtype}, read back and verified, is in:")
    Console().print(str(config.to), soft_wrap=True, markup=False, highlight=False)
    return config.to


def _same(model: Model, again: Model) -> bool:
    """Returns whether the exported model reads as its source; a reward's padding may have rows and a token of its own."""
    rows, size = model.config.vocabulary_size, again.config.vocabulary_size
    tokens = [{**tokens_of(each.bundle.tokenizer)} for each in (model, again)]
    padding = again.bundle.special.pad
    if padding is not None and padding not in tokens[0]:
        tokens[1].pop(padding, None)

    def equal(ours, theirs):
        ours, theirs = np.asarray(ours), np.asarray(theirs)
        return ours.dtype == theirs.dtype and np.array_equal(ours, theirs[: len(ours)] if rows != size else theirs)

    return (
        dataclasses.replace(again.config, vocabulary_size=rows) == model.config
        and all(jax.tree.leaves(jax.tree.map(equal, model.params, again.params)))
        and tokens[0] == tokens[1]
        and again.bundle.template == model.bundle.template
        and again.bundle.stop_ids == model.bundle.stop_ids
        and again.bundle.special[:2] == model.bundle.special[:2]
    )
