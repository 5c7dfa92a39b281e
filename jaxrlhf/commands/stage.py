"""Shared by supervised training and reward learning: settings, optimiser, the run, curves and saved models."""

import dataclasses
import math
import pathlib
from collections.abc import Callable
from typing import Any, ClassVar, Literal, NamedTuple

import grain
import jax
import numpy as np
import optax
from rich.console import Console

from jaxrlhf.base.types import Batch, Params
from jaxrlhf.commands.adapters import AdapterConfig
from jaxrlhf.commands.compilation import cache_text
from jaxrlhf.commands.data import Format
from jaxrlhf.commands.flags import refuse_unused
from jaxrlhf.commands.models import Model, as_saved, open_model, save_model, save_trained_adapter
from jaxrlhf.commands.options import Groups
from jaxrlhf.commands.running import LoopSettings, RunConfig, open_checkpointer, open_folder, rehearse, run_loop
from jaxrlhf.commands.trainable import Trainable
from jaxrlhf.lm.hugging_face.families import Kind
from jaxrlhf.lm.learning import Loss, learning
from jaxrlhf.lm.memory import tree_bytes
from jaxrlhf.lm.transformer.axes import decoder_names
from jaxrlhf.training.checkpoint import OtherRunError
from jaxrlhf.training.guard import guarded
from jaxrlhf.training.processes import gathered, is_first_process
from jaxrlhf.training.progress import bytes_text, count_text, print_table
from jaxrlhf.training.run_folder import RunFolder
from jaxrlhf.training.sharding import make_mesh, parse_mesh, shardings
from jaxrlhf.training.step import check_batch, compile_update, put_on_devices
from jaxrlhf.training.tracking import tracker as open_tracker

LARGEST_TRIAL = 1 << 29
"""Bytes of the largest model that is saved and read back once before the first step."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageConfig(AdapterConfig, RunConfig):
    """Settings common to supervised training and reward learning."""

    GROUPS: ClassVar[Groups] = {
        "main settings": ("data", "steps", "epochs", "batch_size", "learning_rate", "lora_rank"),
        "data": ("format", "skip_bad", "held_out"),
        "optimiser": ("warmup", "weight_decay", "largest_gradient"),
        "adapters": ("lora_dropout",),
    }

    lora_dropout: float = 0.0
    """Probability with which adapters drop each feature of their inputs while they are trained."""
    data: str
    """Training data: a .jsonl, .parquet, .csv or .txt file, a folder of them, a name on a hub as
    org/name[@revision][:part], or hh-rlhf:NAME for a published file."""
    format: Format = "auto"
    """Format of the data; see `jaxrlhf.data`."""
    skip_bad: bool = False
    """Skips unreadable lines and lists them in the report."""
    held_out: float = 0.1
    """Fraction of the prompts held out for evaluation."""
    steps: int | None = None
    """Number of optimiser steps; by default set by --epochs."""
    epochs: float = 1.0
    """Passes over the training data, if --steps is not given."""
    batch_size: int = 32
    """Rows or pairs per step, over all devices."""
    learning_rate: float = 1e-4
    """Peak learning rate of AdamW; it decays to a tenth along a cosine."""
    warmup: float = 0.1
    """Fraction of the steps over which the learning rate rises linearly from 0."""
    weight_decay: float = 0.01
    """AdamW's weight decay; applied to matrices only."""
    largest_gradient: float = 1.0
    """Global norm to which gradients are clipped."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type of the weights; bfloat16 needs --lora-rank, as small updates of bfloat16 weights round to nothing."""
    evaluations: int = 8
    """Number of evaluations on held-out data; the last step is always evaluated."""


class Stage(NamedTuple):
    """What a stage trains, and on what.

    Attributes:
        title: of the plan.
        name: of the run's folder and of the progress bar.
        loss: `(params, batch, frozen) -> Totals`.
        trainable: the parameters.
        batches: endless.
        steps: number of optimiser steps.
        count: `(batch) -> ` its tokens, for the throughput.
        evaluate: `(params, frozen) -> ` metrics on held-out data, including the `loss` by which the best step is chosen.
        plan_rows: further rows of the plan.
        write: `(result) -> ` saves the models and reports; tried on the initial parameters before the first step.
    """

    title: str
    name: str
    loss: Loss
    trainable: Trainable
    batches: grain.DatasetIterator
    steps: int
    count: Callable[[Any], float]
    evaluate: Callable[[Params, Params], dict[str, float]]
    plan_rows: dict[str, str]
    write: Callable[["StageResult"], Any]


class History(NamedTuple):
    """Curves of a run: the training loss by step, and held-out metrics by evaluated step."""

    steps: list[int]
    losses: list[float]
    evaluated: list[int]
    metrics: list[dict[str, float]]


class StageResult(NamedTuple):
    """The result of a stage.

    Attributes:
        folder: of the run.
        steps: number of optimiser steps.
        params: trained parameters, on the host.
        best: those of the best evaluated step; None unless kept.
        before: metrics before the first step.
        history: the curves.
        notes: for the report.
    """

    folder: RunFolder
    steps: int
    params: Params
    best: Params | None
    before: dict[str, float]
    history: History
    notes: list[str]


def adamw(config: StageConfig, steps: int) -> optax.GradientTransformation:
    """Returns AdamW with linear warm-up over a fraction of the steps, cosine decay to a tenth, and gradient clipping."""
    rate, warmup = config.learning_rate, config.warmup
    if not 0 <= warmup < 1:
        raise ValueError(f"--warmup must be a fraction of the steps in [0, 1), got {warmup:g}.")
    schedule = optax.warmup_cosine_decay_schedule(
        0.0 if warmup else rate, rate, max(1, round(warmup * steps)), max(2, steps), 0.1 * rate
    )
    return optax.chain(
        optax.clip_by_global_norm(config.largest_gradient),
        optax.adamw(schedule, weight_decay=config.weight_decay, mask=_matrices),
    )


def _matrices(params: Params) -> Any:
    # Norms and biases are not decayed, whether of one layer or of all layers stacked in one array.
    def decays(path, leaf):
        return leaf.ndim > 1 and getattr(path[-1], "key", None) not in ("scale", "bias")

    return jax.tree_util.tree_map_with_path(decays, params)


def number_of_steps(config: StageConfig, rows: int) -> int:
    """Returns --steps, or the steps that --epochs over `rows` need.

    Raises:
        ValueError: a number is out of range, or --microbatches does not divide the batch.
    """
    steps, epochs, batch_size, microbatches = config.steps, config.epochs, config.batch_size, config.microbatches
    if batch_size < 1 or microbatches < 1 or batch_size % microbatches:
        raise ValueError(
            f"--microbatches {microbatches} must divide --batch-size {batch_size}, and both be at least 1."
        )
    if steps is not None:
        refuse_unused(config, ["epochs"], "with --steps")
        return steps
    return max(1, math.ceil(epochs * rows / batch_size))


def train(config: StageConfig, stage: Stage) -> StageResult:
    """Runs a stage from its first step, or from the last checkpoint of the run to resume.

    Raises:
        ValueError: a setting is out of range, or the loss is not finite.
    """
    sizes = parse_mesh(config.mesh)
    if sizes.get("stencil", 1) != 1:
        raise ValueError(f"--mesh stencil={sizes['stencil']} does not apply here: only align has iterates to split.")
    trainable, optimizer, mesh = stage.trainable, adamw(config, stage.steps), make_mesh(sizes)
    microbatches = config.microbatches if config.microbatches > 1 else None
    algorithm = learning(stage.loss, optimizer, microbatches=microbatches, noise=trainable.noise, seed=config.seed)
    folder = open_folder(config, stage.name)
    print_plan(Console(quiet=not is_first_process()), stage, optimizer)
    tracker = open_tracker(
        config.track if is_first_process() else None, folder.path, name=folder.path.name, config=config
    )
    shapes = jax.eval_shape(algorithm.init, trainable.params), trainable.params, trainable.frozen
    state_where, params_where, frozen_where = (shardings(tree, mesh, decoder_names) for tree in shapes)
    params, frozen = put_on_devices((trainable.params, trainable.frozen), (params_where, frozen_where))
    before = stage.evaluate(params, frozen)
    rehearse(folder, lambda trial: stage.write(_initial_result(trial, stage, before)))
    update = compile_update(guarded(algorithm.update, state=0), mesh, state=state_where, frozen=frozen_where)

    def place_batch(batch: Batch) -> Batch:
        # The compiled update places it.
        check_batch(len(jax.tree.leaves(batch)[0]), mesh)
        return batch

    with open_checkpointer(config, folder, {"weights": trainable.params}) as checkpointer:
        try:
            state, restored = checkpointer.restore_or_init(algorithm.init, (params,), state_where)
        except OtherRunError as error:
            if error.name != "steps":
                raise
            raise ValueError(
                f"{error} The learning rate's schedule spans --steps; to train for longer, start another run from this "
                f"one's model, with --policy {folder.path}."
            ) from None
        recorder = _Recorder(folder, tracker, lambda state: stage.evaluate(state.params, frozen))
        loop = LoopSettings(
            name=stage.name,
            unit="tokens",
            steps=stage.steps,
            step=lambda key, state, batch, frozen: update(state, batch, frozen),
            batches=stage.batches,
            place_batch=place_batch,
            frozen=frozen,
            key=jax.random.key(config.seed),
            count=stage.count,
            log_step=recorder.log_step,
            evaluate=recorder.evaluate,
            evaluations=config.evaluations,
        )
        result = run_loop(config, loop, folder, checkpointer, state, restored)
    tracker.close()
    best = None if result.best is None else gathered(result.best.params)
    return StageResult(folder, stage.steps, gathered(result.state.params), best, before, recorder.history, result.notes)


def _initial_result(trial: RunFolder, stage: Stage, before: dict[str, float]) -> StageResult:
    return StageResult(trial, 0, stage.trainable.params, None, before, History([], [], [0], [before]), [])


class _Recorder:
    """Collects a run's curves, and writes them to its metrics and its tracker."""

    def __init__(self, folder: RunFolder, tracker: Any, evaluate: Callable[[Any], dict[str, float]]):
        """Starts from the metrics that the folder of a resumed run already has."""
        self.history = _read_history(folder.metrics())
        self._folder, self._tracker, self._evaluate = folder, tracker, evaluate

    def log_step(self, number: int, info: dict[str, Any]) -> dict[str, float]:
        row = {name: _float(info[name]) for name in ("loss", "accuracy", "gradient_norm")}
        self.history.steps.append(number)
        self.history.losses.append(row["loss"])
        self._folder.append_metrics(step=number, **row)
        self._tracker.log(number, row)
        return {"loss": row["loss"]}

    def evaluate(self, number: int, state: Any) -> float:
        metrics = self._evaluate(state)
        self.history.evaluated.append(number)
        self.history.metrics.append(metrics)
        self._folder.append_metrics(step=number, **{f"held_out_{name}": value for name, value in metrics.items()})
        self._tracker.log(number, {f"held_out/{name}": value for name, value in metrics.items()})
        return -metrics["loss"]


def _float(value: Any) -> float:
    return math.nan if value is None else float(value)


def _read_history(rows: list[dict[str, Any]]) -> History:
    history, prefix = History([], [], [], []), "held_out_"
    for row in rows:
        metrics = {name.removeprefix(prefix): _float(value) for name, value in row.items() if name.startswith(prefix)}
        if metrics:
            history.evaluated.append(row["step"])
            history.metrics.append(metrics)
        else:
            history.steps.append(row["step"])
            history.losses.append(_float(row["loss"]))
    return history


def save_models(result: StageResult, start: Model, trainable: Trainable, kind: Kind) -> Model:
    """Saves the trained model in the run's folder, and the best evaluated one where kept; returns the trained model.

    Before the first step it is the initial one, which is read back; a model above `LARGEST_TRIAL` is not written then.
    """
    trained = start._replace(params=trainable.merged(result.params))
    if not result.steps:
        try_saving(result.folder.path / kind, trained, kind)
        return trained
    for name, params in {"": result.params, "best": result.best}.items():
        if params is not None:
            directory = result.folder.path / name / kind
            save_model(directory, start._replace(params=trainable.merged(params)), kind)
            if trainable.adapts:
                how = {"scaling": trainable.scaling, "dropout": trainable.dropout}
                save_trained_adapter(directory, start, params, kind, **how)
    return trained


def try_saving(directory: pathlib.Path, model: Model, kind: Kind) -> None:
    """Saves a model and compares what is read back, if it has at most `LARGEST_TRIAL` bytes.

    Raises:
        ValueError: it cannot be saved, or reads back otherwise.
    """
    if tree_bytes(model.params) > LARGEST_TRIAL:
        return
    save_model(directory, model, kind)
    again, written = open_model(directory, kind), as_saved(model, kind)
    same = jax.tree.map(lambda a, b: np.array_equal(np.asarray(a, np.float32), b), written.params, again.params)
    if again.config != written.config or not all(jax.tree.leaves(same)):
        raise ValueError(f"The {kind} written to {directory} reads back otherwise than it was.")


def print_plan(console: Console, stage: Stage, optimizer: optax.GradientTransformation) -> None:
    """Prints what the stage will do, before the optimiser's memory is allocated."""
    params, base = stage.trainable.params, stage.trainable.frozen
    trained = tree_bytes(params)
    # The initial model is kept beside the trained one, to compare with.
    frozen = tree_bytes(base) or trained
    slots = tree_bytes(jax.eval_shape(optimizer.init, params))
    # A reference beside all trained weights is no further part of the model.
    parts = params if jax.tree.structure(params) == jax.tree.structure(base) else (params, base)
    total = sum(leaf.size for leaf in jax.tree.leaves(parts))
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    memory = f"{bytes_text(frozen + trained + slots)} of weights and optimiser, gradients {bytes_text(trained)}"
    rows = {
        "parameters": f"{count_text(total)}, {count_text(count)} of them trained",
        "memory": memory,
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "compiled programs": cache_text(),
    }
    print_table(console, stage.title, stage.plan_rows | rows)
