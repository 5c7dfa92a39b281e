"""Reward learning on human preferences: `jaxrlhf reward`."""

import dataclasses
import pathlib
import time
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure

from jaxrlhf import preferences
from jaxrlhf.commands.data import open_records, splits_of, told_of_bad
from jaxrlhf.commands.models import open_reward, save_model
from jaxrlhf.commands.running import finish
from jaxrlhf.commands.stage import (
    Training,
    draw_history,
    half_or_full,
    reward_learner,
    steps_of,
    train,
)
from jaxrlhf.data.batches import Pairs, padded_pairs
from jaxrlhf.data.fitted import Fitted, PairRow, described, fit_pairs
from jaxrlhf.data.pipelines import in_order, pair_batches
from jaxrlhf.evaluation.preferences import PreferenceAccuracy, fit_one_feature, gain, preference_accuracy
from jaxrlhf.lm.learning import pair_scores, preference_loss
from jaxrlhf.lm.reward import reward_model
from jaxrlhf.lm.transformer.model import decoder
from jaxrlhf.training.processes import first, gathered
from jaxrlhf.training.report import Table


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reward(Training):
    """Fits a reward model to preferences, and measures it on held-out ones.

    Reads pairs (`prompt`, `chosen`, `rejected`, perhaps `margin`), rankings (equal ranks are ties), or completions called
    good and bad.
    """

    policy: pathlib.Path
    """Model whose trunk the reward starts from, or a reward model to go on with: a directory, or a run's folder."""
    max_length: int = 512
    """Tokens of prompt and completion; longer completions are cut at their end."""
    cut_prompts: bool = False
    """Takes tokens from the beginning of long prompts; otherwise pairs with prompts too long are left out, and counted."""
    smoothing: float = 0.0
    """Probability that a label is taken to be the wrong way round."""
    margins: bool = True
    """Asks for the margins that the data tell."""
    ties: float = 0.0
    """Half the zone in which an annotator calls a tie (Rao-Kupper); 0 counts a tie half for each side."""
    centre: float = 0.0
    """Weight of the squared sum of a pair's rewards, which keeps them around 0."""


def main(config: Reward) -> pathlib.Path:
    """Runs it; returns the run's folder, with the model in `reward`.

    Raises:
        ValueError, DataError: what is given cannot be used; the message says what to change.
    """
    began = time.monotonic()
    start = open_reward(config.policy, dtype=half_or_full(config.dtype, config.lora_rank))
    prepared = open_records(
        config.data, form=config.format, held_out=config.held_out, skip_bad=config.skip_bad, data_dir=config.data_dir
    )
    max_length = min(config.max_length, start.config.context_length)
    fitted, held_out = (
        fit_pairs(start.words.codec(), part, max_length=max_length, cut_prompts=config.cut_prompts)
        for part in splits_of(prepared)
    )
    notes = [*told_of_bad(prepared), f"Learned from: {described(fitted)}.", f"Held out: {described(held_out)}."]
    steps = steps_of(config, len(fitted.rows))
    learner = reward_learner(start.params, config.lora_rank, jax.random.key(config.seed))
    model = reward_model(decoder(start.config, remat=config.remat))
    loss = preference_loss(
        model,
        smoothing=config.smoothing,
        margins=config.margins,
        choice=preferences.Choice(tie=config.ties),
        centre=config.centre,
        params_of=learner.params_of,
    )
    score = jax.jit(lambda trained, frozen, batch: pair_scores(model, learner.params_of(trained, frozen), batch))
    labels = np.array([row.label for row in held_out.rows])
    if np.all(labels == 0.5):
        raise ValueError(
            "All held-out pairs are ties, which say nothing of accuracy; give more data or another --held-out."
        )

    def differences(trained, frozen):
        found = scores_of(lambda batch: gathered(score(trained, frozen, batch)), held_out.rows, config.batch_size)
        return found[:, 0] - found[:, 1]

    def evaluate(trained, frozen):
        verdict = preference_accuracy(differences(trained, frozen), labels)
        return {
            "loss": verdict.log_loss,
            "accuracy": verdict.accuracy,
            "calibration_error": verdict.calibration_error,
        }

    multiple = min(128, max_length)
    batches = iter(pair_batches(fitted.rows, batch_size=config.batch_size, seed=config.seed, multiple=multiple))
    done = train(
        config,
        "Reward learning",
        "reward",
        loss,
        learner,
        batches,
        steps=steps,
        count=_tokens_of,
        evaluate=evaluate,
        told={
            "model": f"{start.config.family}, {config.policy}",
            "learned from": described(fitted),
            "held out": described(held_out),
            "bad lines": f"{len(prepared.bad)} skipped, listed in the report" if prepared.bad else "none",
            "steps": f"{steps} of {config.batch_size} pairs, at most {2 * config.batch_size * max_length:,} tokens each",
        },
    )
    folder, history = done.folder, done.history
    if not first():
        return folder.path
    trained = start._replace(params=learner.whole(done.params))
    save_model(folder.path / "reward", trained, "reward")
    if done.best is not None:
        save_model(folder.path / "best" / "reward", start._replace(params=learner.whole(done.best)), "reward")
    judged = compare(differences(done.params, learner.frozen), fitted, held_out, seed=config.seed)
    table = verdict_table(judged)
    seconds = time.monotonic() - began
    folder.write_json("results.json", {"steps": steps, "seconds": seconds} | results_of(judged))
    draw_reliability(folder.path / "reliability.png", judged["reward"][0])
    return finish(
        folder,
        config,
        table,
        title="Reward learning",
        summary=f"{steps} steps in {seconds:.0f} s. The model is in the folder reward.",
        figures=[*draw_history(folder, history, {"accuracy": "share", "loss": "nats a pair"}), "reliability.png"],
        notes=notes + done.notes,
    )


def scores_of(score: Any, rows: list[PairRow], batch_size: int) -> np.ndarray:
    """Returns the rewards `[N, 2]` of pairs, in their order; `score` takes `Pairs`."""
    found = np.zeros((len(rows), 2))
    for numbers, batch in in_order(rows, padded_pairs, batch_size=batch_size, multiple=128):
        real = numbers >= 0
        found[numbers[real]] = np.asarray(score(batch))[real]
    return found


def compare(
    differences: np.ndarray, fitted: Fitted[PairRow] | None, held_out: Fitted[PairRow], *, seed: int
) -> dict[str, tuple[PreferenceAccuracy, float, float]]:
    """Returns the verdicts on a reward and on what needs none, with the accuracy that the reward gains over each.

    `length` fits one weight to the difference of the completions' lengths in tokens, on the rows that the reward learned
    from, or on the held-out ones where there are no others. `majority` gives every pair, shown in a random order, the same
    answer.
    """
    learned = (fitted or held_out).rows
    labels = np.array([row.label for row in held_out.rows])
    weight = fit_one_feature(_longer(learned), np.array([row.label for row in learned]))
    shuffled = np.random.default_rng(seed).choice([-1.0, 1.0], len(labels))
    guesses = {"reward": differences, "length": weight * _longer(held_out.rows), "majority": 1e-3 * shuffled}
    return {
        name: (preference_accuracy(guess, labels), *gain(differences, guess, labels)) for name, guess in guesses.items()
    }


def _longer(rows: list[PairRow]) -> np.ndarray:
    return np.array([float(row.first.completion.sum()) - float(row.second.completion.sum()) for row in rows])


def verdict_table(judged: dict[str, tuple[PreferenceAccuracy, float, float]]) -> Table:
    """Returns what `compare` found, as a table."""
    names = {"reward": "reward model", "length": "length of the completion", "majority": "majority, random order"}
    rows = []
    for name, (verdict, more, half) in judged.items():
        interval = f"{verdict.low:.3f} to {verdict.high:.3f}"
        gained = None if name == "reward" else f"{more:+.3f} ± {half:.3f}"
        rows.append((names[name], verdict.accuracy, interval, gained, verdict.log_loss, verdict.calibration_error))
    columns = ("predictor", "accuracy", "95% interval", "reward model is better by", "nats a pair", "calibration error")
    return Table(f"On {judged['reward'][0].pairs:,} held-out pairs", columns, rows)


def results_of(judged: dict[str, tuple[PreferenceAccuracy, float, float]]) -> dict:
    """Returns what `compare` found, for a results.json."""
    return {
        name: verdict._asdict() | {"reward_gains": more, "reward_gains_half_interval": half}
        for name, (verdict, more, half) in judged.items()
    }


def draw_reliability(path: pathlib.Path, verdict: PreferenceAccuracy) -> None:
    """Draws how often predictions of a confidence were right, and how many pairs each bin holds."""
    bins, figure = verdict.reliability, Figure(figsize=(4.6, 4.2), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    filled = bins.count > 0
    error = 1.96 * np.sqrt(np.maximum(bins.accuracy * (1 - bins.accuracy), 0)[filled] / bins.count[filled])
    above.plot([0.5, 1], [0.5, 1], color="0.6", linewidth=1, label="calibrated")
    above.errorbar(
        bins.confidence[filled], bins.accuracy[filled], yerr=error, fmt="o-", color="#0b6e99", label="held-out pairs"
    )
    above.set(ylabel="share that was right", ylim=(0, 1.05), title="Reliability")
    above.legend(frameon=False, fontsize=9)
    edges = np.linspace(0.5, 1, len(bins.count) + 1)
    below.bar(edges[:-1], bins.count, width=np.diff(edges), align="edge", color="#0b6e99", alpha=0.4)
    below.set(xlabel="confidence", ylabel="pairs")
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def _tokens_of(batch: Pairs) -> float:
    return float(np.sum(batch.mask))
