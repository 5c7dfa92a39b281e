"""Policies compared by an annotator, and reward models measured on preferences: `jaxrlhf evaluate`."""

import dataclasses
import pathlib
from typing import Literal

import jax
from rich.console import Console

from jaxrlhf.commands.comparison import LABELS, comparison_table, open_judge, policy_comparer
from jaxrlhf.commands.data import Format, open_records, told_of_bad
from jaxrlhf.commands.models import Model, open_model
from jaxrlhf.commands.reward import compare, draw_reliability, results_of, scores_of, verdict_table
from jaxrlhf.commands.running import begin, finish
from jaxrlhf.data.fitted import described, fit_pairs, fit_prompts
from jaxrlhf.lm.learning import pair_scores
from jaxrlhf.lm.memory import bytes_of
from jaxrlhf.lm.reward import reward_model
from jaxrlhf.lm.transformer.model import decoder
from jaxrlhf.training.progress import bytes_text, count_text, plan
from jaxrlhf.training.report import Samples


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """Compares a policy with its reference, or measures a reward model on preferences.

    With --policy, --reference and --annotator or --score: win rate, KL and length on the prompts of --data. With --reward:
    accuracy and calibration on the pairs of --data.
    """

    data: str
    """A .jsonl or .jsonl.gz file, a folder of them, or hh-rlhf:NAME for a published file."""
    policy: pathlib.Path | None = None
    reference: pathlib.Path | None = None
    annotator: str | None = None
    """Who compares two answers: `module:function` of (prompts, firsts, seconds), a reward model's directory, or a judge
    behind an OpenAI-style address, `http://HOST:PORT/v1#MODEL` (key in OPENAI_API_KEY; each verdict is paid for once)."""
    score: str | None = None
    """Instead of --annotator, `module:function` of (prompts, completions) to scores."""
    reward: pathlib.Path | None = None
    split: Literal["all", "train", "test"] = "all"
    """Of the data, by --held-out: `test` is what a run with the same share held out."""
    held_out: float = 0.1
    format: Format = "auto"
    """How the data are written; see `jaxrlhf.data`."""
    skip_bad: bool = False
    """Skips lines that cannot be read, and lists them."""
    prompts: int = 256
    """Prompts that the policies are compared on."""
    max_length: int = 512
    """Tokens of a text."""
    cut_prompts: bool = False
    """Takes tokens from the beginning of long prompts."""
    max_new_tokens: int = 48
    batch_size: int = 32
    seed: int = 0
    output: pathlib.Path = pathlib.Path("runs")
    """Where the run's own folder is made."""
    data_dir: pathlib.Path = pathlib.Path("runs/data")
    """Where prepared data lie."""


def main(config: Evaluate) -> pathlib.Path:
    """Runs it; returns the run's folder.

    Raises:
        ValueError, DataError: what is given cannot be used; the message says what to change.
    """
    if config.prompts < 1 or config.batch_size < 1:
        raise ValueError("--prompts and --batch-size must be at least 1.")
    if (config.reward is None) == (config.policy is None):
        raise ValueError("Give --policy with --reference, or --reward: one thing is evaluated at a time.")
    prepared = open_records(
        config.data, form=config.format, held_out=config.held_out, skip_bad=config.skip_bad, data_dir=config.data_dir
    )
    splits = prepared.splits if config.split == "all" else {config.split: prepared.splits.get(config.split, [])}
    records = [record for source in splits.values() for record in source]
    run = _reward if config.reward is not None else _policies
    return run(config, records, told_of_bad(prepared))


def _reward(config: Evaluate, records: list, notes: list[str]) -> pathlib.Path:
    assert config.reward is not None
    model = open_model(config.reward, "reward")
    length = min(config.max_length, model.config.context_length)
    fitted = fit_pairs(model.words.codec(), records, max_length=length, cut_prompts=config.cut_prompts)
    score = jax.jit(lambda batch: pair_scores(reward_model(decoder(model.config)), model.params, batch))
    _tell(model, {"pairs": described(fitted)})
    scores = scores_of(score, fitted.rows, config.batch_size)
    judged = compare(scores[:, 0] - scores[:, 1], None, fitted, seed=config.seed)
    folder, table = begin(config, "evaluate"), verdict_table(judged)
    draw_reliability(folder.path / "reliability.png", judged["reward"][0])
    folder.write_json("results.json", results_of(judged))
    return finish(
        folder,
        config,
        table,
        title="Evaluation",
        summary=str(config.reward),
        figures=["reliability.png"],
        notes=[*notes, described(fitted) + "."],
    )


def _policies(config: Evaluate, records: list, notes: list[str]) -> pathlib.Path:
    if config.reference is None:
        raise ValueError("Give --reference: a policy is compared with one.")
    assert config.policy is not None
    model, reference = open_model(config.policy, "policy"), open_model(config.reference, "policy")
    if model.config != reference.config:
        raise ValueError("Policy and reference are of different shapes; the KL between them needs one model.")
    judge = open_judge(config.annotator, config.score, model, journal=config.data_dir / LABELS)
    longest = min(config.max_length, model.config.context_length - config.max_new_tokens)
    fitted = fit_prompts(model.words.codec(), records, max_length=longest, cut_prompts=config.cut_prompts)
    asked = fitted.rows[: config.prompts]
    answers = f"{2 * len(asked)} of at most {config.max_new_tokens} tokens, {len(asked)} labels"
    _tell(model, {"prompts": described(fitted), "answers": answers})
    compare_with = policy_comparer(reference, asked, judge, max_new_tokens=config.max_new_tokens, seed=config.seed)
    verdict = compare_with(model.params)
    folder, table = begin(config, "evaluate"), comparison_table({"policy": verdict}, labels={})
    folder.write_json("results.json", verdict.numbers())
    samples = [Samples("Answers", ("reference", "policy"), verdict.samples[:12])]
    return finish(
        folder,
        config,
        table,
        title="Evaluation",
        summary=str(config.policy),
        samples=samples,
        notes=[*notes, described(fitted) + "."],
    )


def _tell(model: Model, rows: dict[str, str]) -> None:
    parameters = sum(leaf.size for leaf in jax.tree.leaves(model.params))
    held = f"{count_text(parameters)} parameters, {bytes_text(bytes_of(model.params))}"
    devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    plan(Console(), "Evaluation", {"model": f"{model.config.family}, {held}"} | rows | {"devices": devices})
