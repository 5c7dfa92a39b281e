"""Shared by all training commands: common settings, the run's folder, checkpoints and the training loop."""

import contextlib
import dataclasses
import hashlib
import io
import json
import pathlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import grain
import jax
from rich.console import Console

from jaxrlhf.base.types import Batch, Key, Params
from jaxrlhf.commands.compilation import CompilationConfig
from jaxrlhf.commands.configuration import config_values
from jaxrlhf.commands.model_card import COMMANDS, Told, write_cards
from jaxrlhf.commands.options import Groups
from jaxrlhf.training.checkpoint import fingerprints
from jaxrlhf.training.guard import SkippedSteps
from jaxrlhf.training.loop import StepProgress, outer_steps
from jaxrlhf.training.preemption import AskedToStopError
from jaxrlhf.training.processes import broadcast_text, is_first_process
from jaxrlhf.training.progress import progress
from jaxrlhf.training.report import Samples, Table, rich_table, write_report
from jaxrlhf.training.resume import RunCheckpointer, StoppedError
from jaxrlhf.training.run_folder import RunFolder
from jaxrlhf.training.store import RunStore
from jaxrlhf.training.tracking import check_tracker


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig(CompilationConfig):
    """Settings common to all training runs: folder, checkpoints, devices, logging."""

    GROUPS: ClassVar[Groups] = {
        "main settings": ("output", "run", "seed"),
        "checkpoints": ("resume", "store", "checkpoint_minutes", "checkpoint_steps", "keep_best"),
        "devices and memory": ("mesh", "processes", "microbatches", "remat", "dtype"),
        "data": ("data_dir",),
        "evaluation and logging": ("evaluations", "track", "patience"),
    }

    output: pathlib.Path = pathlib.Path("runs")
    """Directory in which the run's folder is created."""
    run: str | None = None
    """Name of the run's folder; by default the command and the time."""
    resume: bool = False
    """Continues the run named by --run, or starts it if it does not exist; safe to pass always."""
    store: str | None = None
    """Also copies the run's folder there after every checkpoint and at the end, such as gs://bucket/runs or s3://bucket/runs;
    --resume fetches it where there is no such folder."""
    checkpoint_minutes: float = 10.0
    """Minutes between checkpoints; one is also written at the end and when the run is stopped or fails."""
    checkpoint_steps: int | None = None
    """Also writes a checkpoint every this many steps."""
    keep_best: int = 0
    """Number of best checkpoints on held-out data to keep beside the last; the best one's models are saved in best."""
    patience: int = 5
    """Stop after this many consecutive non-finite updates; each is skipped."""
    processes: str | None = None
    """For runs of several processes: auto on a TPU pod or under Slurm, or HOST:PORT,COUNT,INDEX for this process."""
    mesh: str = "data=-1"
    """Device mesh, such as fsdp=8 or tensor=2,data=-1, with axes data, fsdp, tensor and stencil."""
    microbatches: int = 1
    """Microbatches per step, computed sequentially to save memory; the result is the same.
    With 1, a CPU chooses a number that fits its caches."""
    remat: Literal["layer", "products"] | None = None
    """Recomputes activations in the backward pass to save memory: all but layer inputs, or all but matrix products."""
    data_dir: pathlib.Path = pathlib.Path("runs/data")
    """Directory for prepared data."""
    track: Literal["tensorboard", "wandb", "trackio"] | None = None
    """Also logs metrics to this service."""
    seed: int = 0
    """Random seed."""


# Settings that may change when a run is resumed. Models are compared by their weights and data by their rows, not by path.
FREE = {field.name for field in dataclasses.fields(RunConfig)} - {"seed"} | {"policy", "reward", "data", "tokenizer"}


def open_folder(config: Any, name: str) -> RunFolder:
    """Creates the run's folder, or opens the one to resume, and writes its configuration.

    That of a run to resume stays as it is until `run_loop` knows that its checkpoints are this run's.

    Args:
        config: of the command.
        name: of the command, which the folder has too.
    """
    named: dict[str, Any] = {"fixed": config.run, "resume": config.resume} if isinstance(config, RunConfig) else {}
    created = []

    def create():
        # A library that is missing leaves no folder behind.
        check_tracker(getattr(config, "track", None))
        store = getattr(config, "store", None)
        if store is not None and config.run is not None:
            RunStore(store, config.run).begin(config.output / config.run, resume=config.resume)
        folder = RunFolder(config.output, name, **named)
        folder.store = None if store is None else RunStore(store, folder.path.name)
        created.append(folder)
        return str(created[0].path.absolute())

    path = broadcast_text(create)
    folder = created[0] if created else RunFolder.followed(pathlib.Path(path))
    if not (folder.resumed and (folder.path / "config.json").is_file()):
        folder.write_json("config.json", config_values(config, name))
    if getattr(config, "store", None) is not None:
        # A store that cannot be written is known before the first step.
        broadcast_text(lambda: created[0].store.push(folder.path) or "")
    return folder


def open_checkpointer(
    config: RunConfig, folder: RunFolder, models: dict[str, Params], *, free: Sequence[str] = ()
) -> RunCheckpointer:
    """Returns the run's checkpointer, identified by settings and models that must be the same on resume.

    Args:
        config: of the run.
        folder: of the run.
        models: initial parameters, by their names in error messages.
        free: further settings that may change, beside `FREE`.
    """
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name not in FREE.union(free)}
    weights = {name: hash_of(fingerprints(params)) for name, params in models.items()}
    identity = settings | weights | {"command": type(config).__name__}
    return RunCheckpointer(
        folder,
        identity,
        minutes=config.checkpoint_minutes,
        steps=config.checkpoint_steps,
        keep_best=config.keep_best,
    )


def hash_of(value: Any) -> str:
    """Returns a short hash of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


class LoopSettings(NamedTuple):
    """The training loop of a command.

    Attributes:
        name: of the command, shown on the progress bar.
        unit: of the throughput on the progress bar.
        steps: of the whole run.
        step: `(key, state, batch, frozen) -> (state, guard.Guarded)`.
        batches: endless; checkpointed with the state.
        place_batch: `(batch) -> ` the batch on the devices.
        frozen: parameters that are not trained.
        key: from which each step's key is derived.
        count: `(batch) -> ` the units of a step.
        log_step: `(step number, diagnostics as a dict) -> ` what the bar shows; writes metrics.
        evaluate: `(step number, state) -> ` a score on held-out data, larger is better; writes metrics.
        evaluations: number of evaluations; the last step is always evaluated.
    """

    name: str
    unit: str
    steps: int
    step: Callable[[Key, Any, Batch, Params], tuple[Any, Any]]
    batches: grain.DatasetIterator
    place_batch: Callable[[Any], Any]
    frozen: Params
    key: Key
    count: Callable[[Any], float]
    log_step: Callable[[int, dict[str, Any]], dict[str, Any]]
    evaluate: Callable[[int, Any], float]
    evaluations: int


class LoopResult(NamedTuple):
    """The last state of a run, the best evaluated one (None unless kept), and notes for the report."""

    state: Any
    best: Any
    notes: list[str]


def run_loop(
    config: RunConfig,
    loop: LoopSettings,
    folder: RunFolder,
    checkpointer: RunCheckpointer,
    state: Any,
    restored: dict[str, Any],
) -> LoopResult:
    """Takes the remaining steps; saves checkpoints, evaluates and logs on the way.

    Args:
        config: of the run.
        loop: what to run.
        folder: of the run.
        checkpointer: open.
        state, restored: from `checkpointer.restore_or_init`; the state is donated.

    Raises:
        StoppedError: the run was asked to stop.
        ValueError: too many consecutive updates were not finite, a batch does not fit the mesh, the run has taken more
            steps already, or none of the checkpoints to keep as the best can be read.
    """
    start, shown = int(state.step), {}
    if start > loop.steps:
        raise ValueError(f"The run in {folder.path} has taken {start} steps already; --steps {loop.steps} is fewer.")
    folder.write_json("config.json", config_values(config, loop.name))
    every = max(1, loop.steps // max(1, loop.evaluations))
    skipped = SkippedSteps(folder.path / "skipped", max_consecutive=config.patience)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)
    if restored:
        loop.batches.set_state(restored["data"])
        loop.log_step(start, restored["info"])
    batches = (loop.place_batch(next(loop.batches)) for _ in range(start, loop.steps))
    with progress(
        loop.name, loop.steps, loop.unit, done=start, console=Console(quiet=not is_first_process())
    ) as advance:
        for reached in _until_asked(loop, state, batches, folder, checkpointer):
            if reached.info is not None:
                shown = loop.log_step(reached.info_step, reached.info.info._asdict())
                skipped.record(reached.info_step, reached.info, reached.data)
            if reached.latest_info is None:
                break
            state, number = reached.state, reached.step
            advance(loop.count(reached.latest_data), **shown)
            last, score = number == loop.steps, None
            if last or number % every == 0:
                score = loop.evaluate(number, state)
            notes = {"data": loop.batches.get_state(), "info": reached.latest_info.info}
            if checkpointer.after_step(number, state, notes, last=last, score=score) and not last:
                raise StoppedError(folder.path, number, loop.steps, checkpointer.stop.signal)
    if not config.keep_best:
        return LoopResult(state, None, skipped.notes())
    try:
        best = checkpointer.best(shapes)
    except ValueError as error:
        raise ValueError(
            f"{error} The last step is saved: the same command with --run {folder.path.name} --resume and without "
            "--keep-best writes its models."
        ) from None
    note = f"The best on held-out data was step {best.step}; its models are in best."
    return LoopResult(state, best.arrays, [*skipped.notes(), note])


def _until_asked(
    loop: LoopSettings, state: Any, batches: Iterable[Batch], folder: RunFolder, checkpointer: RunCheckpointer
) -> Iterator[StepProgress]:
    """Yields the steps; raises StoppedError where one of them waits for labels while the run is asked to stop."""
    number = int(state.step)
    try:
        for reached in outer_steps(loop.step, state, batches, loop.frozen, key=loop.key):
            number = reached.step
            yield reached
    except AskedToStopError:
        raise StoppedError(folder.path, number, loop.steps, checkpointer.stop.signal) from None


def rehearse(folder: RunFolder, write: Callable[[RunFolder], Any]) -> None:
    """Tries, before the first step, what the end of a run does: it writes into a trial folder, which is then removed.

    Args:
        folder: of the run.
        write: called in the first process, with the trial folder; what it prints is not shown.

    Raises:
        ValueError: whatever it raises, in all processes.
    """

    def attempt() -> str:
        trial = RunFolder(folder.path, "trial", fixed="trial", resume=True)
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                write(trial)
        except OSError as error:
            raise ValueError(f"What the run is to write cannot be written in {folder.path} ({error}).") from None
        finally:
            trial.release()
            shutil.rmtree(trial.path, ignore_errors=True)
        return ""

    broadcast_text(attempt)


def finish(
    folder: RunFolder,
    config: Any,
    table: Table,
    *,
    title: str,
    summary: str,
    further: Sequence[Table] = (),
    figures: Sequence[str] = (),
    samples: Sequence[Samples] = (),
    notes: Sequence[str] = (),
) -> pathlib.Path:
    """Writes the report and the models' cards, prints its tables and the path of the run's folder; returns the path."""
    write_report(
        folder.path,
        title=title,
        summary=summary,
        tables=[table, *further],
        figures=figures,
        config=config,
        samples=samples,
        notes=notes,
    )
    if type(config).__name__ in COMMANDS:
        write_cards(folder.path, config, Told(title, summary, [table, *further], notes))
    console = Console(quiet=not is_first_process())
    for each in (table, *further):
        console.print(rich_table(each))
    console.print("Report, metrics and models are in:")
    console.print(str(folder.path), soft_wrap=True, markup=False, highlight=False)
    if folder.store is not None:
        folder.store.push(folder.path)
        console.print(f"and {folder.store}", soft_wrap=True, markup=False, highlight=False)
    return folder.path
