"""What every command that trains shares: its settings, its folder, its state that is kept, and the steps it takes."""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import grain
import jax
from rich.console import Console

from jaxrlhf.base.types import Batch, Key, Params
from jaxrlhf.training.checkpoint import fingerprints
from jaxrlhf.training.guard import Patience
from jaxrlhf.training.keeping import Keeper, StoppedError
from jaxrlhf.training.loop import outer_steps
from jaxrlhf.training.processes import first, from_first
from jaxrlhf.training.progress import progress
from jaxrlhf.training.report import Samples, Table, rich_table, write_report
from jaxrlhf.training.run_folder import RunFolder


@dataclasses.dataclass(frozen=True, kw_only=True)
class Running:
    """What every run that trains is told alike: where it is kept, how it goes on, what it runs on."""

    output: pathlib.Path = pathlib.Path("runs")
    """Where the run's own folder is made."""
    run: str | None = None
    """Name of that folder; otherwise it is named by the time."""
    resume: bool = False
    """Goes on with the run of that name, or begins it: may always be given."""
    checkpoint_minutes: float = 10.0
    """Between two checkpoints; one is written at the end too, and when the run is asked to stop or fails."""
    checkpoint_steps: int | None = None
    """Also after so many steps."""
    keep_best: int = 0
    """Checkpoints of evaluated steps that are kept beside the last: those that did best on held-out data. The models of
    the best are in the folder best."""
    patience: int = 5
    """So many steps in a row that come to something that is not finite end the run; each is left out."""
    processes: str | None = None
    """Where this process is one of several: auto on a TPU pod or in a Slurm job, or HOST:PORT,COUNT,INDEX."""
    mesh: str = "data=-1"
    """How devices are arranged, such as fsdp=8 or tensor=2,data=-1; of data, fsdp, tensor and stencil."""
    microbatches: int = 1
    """Pieces that a batch is computed in, one after the other, to save memory; the result is the same. A CPU
    takes as many as suit its caches, where no more are asked for."""
    remat: Literal["layer", "products"] | None = None
    """What a backward pass computes again, to save memory: everything but each layer's input, or but its products."""
    data_dir: pathlib.Path = pathlib.Path("runs/data")
    """Where prepared data lie."""
    track: Literal["tensorboard", "wandb"] | None = None
    """Also logs there."""
    seed: int = 0


# What may differ when a run goes on. Models are compared by their weights and data by their rows, wherever they lie.
FREE = {field.name for field in dataclasses.fields(Running)} - {"seed"} | {"policy", "reward", "data", "tokenizer"}


def begin(config: Any, name: str) -> RunFolder:
    """Makes a run's folder, or opens the one to go on in, and writes its configuration."""
    named: dict[str, Any] = {"fixed": config.run, "resume": config.resume} if isinstance(config, Running) else {}
    made = []

    def make():
        made.append(RunFolder(config.output, name, **named))
        return str(made[0].path.absolute())

    path = from_first(make)
    folder = made[0] if made else RunFolder.followed(pathlib.Path(path))
    folder.write_json("config.json", config)
    return folder


def keeper_of(config: Running, folder: RunFolder, models: dict[str, Params], *, free: Sequence[str] = ()) -> Keeper:
    """Returns what keeps a run: with its settings and models, which must be the same when it goes on.

    Args:
        config: of the run.
        folder: of the run.
        models: parameters that it begins with, by what they are called in a message.
        free: settings that may differ then, beside `FREE`.
    """
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name not in FREE.union(free)}
    weights = {name: hash_of(fingerprints(params)) for name, params in models.items()}
    identity = settings | weights | {"command": type(config).__name__}
    return Keeper(
        folder,
        identity,
        minutes=config.checkpoint_minutes,
        steps=config.checkpoint_steps,
        keep_best=config.keep_best,
    )


def hash_of(value: Any) -> str:
    """Returns a short name of a value in JSON's types."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


class LoopSettings(NamedTuple):
    """The steps of a command.

    Attributes:
        name: on the progress bar.
        unit: what the bar's throughput counts.
        steps: how many the whole run has.
        step: `(key, state, batch, frozen) -> (state, guard.Guarded)`.
        batches: endless; its state is kept.
        ready: `(batch) -> ` what the step is given.
        frozen: what is not trained.
        key: of all steps.
        units: `(batch) -> ` how many.
        note: `(number, diagnostics as a dict) -> ` what the bar shows of a step; writes metrics.
        measure: `(number, state) -> ` how well it does on held-out data, the larger the better; writes metrics.
    """

    name: str
    unit: str
    steps: int
    step: Callable[[Key, Any, Batch, Params], tuple[Any, Any]]
    batches: grain.DatasetIterator
    ready: Callable[[Any], Any]
    frozen: Params
    key: Key
    units: Callable[[Any], float]
    note: Callable[[int, dict[str, Any]], dict[str, Any]]
    measure: Callable[[int, Any], float]


class Taken(NamedTuple):
    """The last state of a run, that of the best evaluated step (None unless it is kept), and notes for the report."""

    state: Any
    best: Any
    notes: list[str]


def take_steps(
    config: Running,
    evaluations: int,
    folder: RunFolder,
    keeper: Keeper,
    course: LoopSettings,
    state: Any,
    kept: dict[str, Any],
) -> Taken:
    """Takes the steps that are left, and keeps, measures and reports them on the way; the last step is always measured.

    Args:
        config: of the run.
        evaluations: how often it is measured.
        folder: of the run.
        keeper: open.
        course: the steps.
        state, kept: of `keeper.begin`; the state is donated.

    Raises:
        StoppedError: the run was asked to end.
        ValueError: too many steps in a row were not finite, or a batch does not suit the mesh.
    """
    steps, begun, shown = course.steps, int(state.step), {}
    every = max(1, steps // max(1, evaluations))
    patience = Patience(folder.path / "skipped", limit=config.patience)
    where = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)
    if kept:
        course.batches.set_state(kept["data"])
        course.note(begun, kept["info"])

    def rows() -> Iterator[Any]:
        for _ in range(begun, steps):
            yield course.ready(next(course.batches))

    with progress(course.name, steps, course.unit, done=begun, console=Console(quiet=not first())) as advance:
        for reached in outer_steps(course.step, state, rows(), course.frozen, key=course.key):
            if reached.info is not None:
                shown = course.note(reached.told, reached.info.info._asdict())
                patience.take(reached.told, reached.info, reached.data)
            if reached.latest is None:
                break
            state, number = reached.state, reached.step
            advance(course.units(reached.given), **shown)
            last, score = number == steps, None
            if last or number % every == 0:
                score = course.measure(number, state)
            noted = {"data": course.batches.get_state(), "info": reached.latest.info}
            if keeper.stops(number, state, noted, last=last, score=score) and not last:
                raise StoppedError(folder.path, number, steps, keeper.stop.signal)
    best, notes = None, patience.notes()
    if config.keep_best:
        found = keeper.best(where)
        if found is not None:
            best = found.arrays
            notes.append(f"The best on held-out data was step {found.step}; its models are in best.")
    return Taken(state, best, notes)


def finish(
    folder: RunFolder,
    config: Any,
    table: Table,
    *,
    title: str,
    summary: str,
    figures: Sequence[str] = (),
    samples: Sequence[Samples] = (),
    notes: Sequence[str] = (),
) -> pathlib.Path:
    """Writes the report, prints its table and where the run's folder is; returns the folder's path."""
    write_report(
        folder.path,
        title=title,
        summary=summary,
        tables=[table],
        figures=figures,
        config=config,
        samples=samples,
        notes=notes,
    )
    console = Console(quiet=not first())
    console.print(rich_table(table))
    console.print("Report, metrics and what was made are in:")
    console.print(str(folder.path), soft_wrap=True, markup=False, highlight=False)
    return folder.path
