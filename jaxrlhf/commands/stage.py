"""What supervised training and reward learning share: the loop around a pure step, its optimiser, its plan."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console

from jaxrlhf.base.types import Params
from jaxrlhf.commands.data import Format
from jaxrlhf.commands.running import LoopSettings, Running, begin, keeper_of, take_steps
from jaxrlhf.lm import lora
from jaxrlhf.lm.learning import Loss, ParamsOf, itself, learning
from jaxrlhf.lm.memory import bytes_of
from jaxrlhf.lm.transformer.axes import decoder_names
from jaxrlhf.training.figures import draw_curves
from jaxrlhf.training.guard import guarded
from jaxrlhf.training.processes import first, gathered
from jaxrlhf.training.progress import bytes_text, count_text, plan
from jaxrlhf.training.run_folder import RunFolder
from jaxrlhf.training.sharding import make_mesh, parse_mesh, shardings
from jaxrlhf.training.step import check_batch, compile_update, place
from jaxrlhf.training.tracking import tracker as open_tracker


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training(Running):
    """What supervised training and reward learning are told alike."""

    data: str
    """A .jsonl, .txt or gzipped file, a folder of them, or hh-rlhf:NAME for a published file."""
    format: Format = "auto"
    """How the data are written; see `jaxrlhf.data`."""
    skip_bad: bool = False
    """Skips lines that cannot be read, and lists them."""
    held_out: float = 0.1
    """Share of the prompts that is not learned from but measured on."""
    steps: int | None = None
    """Optimiser steps; otherwise --epochs says."""
    epochs: float = 1.0
    batch_size: int = 32
    """Rows or pairs a step, over all devices."""
    learning_rate: float = 1e-4
    warmup: float = 0.1
    """Share of the steps."""
    weight_decay: float = 0.01
    largest_gradient: float = 1.0
    """Norm that gradients are clipped to."""
    lora_rank: int = 0
    """Trains adapters of this rank in place of the weights; they are merged at the end."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the weights; bfloat16 needs --lora-rank, as small steps round to nothing."""
    evaluations: int = 8


class Learner(NamedTuple):
    """What is trained of a model: all of it, or adapters on a frozen base.

    Attributes:
        trained: the parameters that the optimiser moves.
        frozen: the base, `()` without adapters.
        params_of: `(trained, frozen) -> ` the model's parameters, traceable.
        whole: `(trained) -> ` plain parameters to export.
    """

    trained: Params
    frozen: Params
    params_of: ParamsOf
    whole: Callable[[Params], Params]


def policy_learner(params: Params, rank: int, key: jax.Array) -> Learner:
    """Returns the learner of a language model; adapters where `rank` is positive."""
    if not rank:
        return Learner(params, (), itself, lambda trained: trained)
    adapter = lora.init_adapter(key, params, rank=rank)
    return Learner(adapter, params, _attached, lambda trained: lora.merge(params, trained))


def reward_learner(params: Params, rank: int, key: jax.Array) -> Learner:
    """Returns the learner of a reward model `{"trunk", "head"}`; an adapter and the head where `rank` is positive."""
    if not rank:
        return Learner(params, (), itself, lambda trained: trained)
    trunk = params["trunk"]
    trained = {"adapter": lora.init_adapter(key, trunk, rank=rank), "head": jnp.asarray(params["head"], jnp.float32)}

    def whole(trained):
        return {"trunk": lora.merge(trunk, trained["adapter"]), "head": trained["head"]}

    def params_of(trained, frozen):
        return {"trunk": lora.attach(frozen, trained["adapter"]), "head": trained["head"]}

    return Learner(trained, trunk, params_of, whole)


def _attached(adapter: Params, base: Params) -> Params:
    return lora.attach(base, adapter)


def adamw(config: Training, steps: int) -> optax.GradientTransformation:
    """Returns AdamW under a linear warm-up over a share of the steps and a cosine to a tenth, gradients clipped."""
    rate, warmup = config.learning_rate, config.warmup
    if not 0 <= warmup < 1:
        raise ValueError(f"--warmup must be a share of the steps in [0, 1), got {warmup:g}.")
    schedule = optax.warmup_cosine_decay_schedule(
        0.0 if warmup else rate, rate, max(1, round(warmup * steps)), max(2, steps), 0.1 * rate
    )
    return optax.chain(
        optax.clip_by_global_norm(config.largest_gradient),
        optax.adamw(schedule, weight_decay=config.weight_decay, mask=_matrices),
    )


def _matrices(params: Params) -> Any:
    # Decay pulls products towards 0; norms and biases, of one layer or of all in one array, have no business there.
    def one(path, leaf):
        return leaf.ndim > 1 and getattr(path[-1], "key", None) not in ("scale", "bias")

    return jax.tree_util.tree_map_with_path(one, params)


def steps_of(config: Training, rows: int) -> int:
    """Returns the number of steps: as given, or what the epochs need.

    Raises:
        ValueError: a number is out of range, or the parts do not divide the batch.
    """
    steps, epochs, batch_size, parts = config.steps, config.epochs, config.batch_size, config.microbatches
    if batch_size < 1 or parts < 1 or batch_size % parts:
        raise ValueError(f"--microbatches {parts} must divide --batch-size {batch_size}, and both be at least 1.")
    if steps is not None:
        if steps < 1:
            raise ValueError(f"--steps must be at least 1, got {steps}.")
        return steps
    if not epochs > 0:
        raise ValueError(f"--epochs must be positive, got {epochs:g}.")
    return max(1, math.ceil(epochs * rows / batch_size))


class History(NamedTuple):
    """Curves of a run: by step the loss on its batch, and by evaluated step what was measured on held-out data."""

    steps: list[int]
    losses: list[float]
    evaluated: list[int]
    measured: list[dict[str, float]]


class Trained(NamedTuple):
    """What came of a run.

    Attributes:
        folder: of the run.
        params: what was trained, on the host.
        best: of the best evaluated step; None unless it was to be kept.
        before: measured before the first step.
        history: the curves.
        notes: for the report.
    """

    folder: RunFolder
    params: Params
    best: Params | None
    before: dict[str, float]
    history: History
    notes: list[str]


def train(
    config: Training,
    title: str,
    name: str,
    loss: Loss,
    learner: Learner,
    batches: grain.DatasetIterator,
    *,
    steps: int,
    count: Callable[[Any], float],
    evaluate: Callable[[Params, Params], dict[str, float]],
    told: dict[str, str],
) -> Trained:
    """Makes the run's folder, prints the plan, takes the steps and reports them.

    Args:
        config: optimiser, evaluations, output and tracking.
        title: of the plan.
        name: of the folder and the progress bar.
        loss: of `lm.learning`.
        learner: what is trained.
        batches: endless, of `data.pipelines`.
        steps: how many.
        count: `(batch) -> ` its tokens, for the throughput.
        evaluate: `(trained, frozen parameters) -> ` measurements on held-out data, their `loss` among them, which the best
            step has the smallest of; the last step is always evaluated.
        told: further rows of the plan.

    Raises:
        ValueError: a setting is out of range, or the loss is not finite.
    """
    optimizer, mesh = adamw(config, steps), make_mesh(parse_mesh(config.mesh))
    algorithm = learning(loss, optimizer, microbatches=config.microbatches if config.microbatches > 1 else None)
    folder = begin(config, name)
    print_plan(Console(quiet=not first()), title, learner, optimizer, told)
    tracker = open_tracker(config.track if first() else None, folder.path, name=folder.path.name, config=config)
    shapes = jax.eval_shape(algorithm.init, learner.trained), learner.trained, learner.frozen
    where, *places = (shardings(each, mesh, decoder_names) for each in shapes)
    trained, frozen = place((learner.trained, learner.frozen), tuple(places))
    before = evaluate(trained, frozen)
    update = compile_update(guarded(algorithm.update, state=0), mesh, state=where, frozen=places[1])

    def ready(batch):
        check_batch(len(jax.tree.leaves(batch)[0]), mesh)
        return batch

    with keeper_of(config, folder, {"weights": learner.trained}) as keeper:
        state, kept = keeper.begin(algorithm.init, (trained,), where)
        # What was measured before a run goes on is in its metrics.
        history = _history_of(folder.metrics())

        def note(number, info):
            row = {name: _float(info[name]) for name in ("loss", "accuracy", "gradient_norm")}
            history.steps.append(number)
            history.losses.append(row["loss"])
            folder.append_metrics(step=number, **row)
            tracker.log(number, row)
            return {"loss": row["loss"]}

        def measure(number, state):
            measured = evaluate(state.params, frozen)
            history.evaluated.append(number)
            history.measured.append(measured)
            folder.append_metrics(step=number, **{f"held_out_{name}": value for name, value in measured.items()})
            tracker.log(number, {f"held_out/{name}": value for name, value in measured.items()})
            return -measured["loss"]

        course = LoopSettings(
            name=name,
            unit="tokens",
            steps=steps,
            step=lambda key, state, batch, frozen: update(state, batch, frozen),
            batches=batches,
            ready=ready,
            frozen=frozen,
            key=jax.random.key(config.seed),
            units=count,
            note=note,
            measure=measure,
        )
        taken = take_steps(config, config.evaluations, folder, keeper, course, state, kept)
    tracker.close()
    best = None if taken.best is None else gathered(taken.best.params)
    return Trained(folder, gathered(taken.state.params), best, before, history, taken.notes)


def _float(value: Any) -> float:
    return math.nan if value is None else float(value)


def _history_of(rows: list[dict[str, Any]]) -> History:
    """Returns the curves that a run had written before it went on."""
    history, start = History([], [], [], []), "held_out_"
    for row in rows:
        measured = {name.removeprefix(start): _float(value) for name, value in row.items() if name.startswith(start)}
        if measured:
            history.evaluated.append(row["step"])
            history.measured.append(measured)
        else:
            history.steps.append(row["step"])
            history.losses.append(_float(row["loss"]))
    return history


def draw_history(folder: RunFolder, history: History, panels: dict[str, str]) -> list[str]:
    """Draws the loss and what was measured; `panels` names measurements and their axes. Returns the files' names."""
    smooth = _smoothed(history.losses)
    drawn = {"Loss on batches": ("step", "nats", {"batches, smoothed": (history.steps, smooth)})}
    for name, axis in panels.items():
        values = [row[name] for row in history.measured]
        drawn[f"Held out: {name.replace('_', ' ')}"] = ("step", axis, {"held out": (history.evaluated, values)})
    draw_curves(folder.path / "curves.png", drawn)
    return ["curves.png"]


def _smoothed(values: list[float]) -> list[float]:
    width = max(1, len(values) // 50)
    sums = np.cumsum([0.0, *values])
    return [float((sums[i + 1] - sums[max(0, i + 1 - width)]) / min(i + 1, width)) for i in range(len(values))]


def print_plan(
    console: Console, title: str, learner: Learner, optimizer: optax.GradientTransformation, rows: dict[str, str]
) -> None:
    """Prints what is about to happen, before the optimiser's memory is taken."""
    trained = bytes_of(learner.trained)
    # Beside what is trained, the model that it began as is kept, to compare with.
    frozen = bytes_of(learner.frozen) or trained
    slots = bytes_of(jax.eval_shape(optimizer.init, learner.trained))
    parameters = sum(leaf.size for leaf in jax.tree.leaves((learner.trained, learner.frozen)))
    count = sum(leaf.size for leaf in jax.tree.leaves(learner.trained))
    devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    memory = f"{bytes_text(frozen + trained + slots)} of weights and optimiser, gradients {bytes_text(trained)}"
    told = {"parameters": f"{count_text(parameters)}, {count_text(count)} of them trained", "memory": memory}
    plan(console, title, rows | told | {"devices": devices})


def half_or_full(name: str, rank: int) -> Any:
    """Returns the dtype of a name on the command line.

    Raises:
        ValueError: whole weights are to be trained in bfloat16.
    """
    if name != "float32" and not rank:
        raise ValueError(
            f"Weights in {name} cannot be trained whole, as small steps round to nothing; give --lora-rank."
        )
    return jnp.dtype(name)
