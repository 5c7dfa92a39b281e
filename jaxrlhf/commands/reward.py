"""Reward learning from human preferences: `jaxrlhf reward`."""

import dataclasses
import pathlib
import time
from collections.abc import Callable
from typing import ClassVar

import jax
import numpy as np

from jaxrlhf import preferences
from jaxrlhf.base.types import Params
from jaxrlhf.commands.adapters import configured_adapters, dtype_of
from jaxrlhf.commands.curves import draw_history
from jaxrlhf.commands.data import data_notes, data_rows
from jaxrlhf.commands.experts import expert_load, with_load
from jaxrlhf.commands.flags import check_flags
from jaxrlhf.commands.models import open_reward
from jaxrlhf.commands.options import Groups
from jaxrlhf.commands.pairs import PairConfig, PairInputs, read_pairs
from jaxrlhf.commands.reward_report import (
    accuracy_json,
    accuracy_table,
    draw_reliability,
    evaluate_reward,
    score_pairs,
)
from jaxrlhf.commands.running import finish
from jaxrlhf.commands.stage import (
    Stage,
    StageResult,
    number_of_steps,
    save_models,
    train,
)
from jaxrlhf.commands.trainable import Trainable, trainable_reward
from jaxrlhf.data.batches import Pairs
from jaxrlhf.data.pipelines import pair_batches
from jaxrlhf.data.tokenization import PairRow
from jaxrlhf.evaluation.preferences import preference_accuracy
from jaxrlhf.lm.learning import pair_scores, preference_loss
from jaxrlhf.lm.reward import RewardModel, reward_model
from jaxrlhf.lm.transformer.model import decoder
from jaxrlhf.training.processes import gathered, is_first_process

Differences = Callable[[Params, Params], np.ndarray]
"""`(params, frozen) -> ` reward of the first completion minus that of the second, `[N]`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reward(PairConfig):
    """Fits a reward model to preferences and evaluates it on held-out ones.

    Reads pairs (`prompt`, `chosen`, `rejected`, optionally `margin`), rankings (equal ranks are ties), or completions
    labelled good and bad.
    """

    GROUPS: ClassVar[Groups] = {
        "main settings": ("policy",),
        "loss": ("smoothing", "margins", "ties", "centre"),
    }

    policy: pathlib.Path
    """Model whose trunk the reward starts from, or a reward model to continue: a directory, or a run's folder."""
    smoothing: float = 0.0
    """Label smoothing: the assumed probability that a label is flipped."""
    margins: bool = True
    """Uses the margins in the data."""
    ties: float = 0.0
    """Half-width of the zone of reward differences called a tie (Rao-Kupper); 0 counts a tie as half a win each."""
    centre: float = 0.0
    """Weight of the squared sum of a pair's rewards, which keeps rewards centred on 0."""


def main(config: Reward) -> pathlib.Path:
    """Trains, evaluates and reports; returns the run's folder, with the model in `reward`.

    Raises:
        ValueError, DataError: a setting, a model or the data cannot be used; the message says what to change.
    """
    began = time.monotonic()
    inputs = prepare(config)
    trainable = trainable_reward(inputs.start, configured_adapters(config), jax.random.key(config.seed))
    model = reward_model(decoder(inputs.start.config, remat=config.remat))
    differences = _reward_differences(model, trainable, inputs.held_out.rows, config.batch_size)

    def write(result: StageResult) -> pathlib.Path:
        # Before the first step the held-out pairs have just been scored; here only the code counts.
        rewards = differences(result.params, trainable.frozen) if result.steps else np.zeros(len(inputs.held_out.rows))
        return _save(config, inputs, trainable, rewards, result, began)

    result = train(config, _stage(config, inputs, trainable, model, differences, write))
    return write(result) if is_first_process() else result.folder.path


def prepare(config: Reward) -> PairInputs:
    """Reads the model and the data.

    Raises:
        ValueError: all held-out pairs are ties; or as in `main`.
    """
    check_flags(config)
    configured_adapters(config)
    return read_pairs(config, open_reward(config.policy, dtype=dtype_of(config.dtype, config.lora_rank)))


def _reward_differences(model: RewardModel, trainable: Trainable, rows: list[PairRow], batch_size: int) -> Differences:
    score = jax.jit(lambda params, frozen, batch: pair_scores(model, trainable.params_of(params, frozen), batch))

    def differences(params: Params, frozen: Params) -> np.ndarray:
        rewards = score_pairs(lambda batch: gathered(score(params, frozen, batch)), rows, batch_size)
        return rewards[:, 0] - rewards[:, 1]

    return differences


def _stage(
    config: Reward,
    inputs: PairInputs,
    trainable: Trainable,
    model: RewardModel,
    differences: Differences,
    write: Callable[[StageResult], pathlib.Path],
) -> Stage:
    training, held_out, max_length = inputs.training, inputs.held_out, inputs.max_length
    steps, labels = number_of_steps(config, len(training.rows)), np.array([row.label for row in held_out.rows])
    loss = preference_loss(
        model,
        smoothing=config.smoothing,
        margins=config.margins,
        choice=preferences.Choice(tie=config.ties),
        centre=config.centre,
        params_of=trainable.params_of,
    )

    def evaluate(params: Params, frozen: Params) -> dict[str, float]:
        accuracy = preference_accuracy(differences(params, frozen), labels)
        return {
            "loss": accuracy.log_loss,
            "accuracy": accuracy.accuracy,
            "calibration_error": accuracy.calibration_error,
        }

    load = expert_load(inputs.start.config, [row.first.tokens for row in held_out.rows])
    multiple, tokens = min(128, max_length), 2 * config.batch_size * max_length
    return Stage(
        title="Reward learning",
        name="reward",
        loss=loss,
        trainable=trainable,
        batches=iter(pair_batches(training.rows, batch_size=config.batch_size, seed=config.seed, multiple=multiple)),
        steps=steps,
        count=_tokens_of,
        evaluate=with_load(evaluate, load, lambda params, frozen: trainable.params_of(params, frozen)["trunk"]),
        plan_rows={"model": f"{inputs.start.config.family}, {config.policy}"}
        | inputs.start.plan_rows()
        | data_rows(training, held_out, inputs.prepared)
        | {"steps": f"{steps} of {config.batch_size} pairs, at most {tokens:,} tokens each"},
        write=write,
    )


def _save(
    config: Reward,
    inputs: PairInputs,
    trainable: Trainable,
    rewards: np.ndarray,
    result: StageResult,
    began: float,
) -> pathlib.Path:
    save_models(result, inputs.start, trainable, "reward")
    folder, steps = result.folder, result.steps
    predictors = evaluate_reward(rewards, inputs.training, inputs.held_out, seed=config.seed)
    seconds = time.monotonic() - began
    folder.write_json("results.json", {"steps": steps, "seconds": seconds} | accuracy_json(predictors))
    draw_reliability(folder.path / "reliability.png", predictors["reward"].accuracy)
    curves = draw_history(folder, result.history, {"accuracy": "fraction", "loss": "nats per pair"})
    return finish(
        folder,
        config,
        accuracy_table(predictors),
        title="Reward learning",
        summary=f"{steps} steps in {seconds:.0f} s. The model is in the folder reward.",
        figures=[*curves, "reliability.png"],
        notes=[*data_notes(inputs.training, inputs.held_out, inputs.prepared), *result.notes],
    )


def _tokens_of(batch: Pairs) -> float:
    return float(np.sum(batch.mask))
