"""Sentences of the pages about defaults and files, each with what makes it true."""

import dataclasses
import inspect
import json
import pathlib

import pytest

from jaxrlhf.annotation import chat, judge
from jaxrlhf.bilevel import BilevelInfo
from jaxrlhf.commands import align, annotators, evaluate, methods, reward, stage, supervised
from jaxrlhf.commands.running import FREE
from jaxrlhf.lm.transformer import trunk

DOCS = pathlib.Path(__file__).parents[2] / "docs"
SFT = supervised.Supervised(data="")
REWARD = reward.Reward(data="", policy=pathlib.Path())
ALIGN = align.Align(data="", policy=pathlib.Path())
EVALUATE = evaluate.Evaluate(data="")
RUNS = (SFT, REWARD, ALIGN)


def rates(**settings):
    return methods.learning_rates(dataclasses.replace(ALIGN, **settings))[:3]


PROMISES = {
    "minutes": ("scale", "`--checkpoint-minutes` (10)", lambda: {run.checkpoint_minutes for run in RUNS} == {10.0}),
    "patience": ("scale", "`--patience` (5)", lambda: {run.patience for run in RUNS} == {5}),
    "mesh": ("scale", "the default is `data=-1`", lambda: {run.mesh for run in RUNS} == {"data=-1"}),
    "layers": ("scale", "Decoders of more than 8 layers are one loop", lambda: trunk.MAX_UNROLLED_LAYERS == 8),
    "steps": ("scale", "`align --steps` may be raised", lambda: "steps" not in FREE),
    "trial": ("scale", "(up to 512 MB)", lambda: stage.LARGEST_TRIAL == 512 * 2**20),
    "silence": ("scale", "of its first 64 pairs or more", lambda: annotators.SILENCE == 64),
    "transient": (
        "language_models",
        "Timeouts, 408, 409, 425, 429 and 5xx are tried again",
        lambda: chat.TRANSIENT == (408, 409, 425, 429),
    ),
    "sixteen": ("language_models", "or of the first 16, has a verdict", lambda: judge.PATIENCE == 16),
    "both-orders": (
        "language_models",
        "The judge sees each pair in both orders",
        lambda: default(judge.http_judge, "both_orders"),
    ),
    "new-tokens": (
        "coming_from_trl",
        "here 48 by default",
        lambda: ALIGN.max_new_tokens == EVALUATE.max_new_tokens == 48,
    ),
    "rates": ("coming_from_trl", "2e-4, 1e-5 and 1e-3 by default", lambda: rates() == (2e-4, 1e-5, 1e-3)),
    "adapters": (
        "coming_from_trl",
        "(1e-3, 5e-5 and 2e-3 for adapters)",
        lambda: rates(lora_rank=2) == (1e-3, 5e-5, 2e-3),
    ),
    "method": ("coming_from_trl", "The default is `bilevel`", lambda: ALIGN.method == "bilevel"),
    "remat": ("coming_from_trl", "Off by default", lambda: {run.remat for run in RUNS} == {None}),
    "precision": ("coming_from_trl", "float32 by default", lambda: {run.dtype for run in RUNS} == {"float32"}),
}


def default(function, name):
    return inspect.signature(function).parameters[name].default


@pytest.mark.parametrize("case", PROMISES)
def test_sentences_about_defaults_are_true(case):
    page, sentence, holds = PROMISES[case]
    assert sentence in " ".join((DOCS / f"{page}.md").read_text().split())
    assert holds()


def test_a_rate_of_zero_is_not_the_default():
    assert rates(policy_learning_rate=0.0, reward_learning_rate=0.0) == (0.0, 0.0, 0.0)
    assert rates(tangent_learning_rate=0.0) == (2e-4, 0.0, 1e-3)


def test_every_stage_leaves_the_files_that_the_page_lists(trained, aligned):
    text = " ".join((DOCS / "language_models.md").read_text().split())
    assert "`report.html`, `metrics.jsonl`, `config.json` and `results.json`" in text
    for folder in (*trained, *aligned.values()):
        names = {path.name for path in folder.iterdir()}
        assert {"report.html", "metrics.jsonl", "config.json", "results.json"} <= names
        # Nothing is left of what was tried before the first step.
        assert not {"trial", "checkpoints-trial"} & names


def test_metrics_record_every_diagnostic(aligned):
    for folder in aligned.values():
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert any(set(BilevelInfo._fields) <= row.keys() for row in rows)


def test_evaluation_prints_intervals_of_all_three(here, trained, capsys):
    policy, _ = trained
    settings = {"data": "pairs.jsonl", "prompts": 4, "max_new_tokens": 4, "score": "annotators:score"}
    evaluate.main(evaluate.Evaluate(policy=policy, reference=pathlib.Path("base"), **settings))
    assert (
        "win rate, the KL and the length with their confidence intervals" in (DOCS / "coming_from_trl.md").read_text()
    )
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("│") and "±" in line)
    assert row.count("±") == 4  # the win rate at equal length too
