"""What `benchmarks.gpu` measures: the settings, the rows of its tables, and the sizes of each."""

import dataclasses
import pathlib
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np

from benchmarks.batches import random_tokens
from benchmarks.plan import decoder_config
from jaxrlhf.lm.transformer.config import DecoderConfig
from jaxrlhf.lm.transformer.trunk import Attention

Library = Literal["ours", "transformers", "Tunix"]
Workload = Literal["supervised", "reward", "bilevel", "decode"]
ModelName = Literal["llama-1b", "llama-8b"]


@dataclasses.dataclass(frozen=True)
class Config:
    """What to measure."""

    seconds: float = 480.0
    """Time limit of the whole benchmark."""
    models: tuple[ModelName, ...] = ("llama-1b", "llama-8b")
    libraries: tuple[Library, ...] = ("ours", "transformers", "Tunix")
    workloads: tuple[Workload, ...] = ("supervised", "reward", "bilevel", "decode")
    rows: int = 64
    """Rows decoded at once."""
    rounds: int = 5
    attention: Attention = "xla"
    """What computes our attention of whole rows; rows in float32 are always by plain products."""
    tiny: bool = False
    """Use tiny models and batches, to test the benchmark itself."""
    output: pathlib.Path = pathlib.Path("runs")


class Row(NamedTuple):
    """A row of a table.

    Attributes:
        model: its name.
        rank: of its adapters; 0 trains all weights.
        workload: what is run.
        dtype: of the matrix products.
    """

    model: ModelName
    rank: int
    workload: Workload
    dtype: Any = jnp.bfloat16

    @property
    def label(self) -> str:
        """The model with its adapters and dtype."""
        adapters = f", rank {self.rank}" if self.rank else ""
        dtype = "" if self.dtype == jnp.bfloat16 else f", {jnp.dtype(self.dtype).name}"
        return self.model + adapters + dtype


ROWS = (
    Row("llama-1b", 0, "supervised"),
    Row("llama-1b", 0, "reward"),
    Row("llama-1b", 16, "bilevel"),
    Row("llama-1b", 0, "decode"),
    Row("llama-8b", 16, "supervised"),
    Row("llama-8b", 16, "bilevel"),
    Row("llama-8b", 0, "decode"),
    Row("llama-8b", 16, "reward"),
    Row("llama-8b", 16, "bilevel", jnp.float32),  # the dtype that `align` computes in
    Row("llama-1b", 0, "bilevel"),  # with gradients at least 14 copies of the weights, 69 GB
)
"""Most important first. The other libraries run the rows without adapters, which need no further packages."""


class Sizes(NamedTuple):
    """Batch sizes.

    Attributes:
        texts, length: of supervised and reward steps; tokens per text.
        prompts, pairs: of bilevel steps; pairs per prompt.
        rows: decoded at once.
        prompt, completion: tokens of each, in bilevel steps and in decoding.
    """

    texts: int
    length: int
    prompts: int
    pairs: int
    rows: int
    prompt: int
    completion: int


TINY = Sizes(texts=4, length=32, prompts=2, pairs=2, rows=4, prompt=8, completion=16)


class Case(NamedTuple):
    """A row with the model's configuration, the batch sizes, the number of timed calls, and our attention's kernel."""

    row: Row
    model: DecoderConfig
    sizes: Sizes
    rounds: int
    attention: Attention = "xla"

    @property
    def batch(self) -> str:
        """A description of the batch."""
        sizes = self.sizes
        if self.row.workload == "decode":
            return f"{sizes.rows} rows, {sizes.prompt} + {sizes.completion} tokens"
        if self.row.workload == "bilevel":
            return f"{sizes.prompts} prompts x {sizes.pairs} pairs, {sizes.prompt} + {sizes.completion} tokens"
        return f"{sizes.texts} x {sizes.length} tokens"

    @property
    def tokens(self) -> int:
        """Tokens per training step, or generated per decoding step; in a bilevel step those of both texts of each pair."""
        sizes = self.sizes
        if self.row.workload == "decode":
            return sizes.rows
        if self.row.workload == "bilevel":
            return 2 * sizes.prompts * sizes.pairs * (sizes.prompt + sizes.completion)
        return sizes.texts * sizes.length


def case_of(config: Config, row: Row) -> Case:
    """Returns the case of a row."""
    attention = "xla" if row.dtype == jnp.float32 else config.attention
    if config.tiny:
        return Case(row, tiny_model(row.model), TINY, config.rounds, attention)
    # The adapters' products are float32, so fewer texts fit with them.
    sizes = Sizes(4 if row.rank else 16, 1024, 4, 4, config.rows, 128, 256)
    return Case(row, decoder_config(row.model, context_length=2048), sizes, config.rounds, attention)


def tiny_model(name: ModelName, layers: int = 2) -> DecoderConfig:
    """Returns a configuration of width 64 with tied embeddings where the named model has them."""
    tied = decoder_config(name, context_length=2048).tied_embeddings
    return DecoderConfig(512, 64, layers, 4, 2, 16, 128, tied_embeddings=tied, context_length=64, rope_base=500_000.0)


def decoding_prompts(case: Case) -> np.ndarray:
    """Returns prompts `[N, P]` with the same first token, as Tunix prepends BOS to rows that begin with another."""
    prompts = random_tokens(case.model, case.sizes.rows, case.sizes.prompt)
    prompts[:, 0] = 1
    return prompts
