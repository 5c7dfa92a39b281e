"""What `jaxrlhf align` reads before it begins: prompts, the reward model to start from, the annotator."""

import itertools
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxrlhf.algorithms.methods import METHODS
from jaxrlhf.annotation.label_cache import cached_annotator
from jaxrlhf.commands.adapters import dtype_of
from jaxrlhf.commands.align_config import Align, measures_mistakes
from jaxrlhf.commands.annotators import LABELS, ComparisonAnnotator, judge_settings, open_annotator, people_of
from jaxrlhf.commands.data import open_records, skipped_lines
from jaxrlhf.commands.existing import Existing
from jaxrlhf.commands.methods import method_of
from jaxrlhf.commands.models import Model, check_tokens, open_model, reward_on
from jaxrlhf.data.tokenization import describe_rows, tokenize_prompts
from jaxrlhf.training.processes import broadcast_array, is_first_process
from jaxrlhf.training.run_folder import RunFolder


class PromptSplits(NamedTuple):
    """Token rows `[P]` to train on and to compare policies on, and notes for the report."""

    training: list[np.ndarray]
    held_out: list[np.ndarray]
    notes: list[str]


def read_prompts(config: Align, policy: Model) -> PromptSplits:
    """Returns the prompts of --data.

    Raises:
        ValueError, DataError: they cannot be read, or there is no room for one.
    """
    context = policy.config.context_length
    room = context - config.max_new_tokens
    if room < 2:
        raise ValueError(
            f"--max-new-tokens {config.max_new_tokens} leaves no room for a prompt: the model's context is {context}."
        )
    prepared = open_records(
        config.data, form=config.format, held_out=config.held_out, skip_bad=config.skip_bad, data_dir=config.data_dir
    )
    tokenizer, notes, rows = policy.bundle.chat_tokenizer(), skipped_lines(prepared), {}
    for name, title in (("train", "Prompts"), ("test", "Held-out prompts")):
        # With too few prompts to hold any out, policies are compared on the training prompts.
        records = prepared.splits.get(name)
        if records is None:
            records, title = next(iter(prepared.splits.values())), f"{title} (none is held out: the same)"
        tokenized = tokenize_prompts(
            tokenizer, records, max_length=min(config.max_prompt, room), cut_prompts=config.cut_prompts
        )
        rows[name] = tokenized.rows
        notes.append(f"{title}: {describe_rows(tokenized)}.")
    held_out = itertools.islice(itertools.cycle(rows["test"]), config.evaluation_answers)
    return PromptSplits(rows["train"], list(held_out), notes)


def column_multiple(config: Align) -> int:
    """Returns the number that columns of prompts are a multiple of, except in the widest batches."""
    return min(32, config.max_prompt)


def prompt_columns(config: Align, prompts: PromptSplits, existing: Existing | None) -> int:
    """Returns the columns of the widest batch: those of the longest prompt, rounded up to a multiple of 8."""
    multiple, longest = min(8, column_multiple(config)), max(map(len, prompts.training))
    if existing is not None:
        longest = max(longest, existing.prompts.tokens.shape[1])
    return -(-longest // multiple) * multiple


def annotator_of(config: Align, policy: Model) -> ComparisonAnnotator:
    """Returns the annotator of --annotator or --score, with this process's own journal."""
    # Each of several processes labels its own share of the pairs, and has its own journal.
    labels = LABELS if jax.process_count() == 1 else f"{jax.process_index()}-{LABELS}"
    annotator = open_annotator(
        config.annotator,
        config.score,
        policy,
        journal=config.data_dir / labels,
        seconds=config.annotator_timeout,
        judge=judge_settings(config),
        people=people_of(config, evaluates=False),
    )
    # The rate of mistakes comes to the update as the annotator's parameter.
    return annotator._replace(params=np.float32(0.0)) if measures_mistakes(config) else annotator


def with_label_cache(annotator: ComparisonAnnotator, folder: RunFolder) -> ComparisonAnnotator:
    """Returns the annotator with its labels cached in the run's folder, the same in all processes."""
    if annotator.host is None:
        return annotator
    path = folder.path / "labels.jsonl" if is_first_process() else None
    agreed = broadcast_array if jax.process_count() > 1 else None
    host: Any = cached_annotator(annotator.host, path, agreed=agreed, complete=annotator.judge is not None)
    return annotator._replace(host=host)


def counted(annotator: ComparisonAnnotator, config: Align) -> ComparisonAnnotator:
    """Returns the annotator, which shows people on their page what they said of each step; others as they are."""
    people, host = annotator.people, annotator.host
    if people is None or host is None:
        return annotator
    against_reference = method_of(config).against == "reference"

    def annotate(key, sample):
        labels = host(key, sample)
        people.labelled(np.asarray(labels), against_reference=against_reference)
        return labels

    return annotator._replace(host=annotate)


def reward_of(config: Align, policy: Model) -> Model:
    """Returns the reward model to start from; the policy itself where there is none, or where it is an adapter on it.

    Raises:
        ValueError: it cannot be read, or has other tokens.
    """
    if METHODS[config.method].learns != "reward" or (config.rewards and not config.reward_network):
        return policy
    if config.reward is None:
        # An adapter stands on the policy's own weights, which are not copied.
        return policy if config.lora_rank else reward_on(policy)
    reward = open_model(config.reward, "reward", dtype=dtype_of(config.dtype, config.lora_rank))
    check_tokens(policy.bundle, reward.bundle, "--reward")
    return reward
