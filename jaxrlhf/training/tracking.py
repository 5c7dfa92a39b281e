"""Logging of a run's metrics to TensorBoard, Weights & Biases or Trackio, besides its own metrics.jsonl."""

import importlib
import json
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

from jaxrlhf.training.run_folder import plain

Kind = Literal["tensorboard", "wandb", "trackio"]
LIBRARIES: dict[Kind, tuple[str, str]] = {
    "tensorboard": ("tensorboardX", "SummaryWriter"),
    "wandb": ("wandb", "init"),
    "trackio": ("trackio", "init"),
}
"""The library of each kind, and what is used of it."""


class Tracker(NamedTuple):
    """A destination of metrics.

    Attributes:
        log: (step, {name: number}) -> None. Numbers that are None or not finite are left out. Steps may restart, for a
            second method under other names.
        close: flushes; to be called once, at the end.
    """

    log: Callable[[int, Mapping[str, Any]], None]
    close: Callable[[], None]


def tracker(kind: Kind | None, folder: pathlib.Path, *, name: str, config: Any) -> Tracker:
    """Returns a tracker that writes into `folder`.

    Args:
        kind: None logs nothing; "tensorboard" writes event files into `folder/tensorboard`; "wandb" starts a run in the
            project `jaxrlhf` (with the environment variable WANDB_MODE=offline, into `folder` only); "trackio" does so in
            Trackio's own folder on this machine, or in the Space named by TRACKIO_SPACE_ID.
        folder: the run's folder, which must exist.
        name: the run's name.
        config: a dataclass or dict, logged with the metrics.

    Raises:
        ValueError: the kind is unknown, its library is not installed, or wandb cannot start.
    """
    if kind is None:
        return Tracker(lambda step, numbers: None, lambda: None)
    if kind == "tensorboard":
        return _tensorboard(folder / "tensorboard", name, config)
    if kind == "wandb":
        return _wandb(folder, name, config)
    if kind == "trackio":
        return _trackio(name, config)
    raise ValueError(f"There is no tracker {kind!r}; choose tensorboard, wandb, trackio or none.")


def check_tracker(kind: Kind | None) -> None:
    """Raises ValueError where the library of a tracker is not installed."""
    if kind is not None:
        _library(*LIBRARIES[kind])


def _tensorboard(folder: pathlib.Path, name: str, config: Any) -> Tracker:
    library = _library(*LIBRARIES["tensorboard"])
    # A killed run loses at most the last ten seconds.
    writer = library.SummaryWriter(str(folder), flush_secs=10)
    writer.add_text("config", f"{name}\n\n```json\n{json.dumps(plain(config), indent=2, default=str)}\n```")

    def log(step: int, numbers: Mapping[str, Any]) -> None:
        for key, number in _finite(numbers).items():
            writer.add_scalar(key, number, int(step))

    return Tracker(log, writer.close)


def _wandb(folder: pathlib.Path, name: str, config: Any) -> Tracker:
    library = _library(*LIBRARIES["wandb"])
    try:
        run = library.init(project="jaxrlhf", name=name, dir=str(folder), config=plain(config))
    except library.Error as error:
        raise ValueError(
            f"wandb could not start ({str(error).rstrip('.')}); run `wandb login`, or set WANDB_MODE=offline."
        ) from None
    # wandb's own step must increase, and late values are dropped, so the step is logged as a metric like the others.
    run.define_metric("*", step_metric="step")

    def log(step: int, numbers: Mapping[str, Any]) -> None:
        run.log({**_finite(numbers), "step": int(step)})

    return Tracker(log, run.finish)


def _trackio(name: str, config: Any) -> Tracker:
    library = _library(*LIBRARIES["trackio"])
    # A resumed run goes on under its name; a notebook shows no dashboard unasked.
    run = library.init(project="jaxrlhf", name=name, config=plain(config), resume="allow", embed=False)

    def log(step: int, numbers: Mapping[str, Any]) -> None:
        run.log(_finite(numbers), step=int(step))

    return Tracker(log, run.finish)


def _finite(numbers: Mapping[str, Any]) -> dict[str, float]:
    """Returns the finite numbers: tensorboardX warns at any other, and both libraries show a gap for a missing point."""
    floats = {key: float(number) for key, number in numbers.items() if number is not None}
    return {key: number for key, number in floats.items() if math.isfinite(number)}


def _library(name: str, attribute: str) -> Any:
    """Imports an optional library; raises ValueError if it is not installed."""
    try:
        library = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        library = None
    # A folder of the library's name on the path (wandb leaves one where it ran) also imports, as an empty package.
    if not hasattr(library, attribute):
        raise ValueError(f"Tracking needs the library {name}, which is not installed: pip install 'jaxrlhf[tracking]'.")
    return library
