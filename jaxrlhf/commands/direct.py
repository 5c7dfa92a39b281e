"""Direct preference learning from pairs at hand: `jaxrlhf dpo`."""

import dataclasses
import pathlib
import time
from collections.abc import Callable
from typing import ClassVar, Literal

import jax
import numpy as np

from jaxrlhf.algorithms.direct_preference import PairLoss, dpo, ipo, simpo
from jaxrlhf.base.types import Params
from jaxrlhf.commands.adapters import configured_adapters, dtype_of
from jaxrlhf.commands.curves import draw_history
from jaxrlhf.commands.data import data_notes, data_rows
from jaxrlhf.commands.experts import expert_load, with_load
from jaxrlhf.commands.flags import check_flags, refuse_unused
from jaxrlhf.commands.models import open_model
from jaxrlhf.commands.options import Groups
from jaxrlhf.commands.pairs import PairConfig, PairInputs, read_pairs
from jaxrlhf.commands.running import finish
from jaxrlhf.commands.stage import Stage, StageResult, number_of_steps, save_models, train
from jaxrlhf.commands.supervised import GreedySamples
from jaxrlhf.commands.trainable import Trainable, trainable_policy
from jaxrlhf.data.batches import Pairs, padded_pairs
from jaxrlhf.data.pipelines import evaluation_batches, pair_batches
from jaxrlhf.data.tokenization import PairRow
from jaxrlhf.evaluation.statistics import wilson
from jaxrlhf.lm.direct import Scorer, direct_loss, pair_scorer
from jaxrlhf.lm.learning import ParamsOf, full_params
from jaxrlhf.lm.transformer.config import DecoderConfig
from jaxrlhf.lm.transformer.model import decoder
from jaxrlhf.training.processes import gathered, is_first_process
from jaxrlhf.training.report import Table

BETA = {"dpo": 0.1, "robust": 0.1, "ipo": 0.1, "simpo": 2.0}
"""Default of --beta for each --loss."""
UNUSED = {
    "dpo": ["gamma"],
    "robust": ["gamma"],
    "ipo": ["gamma", "smoothing"],
    "simpo": ["reference_free"],
}
"""Settings that a loss does not read."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Direct(PairConfig):
    """Trains a policy on preferences directly, without a reward model.

    Reads the pairs that `jaxrlhf reward` reads. The reference is the policy before the first step.
    """

    GROUPS: ClassVar[Groups] = {
        "main settings": ("policy", "loss", "beta"),
        "loss": ("smoothing", "reference_free", "gamma"),
    }

    policy: pathlib.Path
    """Model to train, and the reference: a Hugging Face directory, or a run's folder."""
    loss: Literal["dpo", "robust", "ipo", "simpo"] = "dpo"
    """Loss of a pair, as in TRL; robust is dpo without the bias that --smoothing gives it; simpo has no reference."""
    beta: float | None = None
    """Weight of the KL to the reference (ipo: 1/(2 beta) is the target of the mean log-ratio a token; simpo: scale of the
    log-probability a token); by default 0.1, with simpo 2."""
    smoothing: float = 0.0
    """Label smoothing: the assumed probability that a label is flipped; not for ipo."""
    reference_free: bool = False
    """Leaves the reference out, as if it gave all completions the same probability."""
    gamma: float = 0.5
    """The margin of simpo, by which the preferred completion's scaled log-probability a token should be larger."""
    learning_rate: float = 1e-5
    """Peak learning rate of AdamW; it decays to a tenth along a cosine. Adapters need about ten times as much."""

    @property
    def kl_weight(self) -> float:
        """Beta, or the loss's default."""
        return BETA[self.loss] if self.beta is None else self.beta


def main(config: Direct) -> pathlib.Path:
    """Trains, evaluates and reports; returns the run's folder, with the model in `policy`.

    Raises:
        ValueError, DataError: a setting, a model or the data cannot be used; the message says what to change.
    """
    began = time.monotonic()
    inputs = prepare(config)
    trainable = trainable_policy(inputs.start, configured_adapters(config), jax.random.key(config.seed))
    if has_reference(config) and not config.lora_rank:
        # Under adapters the frozen base is the reference.
        trainable = trainable._replace(frozen=inputs.start.params)
    samples = None
    if is_first_process():
        samples = GreedySamples(inputs.start, inputs.held_out_records, inputs.max_length)

    def write(result: StageResult) -> pathlib.Path:
        assert samples is not None
        return _save(config, inputs, trainable, result, samples, began)

    result = train(config, _stage(config, inputs, trainable, write))
    return write(result) if is_first_process() else result.folder.path


def prepare(config: Direct) -> PairInputs:
    """Reads the model and the data."""
    check_flags(config)
    configured_adapters(config)
    refuse_unused(config, UNUSED[config.loss], f"with --loss {config.loss}")
    if config.loss == "robust" and not config.smoothing:
        raise ValueError("--loss robust needs --smoothing, the probability of a wrong label; or give --loss dpo.")
    if not 0 <= config.smoothing < 0.5:
        raise ValueError(f"--smoothing must lie in [0, 1/2), got {config.smoothing:g}.")
    return read_pairs(config, open_model(config.policy, "policy", dtype=dtype_of(config.dtype, config.lora_rank)))


def pair_loss(config: Direct) -> PairLoss:
    """Returns the loss of a pair; equal to TRL's of that name (`DPOTrainer`; simpo: `CPOTrainer`)."""
    beta = config.kl_weight
    smoothing = config.smoothing
    losses = {
        "dpo": lambda: dpo(beta=beta, label_smoothing=smoothing),
        "robust": lambda: dpo(beta=beta, label_smoothing=smoothing, unbiased=True),
        "ipo": lambda: ipo(beta=beta, average=True),
        "simpo": lambda: simpo(beta=beta, margin=config.gamma / beta, label_smoothing=smoothing),
    }
    return losses[config.loss]()


def has_reference(config: Direct) -> bool:
    """Returns whether the loss compares the policy with a reference."""
    return config.loss != "simpo" and not config.reference_free


def scorer_of(config: Direct, shape: DecoderConfig, params_of: ParamsOf = full_params) -> Scorer:
    """Returns the loss of pairs for the trained and the frozen parameters of a run; the frozen ones are the reference's.

    Args:
        config: of the run.
        shape: of the model.
        params_of: `(params, frozen) -> the policy's parameters`.
    """
    # Float32 whatever the weights are stored in: the reference must compute as the policy does, or rounding counts as KL.
    model = decoder(shape, dtype=np.float32, remat=config.remat)
    return pair_scorer(
        model,
        pair_loss(config),
        params_of=params_of,
        reference_of=(lambda frozen: frozen) if has_reference(config) else None,
        average=config.loss in ("ipo", "simpo"),
    )


def _stage(
    config: Direct, inputs: PairInputs, trainable: Trainable, write: Callable[[StageResult], pathlib.Path]
) -> Stage:
    training, held_out, max_length = inputs.training, inputs.held_out, inputs.max_length
    steps, scorer = (
        number_of_steps(config, len(training.rows)),
        scorer_of(config, inputs.start.config, trainable.params_of),
    )
    load = expert_load(inputs.start.config, [row.first.tokens for row in held_out.rows])
    multiple, tokens = min(128, max_length), 2 * config.batch_size * max_length
    return Stage(
        title="Direct preference learning",
        name="dpo",
        loss=direct_loss(scorer),
        trainable=trainable,
        batches=iter(pair_batches(training.rows, batch_size=config.batch_size, seed=config.seed, multiple=multiple)),
        steps=steps,
        count=lambda batch: float(np.sum(batch.mask)),
        evaluate=with_load(_evaluation(scorer, held_out.rows, config.batch_size), load, trainable.params_of),
        plan_rows={"model": f"{inputs.start.config.family}, {config.policy}"}
        | inputs.start.plan_rows()
        | data_rows(training, held_out, inputs.prepared)
        | margin_row(inputs)
        | {"steps": f"{steps} of {config.batch_size} pairs, at most {tokens:,} tokens each"},
        write=write,
    )


def _evaluation(scorer: Scorer, rows: list[PairRow], batch_size: int) -> Callable[[Params, Params], dict[str, float]]:
    loss = direct_loss(scorer)

    @jax.jit
    def score(params: Params, batch: Pairs, frozen: Params):
        return loss(params, batch, frozen), scorer(params, batch, frozen).log_ratio

    def evaluate(params: Params, frozen: Params) -> dict[str, float]:
        sums, ratios = np.zeros(3), []
        for indices, batch in evaluation_batches(rows, padded_pairs, batch_size=batch_size, multiple=128):
            totals, ratio = gathered(score(params, batch, frozen))
            sums += np.array([float(total) for total in totals])
            decided = (indices >= 0) & (batch.labels != 0.5)
            first = batch.labels[decided, None] > 0.5
            ratio = np.asarray(ratio)[decided]
            ratios.append(np.where(first, ratio, ratio[:, ::-1]))
        preferred, other = np.concatenate(ratios).mean(axis=0)
        metrics = {"loss": sums[0] / sums[2], "accuracy": sums[1] / sums[2]}
        return metrics | {"preferred": float(preferred), "rejected": float(other)}

    return evaluate


def margin_row(inputs: PairInputs) -> dict[str, str]:
    """Returns the row of a plan on margins in the data; empty if there are none."""
    margins = sum(row.margin != 0 for row in (*inputs.training.rows, *inputs.held_out.rows))
    return {"margins": f"{margins:,} pairs have one, which only `jaxrlhf reward` reads"} if margins else {}


def _save(
    config: Direct,
    inputs: PairInputs,
    trainable: Trainable,
    result: StageResult,
    samples: GreedySamples,
    began: float,
) -> pathlib.Path:
    trained = save_models(result, inputs.start, trainable, "policy")
    folder, before, after = result.folder, result.before, result.history.metrics[-1]
    steps, seconds, pairs = result.steps, time.monotonic() - began, len(inputs.held_out.rows)
    folder.write_json("results.json", {"before": before, "after": after, "steps": steps, "seconds": seconds})
    return finish(
        folder,
        config,
        _table({"before": before, "after": after}, pairs, reference=has_reference(config)),
        title="Direct preference learning",
        summary=f"{steps} steps in {seconds:.0f} s. The model is in the folder policy.",
        figures=draw_history(folder, result.history, {"loss": "per pair", "accuracy": "fraction"}),
        samples=[samples.after(trained if result.steps else None)],
        notes=[
            *data_notes(inputs.training, inputs.held_out, inputs.prepared),
            *(f"Margins: {note}." for note in margin_row(inputs).values()),
            *result.notes,
        ],
    )


def _table(metrics: dict[str, dict[str, float]], pairs: int, *, reference: bool) -> Table:
    rows = []
    for name, row in metrics.items():
        low, high = wilson(row["accuracy"] * pairs, pairs)
        accuracy = f"{row['accuracy']:.3f}, 95% in {low:.3f} to {high:.3f}"
        rows.append((name, row["loss"], accuracy, row["preferred"], row["rejected"]))
    title = (
        f"On {pairs:,} held-out pairs; {'log-ratios to the reference' if reference else 'log-probabilities'} in nats"
    )
    return Table(title, ("policy", "loss per pair", "accuracy", "preferred", "rejected"), rows)
