"""A run's numbers sent to TensorBoard or Weights & Biases, beside its own metrics.jsonl."""

import importlib
import json
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

from jaxrlhf.training.run_folder import plain

Kind = Literal["tensorboard", "wandb"]


class Tracker(NamedTuple):
    """Where numbers go.

    Attributes:
        log: (step, {name: number}) -> None. A number that is None or not finite is left out. Steps may start again, for
            a second method under other names.
        close: writes out what is left; to be called once, at the end.
    """

    log: Callable[[int, Mapping[str, Any]], None]
    close: Callable[[], None]


def tracker(kind: Kind | None, folder: pathlib.Path, *, name: str, config: Any) -> Tracker:
    """Returns a tracker that writes below `folder`.

    Args:
        kind: None tracks nothing; "tensorboard" writes event files into `folder/tensorboard`; "wandb" starts a run in the
            project `jaxrlhf` (with the environment variable WANDB_MODE=offline, into `folder` only).
        folder: the run's own folder, which exists.
        name: the run's name.
        config: a dataclass or dict, kept beside the numbers.

    Raises:
        ValueError: there is no such kind, its library is not installed, or wandb cannot start.
    """
    if kind is None:
        return Tracker(lambda step, numbers: None, lambda: None)
    if kind == "tensorboard":
        return _tensorboard(folder / "tensorboard", name, config)
    if kind == "wandb":
        return _wandb(folder, name, config)
    raise ValueError(f"There is no tracker {kind!r}; choose tensorboard, wandb or none.")


def _tensorboard(folder: pathlib.Path, name: str, config: Any) -> Tracker:
    library = _library("tensorboardX", "SummaryWriter")
    # A killed run loses at most the last ten seconds.
    writer = library.SummaryWriter(str(folder), flush_secs=10)
    writer.add_text("config", f"{name}\n\n```json\n{json.dumps(plain(config), indent=2, default=str)}\n```")

    def log(step: int, numbers: Mapping[str, Any]) -> None:
        for key, number in _finite(numbers).items():
            writer.add_scalar(key, number, int(step))

    return Tracker(log, writer.close)


def _wandb(folder: pathlib.Path, name: str, config: Any) -> Tracker:
    library = _library("wandb", "init")
    try:
        run = library.init(project="jaxrlhf", name=name, dir=str(folder), config=plain(config))
    except library.Error as error:
        raise ValueError(
            f"wandb could not start ({str(error).rstrip('.')}); run `wandb login`, or set WANDB_MODE=offline."
        ) from None
    # wandb's own step can only grow and it drops what comes late, so the step is logged as a number like the others.
    run.define_metric("*", step_metric="step")

    def log(step: int, numbers: Mapping[str, Any]) -> None:
        run.log({**_finite(numbers), "step": int(step)})

    return Tracker(log, run.finish)


def _finite(numbers: Mapping[str, Any]) -> dict[str, float]:
    """Returns what can be drawn: tensorboardX warns at every other number, and a missing point is what both would show."""
    given = {key: float(number) for key, number in numbers.items() if number is not None}
    return {key: number for key, number in given.items() if math.isfinite(number)}


def _library(name: str, needed: str) -> Any:
    """Imports an optional library; raises ValueError where it is not installed."""
    try:
        library = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        library = None
    # A folder of the library's name on the path (wandb leaves one where it ran) imports too, as an empty package.
    if not hasattr(library, needed):
        raise ValueError(f"Tracking needs the library {name}, which is not installed: pip install 'jaxrlhf[tracking]'.")
    return library
