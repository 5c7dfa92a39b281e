"""Preferences over segments of trajectories in a file: to learn from offline, and to go on from online.

A file is NumPy's `.npz` (`np.savez_compressed(path, **arrays)`) of N pairs of segments of at most T steps:

| array | shape | what it is |
|---|---|---|
| `observations` | `[N, 2, T, ...]` | before each action; dimensions behind T are flattened |
| `actions` | `[N, 2, T]` integers, or `[N, 2, T, D]` reals | |
| `labels` | `[N]` | 1: segment 0 preferred; 0: segment 1; 0.5: neither; -1: skipped |
| `lengths` | `[N, 2]`, optional | steps of each segment, the first of T; T by default |
| `rewards` | `[N, 2, T]`, optional | true ones, for evaluation; no learner reads them |
"""

import pathlib
import zipfile

import jax.numpy as jnp
import numpy as np

from jaxrlhf.base.problem import Labelled, Sample
from jaxrlhf.mdp.environments import Environment
from jaxrlhf.mdp.trajectories import Segments

NEEDED, OPTIONAL = ("observations", "actions", "labels"), ("lengths", "rewards")


def read_preferences(path: str | pathlib.Path, environment: Environment | None = None) -> Labelled:
    """Returns a file's pairs as rows `[N, 1, 2, T]` with one label each, as `control.pebble` and `buffer` take them.

    Steps past a segment's length are zeros. Nobody knows who acted: log-probabilities are 0.

    Args:
        path: of the file.
        environment: where the rows must fit; not checked without one.

    Raises:
        ValueError: naming the file, and what is missing, of another shape or type, not finite, or out of range.
    """
    arrays = _arrays(pathlib.Path(path))
    problem = _first_problem(arrays, environment)
    if problem:
        raise ValueError(f"{path}: {problem}.")
    count, _, steps = arrays["observations"].shape[:3]
    lengths = arrays.get("lengths", np.full((count, 2), steps))
    inside = (np.arange(steps)[None, None, :] < lengths[:, :, None]).astype(np.float32)[:, None]
    observations = arrays["observations"].reshape(count, 1, 2, steps, -1).astype(np.float32)
    actions = arrays["actions"][:, None]
    reals = actions.ndim == 5
    rewards = arrays.get("rewards", np.zeros((count, 2, steps))).astype(np.float32)[:, None]
    segments = Segments(
        observations=jnp.asarray(np.where(inside[..., None] > 0, observations, 0.0)),
        actions=jnp.asarray(
            np.where(inside[..., None] > 0, actions, 0.0).astype(np.float32) if reals
            else np.where(inside > 0, actions, 0).astype(np.int32)
        ),
        gold=jnp.asarray(np.where(inside > 0, rewards, 0.0)),
        window=jnp.asarray(inside),
    )  # fmt: skip
    sample = Sample(
        prompts=jnp.zeros((count, 0)),
        responses=segments,
        behaviour_log_prob=jnp.zeros(inside.shape),
        reference_log_prob=jnp.zeros(inside.shape),
        cumulative_discount=jnp.asarray(inside),
        measure=jnp.full((count, 1), 1.0 / count),
        from_policy=jnp.zeros(2),
        num_draws=jnp.ones(()),
    )
    return Labelled(sample, jnp.asarray(arrays["labels"], jnp.float32).reshape(count, 1, 1))


def write_preferences(path: str | pathlib.Path, labelled: Labelled) -> None:
    """Writes rows `[N, 1, 2, T]` to a file that `read_preferences` reads; the first label of each pair.

    Args:
        path: it must end in `.npz`.
        labelled: what `propose` returned, with its labels; or a buffer's `pairs`.

    Raises:
        ValueError: the path ends otherwise.
    """
    path = pathlib.Path(path)
    if path.suffix != ".npz":
        raise ValueError(f"{path}: preferences are written to a file that ends in .npz.")
    segments = labelled.sample.responses
    partial = path.with_suffix(".part.npz")
    np.savez_compressed(
        partial,
        observations=np.asarray(segments.observations)[:, 0],
        actions=np.asarray(segments.actions)[:, 0],
        labels=np.asarray(labelled.labels)[:, 0, 0],
        lengths=np.sum(np.asarray(segments.window)[:, 0] > 0, axis=-1),
        rewards=np.asarray(segments.gold)[:, 0],
    )
    # A write that is cut off leaves no half a file of that name.
    partial.replace(path)


def _arrays(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Returns a file's arrays. Raises ValueError for what is no such file, and for pickled objects, which run code."""
    if not path.is_file():
        raise ValueError(f"There is no file {path}.")
    try:
        with np.load(path, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
    except (ValueError, OSError, EOFError, TypeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: it is no NumPy archive of plain arrays (.npz), or it is damaged.") from error


def _first_problem(arrays: dict[str, np.ndarray], environment: Environment | None) -> str:
    """Returns why arrays are not preferences over segments; an empty string if they are."""
    missing = [name for name in NEEDED if name not in arrays]
    unknown = [name for name in arrays if name not in NEEDED + OPTIONAL]
    if missing or unknown:
        return f"it holds no {' and no '.join(missing)}" if missing else f"{unknown[0]} is no array of this format"
    for name, array in arrays.items():
        if array.dtype.kind not in "iufb":
            return f"{name} has the type {array.dtype}, expected numbers"
        if not np.all(np.isfinite(array)):
            return f"{name} is not finite"
    observations, actions, labels = (arrays[name] for name in NEEDED)
    if observations.ndim < 4 or observations.shape[1] != 2 or 0 in observations.shape:
        return f"observations has the shape {observations.shape}, expected [N, 2, T, O]"
    count, _, steps = leading = observations.shape[:3]
    if actions.shape[:3] != leading or actions.ndim not in (3, 4):
        return f"actions has the shape {actions.shape}, expected {leading} or that and D"
    if actions.ndim == 3 and actions.dtype.kind not in "iu":
        return f"actions has the type {actions.dtype} and no dimension D; a real action is [N, 2, T, D]"
    shapes = {"labels": (count,), "lengths": (count, 2), "rewards": leading}
    for name in (name for name in shapes if name in arrays):
        if arrays[name].shape != shapes[name]:
            return f"{name} has the shape {arrays[name].shape}, expected {shapes[name]}"
    if not np.all(((labels >= 0) & (labels <= 1)) | (labels == -1)):
        return "labels must lie in [0, 1], or be -1 for a skipped pair"
    lengths = arrays.get("lengths", np.full((count, 2), steps))
    if lengths.dtype.kind not in "iu" or not np.all((lengths >= 1) & (lengths <= steps)):
        return f"lengths must be whole numbers from 1 to {steps}"
    return "" if environment is None else _misfit(observations, actions, environment)


def _misfit(observations: np.ndarray, actions: np.ndarray, environment: Environment) -> str:
    size = int(np.prod(observations.shape[3:]))
    if size != environment.observation_size:
        return f"observations have {size} numbers, those of {environment.name} {environment.observation_size}"
    if environment.continuous != (actions.ndim == 4):
        kind = "vectors of reals" if environment.continuous else "integers"
        return f"the actions of {environment.name} are {kind}, those of the file are not"
    if environment.continuous and actions.shape[3] != environment.actions:
        return f"actions have {actions.shape[3]} dimensions, those of {environment.name} {environment.actions}"
    if not environment.continuous and not np.all((actions >= 0) & (actions < environment.actions)):
        return f"the actions of {environment.name} are 0 to {environment.actions - 1}, those of the file are not"
    return ""
