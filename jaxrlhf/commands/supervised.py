"""Supervised fine-tuning, from a model or from scratch: `jaxrlhf sft`."""

import dataclasses
import math
import pathlib
import time
from typing import Any

import jax
import numpy as np

from jaxrlhf.commands.data import open_records, splits_of, told_of_bad
from jaxrlhf.commands.models import Model, Words, find, open_model, open_words, save_model
from jaxrlhf.commands.running import finish
from jaxrlhf.commands.sample import write_texts
from jaxrlhf.commands.stage import (
    Training,
    draw_history,
    half_or_full,
    policy_learner,
    steps_of,
    train,
)
from jaxrlhf.data.batches import Demonstrations, padded_demonstrations
from jaxrlhf.data.fitted import described, fit_demonstrations, fit_prompts
from jaxrlhf.data.pipelines import demonstration_batches, in_order, packed_demonstrations
from jaxrlhf.data.records import DataError
from jaxrlhf.lm.learning import supervised_loss
from jaxrlhf.lm.transformer.config import DecoderConfig
from jaxrlhf.lm.transformer.model import decoder
from jaxrlhf.training.processes import first
from jaxrlhf.training.report import Samples, Table


@dataclasses.dataclass(frozen=True, kw_only=True)
class Supervised(Training):
    """Teaches a language model to write what demonstrations show.

    Reads demonstrations (`prompt` and `completion`, `messages`, `text`), or the preferred side of preferences. Only the
    assistant's words are learned.
    """

    policy: pathlib.Path | None = None
    """Model to start from: a Hugging Face directory, or a run's folder."""
    tokenizer: pathlib.Path | None = None
    """Instead of --policy, a directory whose tokenizer a new model takes: it starts from random weights."""
    width: int = 128
    """Of a new model; as are --layers and --heads."""
    layers: int = 4
    heads: int = 4
    held_out: float = 0.05
    """Share of the prompts that is not learned from but measured on."""
    max_length: int = 256
    """Tokens of a row; longer texts are cut at their end."""
    packed: bool = True
    """Puts several texts in a row; they do not see each other."""
    learning_rate: float = 1e-3
    warmup: float = 0.05
    """Share of the steps."""
    evaluations: int = 10


def main(config: Supervised) -> pathlib.Path:
    """Runs it; returns the run's folder, with the model in `policy`.

    Raises:
        ValueError, DataError: what is given cannot be used; the message says what to change.
    """
    began = time.monotonic()
    start = _start(config)
    prepared = open_records(
        config.data, form=config.format, held_out=config.held_out, skip_bad=config.skip_bad, data_dir=config.data_dir
    )
    shown, kept = splits_of(prepared)
    words, model = start.words, decoder(start.config, remat=config.remat)
    max_length = min(config.max_length, start.config.context_length)
    fitted, held_out = (fit_demonstrations(words.codec(), part, max_length=max_length) for part in (shown, kept))
    notes = [*told_of_bad(prepared), f"Learned from: {described(fitted)}.", f"Held out: {described(held_out)}."]
    # A packed row is nearly full.
    tokens = sum(len(row.tokens) for row in fitted.rows)
    rows = math.ceil(tokens / max_length) if config.packed else len(fitted.rows)
    steps = steps_of(config, rows)
    learner = policy_learner(start.params, config.lora_rank, jax.random.key(config.seed))
    loss = supervised_loss(model, params_of=learner.params_of)
    totals = jax.jit(loss)

    def evaluate(trained, frozen):
        sums = np.zeros(3)
        for _, batch in in_order(
            held_out.rows, padded_demonstrations, batch_size=config.batch_size, multiple=max_length
        ):
            sums += np.array([float(total) for total in totals(trained, batch, frozen)])
        return {
            "loss": sums[0] / sums[2],
            "perplexity": math.exp(min(sums[0] / sums[2], 50)),
            "accuracy": sums[1] / sums[2],
        }

    make = packed_demonstrations if config.packed else demonstration_batches
    shape: dict[str, Any] = {"length": max_length} if config.packed else {"multiple": min(128, max_length)}
    batches = iter(make(fitted.rows, batch_size=config.batch_size, seed=config.seed, **shape))
    done = train(
        config,
        "Supervised fine-tuning",
        "sft",
        loss,
        learner,
        batches,
        steps=steps,
        count=_tokens_of,
        evaluate=evaluate,
        told={
            "model": f"{start.config.family}, {config.policy or 'new'}",
            "learned from": described(fitted),
            "held out": described(held_out),
            "bad lines": f"{len(prepared.bad)} skipped, listed in the report" if prepared.bad else "none",
            "steps": f"{steps} of {config.batch_size} rows, at most {config.batch_size * max_length:,} tokens each",
        },
    )
    folder, history = done.folder, done.history
    if not first():
        return folder.path
    trained = start._replace(params=learner.whole(done.params))
    save_model(folder.path / "policy", trained, "policy")
    if done.best is not None:
        save_model(folder.path / "best" / "policy", start._replace(params=learner.whole(done.best)), "policy")
    after = history.measured[-1]
    table = Table(
        "On held-out texts",
        ("model", "loss (nats a token)", "perplexity", "next token right"),
        [
            (name, row["loss"], row["perplexity"], row["accuracy"])
            for name, row in (("before", done.before), ("after", after))
        ],
    )
    seconds = time.monotonic() - began
    folder.write_json("results.json", {"before": done.before, "after": after, "steps": steps, "seconds": seconds})
    return finish(
        folder,
        config,
        table,
        title="Supervised fine-tuning",
        summary=f"{steps} steps in {seconds:.0f} s. The model is in the folder policy.",
        figures=draw_history(folder, history, {"loss": "nats a token", "accuracy": "share"}),
        samples=[_samples(start, trained, kept, max_length)],
        notes=notes + done.notes,
    )


def _start(config: Supervised) -> Model:
    if (config.policy is None) == (config.tokenizer is None):
        raise ValueError("Give --policy to start from a model, or --tokenizer to start from random weights.")
    if config.policy is not None:
        return open_model(config.policy, "policy", dtype=half_or_full(config.dtype, config.lora_rank))
    words = open_words(find(config.tokenizer, "policy"))  # pyright: ignore[reportArgumentType]
    shape = new_shape(words, width=config.width, layers=config.layers, heads=config.heads, context=config.max_length)
    return Model(shape, decoder(shape).init(jax.random.key(config.seed)), words)


def new_shape(words: Words, *, width: int, layers: int, heads: int, context: int) -> DecoderConfig:
    """Returns the shape of a new Llama-layout decoder over a tokenizer.

    Raises:
        ValueError: the heads do not divide the width.
    """
    if heads < 1 or width % heads:
        raise ValueError(f"--heads {heads} must divide --width {width}.")
    size = max(words.tokenizer.get_vocab(with_added_tokens=True).values()) + 1
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


def _samples(before: Model, after: Model, records, max_length: int) -> Samples:
    room = max(1, min(64, max_length // 2))
    try:
        prompts = fit_prompts(
            before.words.codec(), records, max_length=max(2, max_length - room), cut_prompts=True
        ).rows[:6]
    except DataError:
        # Whole texts have no prompt: the models begin on their own.
        first = 0 if before.words.special.bos is None else before.words.special.bos
        prompts = [np.array([first], np.int32)]
    written = [write_texts(model, prompts, max_new_tokens=room, temperature=0.0) for model in (before, after)]
    shown = before.words.tokenizer.decode_batch([prompt.tolist() for prompt in prompts])
    return Samples(
        "Most probable continuations", ("before", "after"), list(zip(shown, zip(*written, strict=True), strict=True))
    )
