"""`jaxrlhf align --rewards`: the reward is a mixture of users' functions, whose weights are learned from the labels."""

import json
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrlhf.annotation.functions import Score, host_scores, optional_scores, score_function, with_timeout
from jaxrlhf.annotation.label_cache import cached_annotator
from jaxrlhf.base.problem import Sample
from jaxrlhf.commands.align_config import Align
from jaxrlhf.commands.comparison import Comparison
from jaxrlhf.commands.models import Model
from jaxrlhf.evaluation.statistics import NORMAL_95
from jaxrlhf.preferences.mixture import MixtureReward
from jaxrlhf.preferences.scale import ScaledReward
from jaxrlhf.training.processes import broadcast_array, is_first_process, split_over_processes
from jaxrlhf.training.report import Table
from jaxrlhf.training.run_folder import RunFolder

UNITS = "mixture.json"
"""File of a run with the unit of each score, and at the end with the weights."""
LAST = 0.25
"""Part of a run, at its end, over which marginal gains are averaged."""


class Mixture(NamedTuple):
    """The functions of --rewards, K of them.

    Attributes:
        names: `module:function`.
        functions: `(prompts, completions) -> scores`, called in every process with its share of the texts.
        start: initial weights `[K]`, in reward per standard deviation.
    """

    names: tuple[str, ...]
    functions: tuple[Score, ...]
    start: np.ndarray


class Units(NamedTuple):
    """Mean and standard deviation of each score among the reference's completions, `[K]`."""

    mean: np.ndarray
    deviation: np.ndarray

    def standard(self, scores: np.ndarray) -> np.ndarray:
        """Returns scores `[..., K]` in standard deviations from their mean; 0 where there is none (NaN)."""
        return np.nan_to_num((scores - self.mean) / self.deviation, nan=0.0).astype(np.float32)


def open_mixture(config: Align) -> Mixture | None:
    """Returns the mixture of --rewards; None without any.

    Raises:
        ValueError: a function cannot be found.
    """
    if not config.rewards:
        return None
    functions = tuple(
        split_over_processes(with_timeout(score_function(name), config.annotator_timeout, name))
        for name in config.rewards
    )
    start = np.asarray(config.reward_weights or [0.0] * len(functions), np.float32)
    return Mixture(config.rewards, functions, start)


def upper_with_mixture(mixture: Mixture, network: Any) -> MixtureReward:
    """Returns the initial upper parameters; `network` is `()` where no model is added."""
    return MixtureReward(jnp.asarray(mixture.start), network)


def weights_of(state: Any) -> jax.Array:
    """Returns the weights `[K]` that the policy sees: times the learned scale, if there is one."""
    upper = state.upper
    if isinstance(upper, ScaledReward):
        return jnp.exp(upper.log_scale) * upper.reward.weights
    return upper.weights


def measure_units(mixture: Mixture, reference: Comparison, folder: RunFolder) -> Units:
    """Returns each score's unit on completions of held-out prompts by the reference; a resumed run keeps its own.

    A score that is the same for all of them keeps its own unit.

    Args:
        mixture: of the run.
        reference: the reference compared with itself.
        folder: of the run, which gets `UNITS`.

    Raises:
        ValueError: a function does not give scores.
    """
    several = jax.process_count() > 1
    known = _read_units(folder.path / UNITS, mixture.names) if is_first_process() else None
    stored = np.array([known is not None])
    # All processes call the functions, or none: each scores its share of the texts.
    if not (broadcast_array(stored) if several else stored)[0]:
        prompts, pairs = zip(*reference.samples, strict=True)
        texts, prompts = [text for pair in zip(*pairs, strict=True) for text in pair], [*prompts, *prompts]
        columns = [
            optional_scores(function(prompts, texts), len(texts), name)
            for name, function in zip(mixture.names, mixture.functions, strict=True)
        ]
        known = np.array([_moments(column[np.isfinite(column)]) for column in columns])
    elif known is None:
        known = np.zeros((len(mixture.names), 2))
    if several:
        known = broadcast_array(known)
    units = Units(known[:, 0], known[:, 1])
    if is_first_process():
        folder.write_json(UNITS, {"rewards": dict(_unit_rows(mixture.names, units))})
    return units


def scorer(mixture: Mixture, units: Units, policy: Model, folder: RunFolder) -> Callable[[Any, Sample], np.ndarray]:
    """Returns `(key, sample) -> scores [B, M, 2, K]` in their units, cached in the run's folder like labels."""
    score = host_scores(policy.bundle.tokenizer, mixture.functions, mixture.names)
    return cached_annotator(
        lambda key, sample: units.standard(score(key, sample)),
        folder.path / "scores.jsonl" if is_first_process() else None,
        agreed=broadcast_array if jax.process_count() > 1 else None,
        shape=(2, len(mixture.names)),
    )


def mixture_tables(
    mixture: Mixture | None, units: Units | None, folder: RunFolder, state: Any, rows: Sequence[dict[str, Any]]
) -> list[Table]:
    """Writes what a run has learned of its mixture to `UNITS`; returns it as a table of the report, if there is one."""
    if mixture is None or units is None:
        return []
    learned = entries(mixture, units, state, rows)
    write_mixture(folder, units, learned)
    return [mixture_table(learned)]


class Entry(NamedTuple):
    """What a run has learned of one score.

    Attributes:
        name: `module:function`.
        weight: at the end, in reward per standard deviation of the score, as the policy sees it.
        per_point: the same, in reward per point of the score.
        gain: marginal gain, averaged over the end of the run.
        half_interval: of the gain, 95%.
    """

    name: str
    weight: float
    per_point: float
    gain: float
    half_interval: float


def entries(mixture: Mixture, units: Units, state: Any, rows: Sequence[dict[str, Any]]) -> list[Entry]:
    """Returns an entry for each score.

    Args:
        mixture: of the run.
        units: of its scores.
        state: the last one.
        rows: the steps' metrics.
    """
    weights = np.asarray(weights_of(state))
    last = rows[-max(10, math.ceil(LAST * len(rows))) :]
    result = []
    for name, weight, deviation in zip(mixture.names, weights, units.deviation, strict=True):
        gains = np.array([row[f"gain/{name}"] for row in last])
        half = NORMAL_95 * float(gains.std(ddof=1)) / len(gains) ** 0.5 if len(gains) > 1 else math.nan
        mean = float(gains.mean()) if len(gains) else math.nan
        result.append(Entry(name, float(weight), float(weight) / float(deviation), mean, half))
    return result


def mixture_table(learned: Sequence[Entry]) -> Table:
    """Returns the learned weights as a table of the report."""
    rows = [
        (
            entry.name,
            f"{entry.weight:.3g}",
            f"{entry.per_point:.3g}",
            f"{entry.gain:+.4f} ± {entry.half_interval:.4f}",
        )
        for entry in learned
    ]
    title = (
        "The mixture of rewards (gain: in win rate less the price of KL, for a unit more of log-tilt along the score)"
    )
    return Table(title, ("score", "weight per standard deviation", "weight per point", "marginal gain"), rows)


def write_mixture(folder: RunFolder, units: Units, learned: Sequence[Entry]) -> None:
    """Writes `UNITS` with the weights that were learned."""
    found = dict(_unit_rows([entry.name for entry in learned], units))
    folder.write_json(
        UNITS,
        {
            "rewards": {
                entry.name: found[entry.name]
                | {
                    "weight": entry.weight,
                    "weight_per_point": entry.per_point,
                    "marginal_gain": entry.gain,
                    "marginal_gain_half_interval": entry.half_interval,
                }
                for entry in learned
            }
        },
    )


def _unit_rows(names: Sequence[str], units: Units) -> list[tuple[str, dict[str, float]]]:
    columns = zip(names, *units, strict=True)
    return [(name, {"mean": float(mean), "standard_deviation": float(width)}) for name, mean, width in columns]


def _moments(scores: np.ndarray) -> tuple[float, float]:
    if not len(scores):
        return 0.0, 1.0
    deviation = float(scores.std())
    # A score that rounding alone tells apart is the same for all.
    constant = deviation <= 1e-6 * max(1.0, float(np.abs(scores).max()))
    return float(scores.mean()), 1.0 if constant else deviation


def _read_units(path: pathlib.Path, names: Sequence[str]) -> np.ndarray | None:
    if not path.is_file():
        return None
    rewards = json.loads(path.read_text())["rewards"]
    return np.array([[rewards[name]["mean"], rewards[name]["standard_deviation"]] for name in names])
