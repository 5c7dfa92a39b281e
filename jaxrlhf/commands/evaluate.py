"""Comparison of policies by an annotator, and evaluation of reward models on preferences: `jaxrlhf evaluate`."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import ClassVar, Literal

import jax
import tyro
from rich.console import Console

from jaxrlhf.commands.annotators import (
    JUDGE_SETTINGS,
    AnnotatorConfig,
)
from jaxrlhf.commands.best_of import LARGEST
from jaxrlhf.commands.compilation import CompilationConfig
from jaxrlhf.commands.data import Format, open_records, skipped_lines, unread_rows
from jaxrlhf.commands.flags import check_flags, refuse_unused
from jaxrlhf.commands.models import Model, open_model
from jaxrlhf.commands.options import Groups
from jaxrlhf.commands.people import PAGE_SETTINGS
from jaxrlhf.commands.policies import evaluate_policies
from jaxrlhf.commands.reward_report import (
    accuracy_json,
    accuracy_table,
    draw_reliability,
    evaluate_reward,
    score_pairs,
)
from jaxrlhf.commands.running import finish, open_folder
from jaxrlhf.data.tokenization import describe_rows, tokenize_pairs
from jaxrlhf.lm.learning import pair_scores
from jaxrlhf.lm.memory import tree_bytes
from jaxrlhf.lm.reward import reward_model
from jaxrlhf.lm.transformer.model import decoder
from jaxrlhf.training.progress import bytes_text, count_text, print_table


@dataclasses.dataclass(frozen=True)
class Evaluate(AnnotatorConfig, CompilationConfig):
    """Compares policies with a reference, or evaluates a reward model on preferences.

    With --policy, --reference and --annotator or --score: win rate, KL and length on the prompts of --data. With --reward
    alone: accuracy and calibration on the pairs of --data.
    """

    GROUPS: ClassVar[Groups] = {
        "main settings": (
            *("data", "policy", "reference", "reward", "best_of", "prompts", "completions", "max_new_tokens"),
            *("seed", "output"),
        ),
        "data": ("split", "held_out", "format", "skip_bad", "max_length", "cut_prompts", "batch_size", "data_dir"),
    }

    data: str
    """A .jsonl, .parquet or .csv file, a folder of them, a name on a hub as org/name[@revision][:part], or hh-rlhf:NAME
    for a published file."""
    policy: tyro.conf.UseAppendAction[tuple[pathlib.Path, ...]] = ()
    """Policy to evaluate: a Hugging Face directory, or a run's folder. Several are compared in one table."""
    reference: pathlib.Path | None = None
    """Policy to compare with."""
    reward: pathlib.Path | None = None
    """Reward model to evaluate: a Hugging Face directory, or a run's folder. With --best-of the one that chooses."""
    best_of: tuple[int, ...] = ()
    """Also compares the best of n completions of the reference by --reward, for each n, such as 2 4 8 16 32 64."""
    completions: int = 1
    """Completions of each prompt by each policy; each costs a label."""
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
    # From Python a single path will do.
    policies = config.policy if isinstance(config.policy, tuple) else (config.policy,)
    _check(config, policies)
    prepared = open_records(
        config.data, form=config.format, held_out=config.held_out, skip_bad=config.skip_bad, data_dir=config.data_dir
    )
    splits = prepared.splits if config.split == "all" else {config.split: prepared.splits.get(config.split, [])}
    records = [record for split in splits.values() for record in split]
    if not records:
        raise ValueError(f"No record is in --split {config.split}; give another --split or --held-out.")
    if prepared.unread:
        print_table(Console(), "Data", unread_rows(prepared))
    if policies:
        return evaluate_policies(config, policies, records, skipped_lines(prepared), _print_plan)
    return _evaluate_reward(config, records, skipped_lines(prepared))


def _check(config: Evaluate, policies: Sequence[pathlib.Path]) -> None:
    if config.prompts < 1 or config.batch_size < 1:
        raise ValueError("--prompts and --batch-size must be at least 1.")
    if (not policies and config.reward is None) or (policies and config.reward is not None and not config.best_of):
        raise ValueError("Give --policy with --reference, or --reward: one thing is evaluated at a time.")
    if not policies:
        refuse_unused(config, PAGE_SETTINGS, "with --reward")
        unused = ["reference", "annotator", "score", *JUDGE_SETTINGS, "prompts", "max_new_tokens", "best_of"]
        refuse_unused(config, [*unused, "completions"], "with --reward")
        return
    refuse_unused(config, ["batch_size"], "with --policy")
    if config.reference is None:
        raise ValueError("Give --reference: a policy is compared with one.")
    if len(set(policies)) < len(policies):
        raise ValueError(f"--policy names one twice: {', '.join(map(str, policies))}; give each once.")
    if config.best_of and config.reward is None:
        raise ValueError("--best-of needs --reward, the reward model that chooses.")
    numbers = config.best_of
    if any(not 2 <= number <= LARGEST for number in numbers) or len(set(numbers)) < len(numbers):
        given = " ".join(map(str, numbers))
        raise ValueError(f"--best-of must be different numbers from 2 to {LARGEST}, got {given}.")


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


def _print_plan(model: Model, rows: dict[str, str]) -> None:
    parameters = sum(leaf.size for leaf in jax.tree.leaves(model.params))
    size = f"{count_text(parameters)} parameters, {bytes_text(tree_bytes(model.params))}"
    devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    rows = {"model": f"{model.config.family}, {size}"} | model.plan_rows() | rows | {"devices": devices}
    print_table(Console(), "Evaluation", rows)
