"""How well a reward model predicts preferences, against two baselines: measurements, table and figure."""

import pathlib
from typing import Any, NamedTuple

import numpy as np

from jaxrlhf.data.batches import padded_pairs
from jaxrlhf.data.pipelines import evaluation_batches
from jaxrlhf.data.tokenization import PairRow, TokenizedRows
from jaxrlhf.evaluation.preferences import PreferenceAccuracy, accuracy_gain, fit_one_feature, preference_accuracy
from jaxrlhf.evaluation.statistics import NORMAL_95
from jaxrlhf.training.report import Table


class Predictor(NamedTuple):
    """How well a predictor does on held-out pairs.

    Attributes:
        accuracy: its accuracy, likelihood and calibration.
        reward_gain: accuracy of the reward model minus that of this predictor, on the same pairs.
        half_interval: half of the 95% interval of the gain.
    """

    accuracy: PreferenceAccuracy
    reward_gain: float
    half_interval: float


def score_pairs(score: Any, rows: list[PairRow], batch_size: int) -> np.ndarray:
    """Returns the rewards `[N, 2]` of pairs, in their order; `score` takes `Pairs`."""
    rewards = np.zeros((len(rows), 2))
    for indices, batch in evaluation_batches(rows, padded_pairs, batch_size=batch_size, multiple=128):
        real = indices >= 0
        rewards[indices[real]] = np.asarray(score(batch))[real]
    return rewards


def evaluate_reward(
    differences: np.ndarray, training: TokenizedRows[PairRow] | None, held_out: TokenizedRows[PairRow], *, seed: int
) -> dict[str, Predictor]:
    """Evaluates reward differences `[N]` on held-out pairs, beside two baselines that need no reward model.

    `length` fits one weight to the difference of the completions' lengths in tokens, on the training pairs, or on the
    held-out ones where there are none. `majority` predicts the same side for every pair, with the pairs in random order.
    """
    labels = np.array([row.label for row in held_out.rows])
    fitted_on = (training or held_out).rows
    weight = fit_one_feature(_length_differences(fitted_on), np.array([row.label for row in fitted_on]))
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], len(labels))
    predictions = {
        "reward": differences,
        "length": weight * _length_differences(held_out.rows),
        "majority": 1e-3 * signs,
    }
    return {
        name: Predictor(preference_accuracy(predicted, labels), *accuracy_gain(differences, predicted, labels))
        for name, predicted in predictions.items()
    }


def _length_differences(rows: list[PairRow]) -> np.ndarray:
    return np.array([float(row.first.completion_mask.sum()) - float(row.second.completion_mask.sum()) for row in rows])


def accuracy_table(predictors: dict[str, Predictor]) -> Table:
    """Returns the predictors of `evaluate_reward` as a table."""
    names = {"reward": "reward model", "length": "length of the completion", "majority": "majority, random order"}
    rows = []
    for name, (accuracy, gain, half) in predictors.items():
        interval = f"{accuracy.low:.3f} to {accuracy.high:.3f}"
        gained = None if name == "reward" else f"{gain:+.3f} ± {half:.3f}"
        rows.append((names[name], accuracy.accuracy, interval, gained, accuracy.log_loss, accuracy.calibration_error))
    columns = (
        "predictor",
        "accuracy",
        "95% interval",
        "reward model is better by",
        "nats per pair",
        "calibration error",
    )
    return Table(f"On {predictors['reward'].accuracy.pairs:,} held-out pairs", columns, rows)


def accuracy_json(predictors: dict[str, Predictor]) -> dict:
    """Returns the predictors of `evaluate_reward` for results.json."""
    return {
        name: accuracy._asdict() | {"reward_gains": gain, "reward_gains_half_interval": half}
        for name, (accuracy, gain, half) in predictors.items()
    }


def draw_reliability(path: pathlib.Path, accuracy: PreferenceAccuracy) -> None:
    """Draws accuracy by predicted confidence, and the number of pairs in each bin."""
    # Imported here, so that commands without a figure start sooner.
    from matplotlib.figure import Figure

    bins, figure = accuracy.reliability, Figure(figsize=(4.6, 4.2), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    filled = bins.count > 0
    error = NORMAL_95 * np.sqrt(np.maximum(bins.accuracy * (1 - bins.accuracy), 0)[filled] / bins.count[filled])
    above.plot([0.5, 1], [0.5, 1], color="0.6", linewidth=1, label="calibrated")
    above.errorbar(
        bins.confidence[filled], bins.accuracy[filled], yerr=error, fmt="o-", color="#0b6e99", label="held-out pairs"
    )
    above.set(ylabel="accuracy", ylim=(0, 1.05), title="Reliability")
    above.legend(frameon=False, fontsize=9)
    edges = np.linspace(0.5, 1, len(bins.count) + 1)
    below.bar(edges[:-1], bins.count, width=np.diff(edges), align="edge", color="#0b6e99", alpha=0.4)
    below.set(xlabel="confidence", ylabel="pairs")
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
