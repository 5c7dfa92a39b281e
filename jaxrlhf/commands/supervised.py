"""Supervised fine-tuning, of a model or from random weights: `jaxrlhf sft`."""

import dataclasses
import math
import pathlib
import time
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import numpy as np

from jaxrlhf.base.types import Params
from jaxrlhf.commands.adapters import configured_adapters, dtype_of
from jaxrlhf.commands.curves import draw_history
from jaxrlhf.commands.data import data_notes, data_rows, open_records, splits_of
from jaxrlhf.commands.experts import expert_load, with_load
from jaxrlhf.commands.flags import check_flags, refuse_unused
from jaxrlhf.commands.models import Model, TokenizerBundle, find, open_bundle, open_model
from jaxrlhf.commands.options import Groups
from jaxrlhf.commands.running import finish
from jaxrlhf.commands.sample import generate_texts
from jaxrlhf.commands.stage import (
    Stage,
    StageConfig,
    StageResult,
    number_of_steps,
    save_models,
    train,
)
from jaxrlhf.commands.trainable import Trainable, trainable_policy
from jaxrlhf.data.batches import Demonstrations, padded_demonstrations
from jaxrlhf.data.builders import Prepared, RecordSource
from jaxrlhf.data.encode import Encoded
from jaxrlhf.data.pipelines import demonstration_batches, evaluation_batches, packed_demonstrations
from jaxrlhf.data.records import DataError
from jaxrlhf.data.tokenization import TokenizedRows, tokenize_demonstrations, tokenize_prompts
from jaxrlhf.lm.learning import Loss, supervised_loss
from jaxrlhf.lm.transformer.config import DecoderConfig
from jaxrlhf.lm.transformer.model import decoder
from jaxrlhf.training.processes import is_first_process
from jaxrlhf.training.report import Samples, Table


@dataclasses.dataclass(frozen=True, kw_only=True)
class Supervised(StageConfig):
    """Fine-tunes a language model on demonstrations.

    Reads demonstrations (`prompt` and `completion`, `messages`, `text`), or the preferred side of preferences. The loss
    counts the assistant's tokens only.
    """

    GROUPS: ClassVar[Groups] = {
        "main settings": ("policy", "tokenizer"),
        "data": ("max_length", "packed"),
        "loss": ("expert_balance",),
        "a new model, with --tokenizer": ("width", "layers", "heads"),
    }

    policy: pathlib.Path | None = None
    """Model to start from: a Hugging Face directory, or a run's folder."""
    tokenizer: pathlib.Path | None = None
    """Instead of --policy: trains a new model from random weights with the tokenizer of this model directory."""
    width: int = 128
    """Width of a new model."""
    layers: int = 4
    """Layers of a new model."""
    heads: int = 4
    """Attention heads of a new model."""
    held_out: float = 0.05
    """Fraction of the prompts held out for evaluation."""
    max_length: int = 256
    """Maximum length of a row in tokens; longer texts are truncated at the end."""
    packed: bool = True
    """Packs several texts into a row; they do not attend to each other."""
    expert_balance: float = 0.0
    """Weight of the loss that spreads tokens over the experts of a mixture evenly, such as 0.001."""
    learning_rate: float = 1e-3
    """Peak learning rate of AdamW; it decays to a tenth along a cosine."""
    warmup: float = 0.05
    """Fraction of the steps over which the learning rate rises linearly from 0."""
    evaluations: int = 10
    """Number of evaluations on held-out data; the last step is always evaluated."""


class Inputs(NamedTuple):
    """The initial model, and the data at the model's length.

    Attributes:
        start: the initial model.
        max_length: of a row, in tokens.
        prepared: the data.
        training, held_out: tokenized demonstrations.
        held_out_records: from which prompts for samples are taken.
    """

    start: Model
    max_length: int
    prepared: Prepared
    training: TokenizedRows[Encoded]
    held_out: TokenizedRows[Encoded]
    held_out_records: RecordSource


def main(config: Supervised) -> pathlib.Path:
    """Trains, evaluates and reports; returns the run's folder, with the model in `policy`.

    Raises:
        ValueError, DataError: a setting, a model or the data cannot be used; the message says what to change.
    """
    began = time.monotonic()
    inputs = prepare(config)
    trainable = trainable_policy(inputs.start, configured_adapters(config), jax.random.key(config.seed))
    samples = None
    if is_first_process():
        samples = GreedySamples(inputs.start, inputs.held_out_records, inputs.max_length)

    def write(result: StageResult) -> pathlib.Path:
        assert samples is not None
        return _save(config, inputs, trainable, result, samples, began)

    result = train(config, _stage(config, inputs, trainable, write))
    return write(result) if is_first_process() else result.folder.path


def prepare(config: Supervised) -> Inputs:
    """Reads the model and the data."""
    check_flags(config)
    configured_adapters(config)
    start = _open_start(config)
    if start.config.experts is None:
        refuse_unused(config, ["expert_balance"], "to a model without experts")
    prepared = open_records(
        config.data, form=config.format, held_out=config.held_out, skip_bad=config.skip_bad, data_dir=config.data_dir
    )
    splits, max_length = splits_of(prepared), min(config.max_length, start.config.context_length)
    tokenizer = start.bundle.chat_tokenizer()
    training, held_out = (tokenize_demonstrations(tokenizer, split, max_length=max_length) for split in splits)
    return Inputs(start, max_length, prepared, training, held_out, splits[1])


def _stage(
    config: Supervised, inputs: Inputs, trainable: Trainable, write: Callable[[StageResult], pathlib.Path]
) -> Stage:
    training, held_out, max_length = inputs.training, inputs.held_out, inputs.max_length
    # A packed row is almost full.
    tokens = sum(len(row.tokens) for row in training.rows)
    steps = number_of_steps(config, math.ceil(tokens / max_length) if config.packed else len(training.rows))
    model = decoder(inputs.start.config, remat=config.remat)
    loss = supervised_loss(model, params_of=trainable.params_of)
    load = expert_load(inputs.start.config, [row.tokens for row in held_out.rows])
    batches = packed_demonstrations if config.packed else demonstration_batches
    shape: dict[str, Any] = {"length": max_length} if config.packed else {"multiple": min(128, max_length)}
    return Stage(
        title="Supervised fine-tuning",
        name="sft",
        loss=supervised_loss(model, params_of=trainable.params_of, balance=config.expert_balance),
        trainable=trainable,
        batches=iter(batches(training.rows, batch_size=config.batch_size, seed=config.seed, **shape)),
        steps=steps,
        count=_tokens_of,
        evaluate=with_load(
            _evaluation(loss, held_out.rows, batch_size=config.batch_size, max_length=max_length),
            load,
            trainable.params_of,
        ),
        plan_rows={"model": f"{inputs.start.config.family}, {config.policy or 'new'}"}
        | inputs.start.plan_rows()
        | data_rows(training, held_out, inputs.prepared)
        | {"steps": f"{steps} of {config.batch_size} rows, at most {config.batch_size * max_length:,} tokens each"},
        write=write,
    )


def _evaluation(
    loss: Loss, rows: list[Encoded], *, batch_size: int, max_length: int
) -> Callable[[Params, Params], dict[str, float]]:
    totals = jax.jit(loss)

    def evaluate(params: Params, frozen: Params) -> dict[str, float]:
        sums = np.zeros(3)
        for _, batch in evaluation_batches(rows, padded_demonstrations, batch_size=batch_size, multiple=max_length):
            sums += np.array([float(total) for total in totals(params, batch, frozen)])
        mean = sums[0] / sums[2]
        return {"loss": mean, "perplexity": math.exp(min(mean, 50)), "accuracy": sums[1] / sums[2]}

    return evaluate


def _save(
    config: Supervised,
    inputs: Inputs,
    trainable: Trainable,
    result: StageResult,
    samples: "GreedySamples",
    began: float,
) -> pathlib.Path:
    trained = save_models(result, inputs.start, trainable, "policy")
    folder, before, after = result.folder, result.before, result.history.metrics[-1]
    table = Table(
        "On held-out texts",
        ("model", "loss (nats per token)", "perplexity", "next-token accuracy"),
        [
            (name, row["loss"], row["perplexity"], row["accuracy"])
            for name, row in (("before", before), ("after", after))
        ],
    )
    steps, seconds = result.steps, time.monotonic() - began
    folder.write_json("results.json", {"before": before, "after": after, "steps": steps, "seconds": seconds})
    return finish(
        folder,
        config,
        table,
        title="Supervised fine-tuning",
        summary=f"{steps} steps in {seconds:.0f} s. The model is in the folder policy.",
        figures=draw_history(folder, result.history, {"loss": "nats per token", "accuracy": "fraction"}),
        samples=[samples.after(trained if result.steps else None)],
        notes=[*data_notes(inputs.training, inputs.held_out, inputs.prepared), *result.notes],
    )


def _open_start(config: Supervised) -> Model:
    if (config.policy is None) == (config.tokenizer is None):
        raise ValueError("Give --policy to start from a model, or --tokenizer to start from random weights.")
    if config.policy is not None:
        refuse_unused(config, ["width", "layers", "heads"], "with --policy, whose shape is its own")
        return open_model(config.policy, "policy", dtype=dtype_of(config.dtype, config.lora_rank))
    refuse_unused(config, ["dtype"], "with --tokenizer: a new model is trained in float32")
    bundle = open_bundle(find(config.tokenizer, "policy"))  # pyright: ignore[reportArgumentType]
    shape = new_shape(bundle, width=config.width, layers=config.layers, heads=config.heads, context=config.max_length)
    bundle = bundle.for_vocabulary(shape.vocabulary_size)
    return Model(shape, decoder(shape).init(jax.random.key(config.seed)), bundle)


def new_shape(bundle: TokenizerBundle, *, width: int, layers: int, heads: int, context: int) -> DecoderConfig:
    """Returns the shape of a new Llama-style decoder for a tokenizer.

    Raises:
        ValueError: the heads do not divide the width, or their size is odd.
    """
    if heads < 1 or width % heads:
        raise ValueError(f"--heads {heads} must divide --width {width}.")
    if width // heads % 2:
        raise ValueError(f"--width {width} over --heads {heads} is {width // heads}, which must be even.")
    size = max(bundle.tokenizer.get_vocab(with_added_tokens=True).values()) + 1
    return DecoderConfig(
        vocabulary_size=size,
        width=width,
        layers=layers,
        query_heads=heads,
        key_value_heads=heads,
        head_size=width // heads,
        mlp_width=8 * width // 3,
        context_length=context,
    )


def _tokens_of(batch: Demonstrations) -> float:
    return float(np.sum(batch.segments > 0))


class GreedySamples:
    """Greedy completions of six prompts by the initial model, computed before training, and later by the trained one."""

    def __init__(self, start: Model, records: RecordSource, max_length: int):
        self._max_new_tokens = max(1, min(64, max_length // 2))
        try:
            self._prompts = tokenize_prompts(
                start.bundle.chat_tokenizer(),
                records,
                max_length=max(2, max_length - self._max_new_tokens),
                cut_prompts=True,
            ).rows[:6]
        except DataError:
            # Plain texts have no prompt: start from BOS.
            bos = 0 if start.bundle.special.bos is None else start.bundle.special.bos
            self._prompts = [np.array([bos], np.int32)]
        self._texts = start.bundle.tokenizer.decode_batch([prompt.tolist() for prompt in self._prompts])
        self._before = self._complete(start)

    def _complete(self, model: Model) -> list[str]:
        return generate_texts(model, self._prompts, max_new_tokens=self._max_new_tokens, temperature=0.0)

    def after(self, model: Model | None) -> Samples:
        """Returns the completions by the initial model, and by a trained one; None is the initial one again."""
        completions = zip(self._before, self._before if model is None else self._complete(model), strict=True)
        return Samples("Greedy completions", ("before", "after"), list(zip(self._texts, completions, strict=True)))
