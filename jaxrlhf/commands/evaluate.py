"""Comparison of policies by an annotator, and evaluation of reward models on preferences: `jaxrlhf evaluate`."""

import dataclasses
import pathlib
from typing import ClassVar, Literal

import jax
import numpy as np
from rich.console import Console

from jaxrlhf.commands.annotators import (
    JUDGE_SETTINGS,
    LABELS,
    AnnotatorConfig,
    judge_settings,
    open_annotator,
)
from jaxrlhf.commands.comparison import comparison_table, policy_comparer
from jaxrlhf.commands.data import Format, open_records, skipped_lines, unread_rows
from jaxrlhf.commands.flags import check_flags, refuse_unused
from jaxrlhf.commands.models import Model, check_tokens, open_model
from jaxrlhf.commands.options import Groups
from jaxrlhf.commands.reward_report import (
    accuracy_json,
    accuracy_table,
    draw_reliability,
    evaluate_reward,
    score_pairs,
)
from jaxrlhf.commands.running import finish, open_folder
from jaxrlhf.data.tokenization import describe_rows, tokenize_pairs, tokenize_prompts
from jaxrlhf.lm.learning import pair_scores
from jaxrlhf.lm.memory import tree_bytes
from jaxrlhf.lm.reward import reward_model
from jaxrlhf.lm.transformer.model import decoder
from jaxrlhf.training.progress import bytes_text, count_text, print_table
from jaxrlhf.training.report import Samples


@dataclasses.dataclass(frozen=True)
class Evaluate(AnnotatorConfig):
    """Compares a policy with its reference, or evaluates a reward model on preferences.

    With --policy, --reference and --annotator or --score: win rate, KL and length on the prompts of --data. With --reward:
    accuracy and calibration on the pairs of --data.
    """

    GROUPS: ClassVar[Groups] = {
        "main settings": ("data", "policy", "reference", "reward", "prompts", "max_new_tokens", "seed", "output"),
        "data": ("split", "held_out", "format", "skip_bad", "max_length", "cut_prompts", "batch_size", "data_dir"),
    }

    data: str
    """A .jsonl or .jsonl.gz file, a folder of them, or hh-rlhf:NAME for a published file."""
    policy: pathlib.Path | None = None
    """Policy to evaluate: a Hugging Face directory, or a run's folder."""
    reference: pathlib.Path | None = None
    """Policy to compare with."""
    reward: pathlib.Path | None = None
    """Reward model to evaluate: a Hugging Face directory, or a run's folder."""
    split: Literal["all", "train", "test"] = "all"
    """Part of the data to use; test is what a training run with the same --held-out held out."""
    held_out: float = 0.1
    """Fraction of the prompts in the split test."""
    format: Format = "auto"
    """Format of the data; see `jaxrlhf.data`."""
    skip_bad: bool = False
    """Skips unreadable lines and lists them in the report."""
    prompts: int = 256
    """Number of prompts that policies are compared on."""
    max_length: int = 512
    """Maximum length of a text in tokens."""
    cut_prompts: bool = False
    """Truncates long prompts at the beginning."""
    max_new_tokens: int = 48
    """Maximum length of a completion in tokens."""
    batch_size: int = 32
    """Pairs scored together."""
    seed: int = 0
    """Random seed."""
    output: pathlib.Path = pathlib.Path("runs")
    """Directory in which the run's folder is created."""
    data_dir: pathlib.Path = pathlib.Path("runs/data")
    """Directory for prepared data."""


def main(config: Evaluate) -> pathlib.Path:
    """Evaluates and reports; returns the run's folder.

    Raises:
        ValueError, DataError: a setting, a model or the data cannot be used; the message says what to change.
    """
    check_flags(config)
    if config.prompts < 1 or config.batch_size < 1:
        raise ValueError("--prompts and --batch-size must be at least 1.")
    if (config.reward is None) == (config.policy is None):
        raise ValueError("Give --policy with --reference, or --reward: one thing is evaluated at a time.")
    if config.reward is None:
        refuse_unused(config, ["batch_size"], "with --policy")
    else:
        unused = ["reference", "annotator", "score", *JUDGE_SETTINGS, "prompts", "max_new_tokens"]
        refuse_unused(config, unused, "with --reward")
    prepared = open_records(
        config.data, form=config.format, held_out=config.held_out, skip_bad=config.skip_bad, data_dir=config.data_dir
    )
    splits = prepared.splits if config.split == "all" else {config.split: prepared.splits.get(config.split, [])}
    records = [record for split in splits.values() for record in split]
    if not records:
        raise ValueError(f"No record is in --split {config.split}; give another --split or --held-out.")
    if prepared.unread:
        print_table(Console(), "Data", unread_rows(prepared))
    evaluate = _evaluate_policy if config.reward is None else _evaluate_reward
    return evaluate(config, records, skipped_lines(prepared))


def _evaluate_reward(config: Evaluate, records: list, notes: list[str]) -> pathlib.Path:
    assert config.reward is not None
    model = open_model(config.reward, "reward")
    length = min(config.max_length, model.config.context_length)
    pairs = tokenize_pairs(model.bundle.chat_tokenizer(), records, max_length=length, cut_prompts=config.cut_prompts)
    score = jax.jit(lambda batch: pair_scores(reward_model(decoder(model.config)), model.params, batch))
    _print_plan(model, {"pairs": describe_rows(pairs)})
    folder = open_folder(config, "evaluate")
    rewards = score_pairs(score, pairs.rows, config.batch_size)
    predictors = evaluate_reward(rewards[:, 0] - rewards[:, 1], None, pairs, seed=config.seed)
    draw_reliability(folder.path / "reliability.png", predictors["reward"].accuracy)
    folder.write_json("results.json", accuracy_json(predictors))
    return finish(
        folder,
        config,
        accuracy_table(predictors),
        title="Evaluation",
        summary=str(config.reward),
        figures=["reliability.png"],
        notes=[*notes, describe_rows(pairs) + "."],
    )


def _evaluate_policy(config: Evaluate, records: list, notes: list[str]) -> pathlib.Path:
    if config.reference is None:
        raise ValueError("Give --reference: a policy is compared with one.")
    assert config.policy is not None
    settings = judge_settings(config)
    model, reference = open_model(config.policy, "policy"), open_model(config.reference, "policy")
    if model.config != reference.config:
        raise ValueError("Policy and reference are of different shapes; the KL between them needs one model.")
    check_tokens(model.bundle, reference.bundle, "--reference")
    annotator = open_annotator(config.annotator, config.score, model, journal=config.data_dir / LABELS, judge=settings)
    longest = min(config.max_length, model.config.context_length - config.max_new_tokens)
    if longest < 2:
        raise ValueError(
            f"--max-new-tokens {config.max_new_tokens} leaves no room for a prompt: the model's context is "
            f"{model.config.context_length}."
        )
    tokenized = tokenize_prompts(
        model.bundle.chat_tokenizer(), records, max_length=longest, cut_prompts=config.cut_prompts
    )
    prompts = tokenized.rows[: config.prompts]
    completions = f"{2 * len(prompts)} of at most {config.max_new_tokens} tokens, {len(prompts)} labels"
    remarks = {"reference": "\n".join(reference.remarks("Reference"))} if reference.remarks("Reference") else {}
    _print_plan(model, {"prompts": describe_rows(tokenized), "completions": completions} | remarks)
    compare = policy_comparer(reference, prompts, annotator, max_new_tokens=config.max_new_tokens, seed=config.seed)
    # What cannot be written is better known before labels are paid for.
    folder = open_folder(config, "evaluate")
    comparison = compare(model.params)
    labels = [comparison.labels_note(), *annotator.notes()]
    notes = [*notes, *labels, describe_rows(tokenized) + "."]
    for note in labels:
        Console().print(note, markup=False, highlight=False)
    if not np.any(np.isfinite(comparison.wins)):
        raise ValueError(
            f"None of the {len(prompts)} pairs has a label, so that there is no win rate: "
            f"{config.annotator or config.score} gave none."
        )
    folder.write_json("results.json", comparison.summary())
    return finish(
        folder,
        config,
        comparison_table({"policy": comparison}, labels={}),
        title="Evaluation",
        summary=str(config.policy),
        samples=[Samples("Completions", ("reference", "policy"), comparison.samples[:12])],
        notes=notes,
    )


def _print_plan(model: Model, rows: dict[str, str]) -> None:
    parameters = sum(leaf.size for leaf in jax.tree.leaves(model.params))
    size = f"{count_text(parameters)} parameters, {bytes_text(tree_bytes(model.params))}"
    devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    rows = {"model": f"{model.config.family}, {size}"} | model.plan_rows() | rows | {"devices": devices}
    print_table(Console(), "Evaluation", rows)
