"""Flags are checked before anything is read: ranges, addresses in place of paths, flags that do not apply."""

import pathlib
import re

import pytest

from jaxrlhf.commands import align, evaluate, export, reward, sample, supervised
from jaxrlhf.commands.flags import check_flags
from jaxrlhf.commands.main import run

P = pathlib.Path
BASE = P("base")
TRAIN = {"policy": BASE, "data": "pairs.jsonl"}
ALIGN = TRAIN | {"score": "annotators:score"}
COMPARE = TRAIN | {"reference": BASE, "annotator": "annotators:prefers_sun"}

WRONG = {
    "steps": (supervised.Supervised(**TRAIN, steps=0), "--steps must be at least 1, got 0"),
    "learning-rate": (
        supervised.Supervised(**TRAIN, learning_rate=-1.0),
        "--learning-rate must not be negative, got -1",
    ),
    "nan": (reward.Reward(**TRAIN, learning_rate=float("nan")), "--learning-rate must be a finite number, got nan"),
    "clipping": (reward.Reward(**TRAIN, largest_gradient=0.0), "--largest-gradient must be positive, got 0"),
    "epochs": (reward.Reward(**TRAIN, epochs=0.0), "--epochs must be positive"),
    "rank": (supervised.Supervised(**TRAIN, lora_rank=-1), "--lora-rank must be at least 0, got -1"),
    "seed": (supervised.Supervised(**TRAIN, seed=-1), "--seed must be at least 0"),
    "large-seed": (sample.Sample(policy=BASE, seed=2**32), "--seed must be at most 4294967295"),
    "keep-best": (supervised.Supervised(**TRAIN, keep_best=-1), "--keep-best must be at least 0, got -1"),
    "patience": (reward.Reward(**TRAIN, patience=0), "--patience must be at least 1, got 0"),
    "checkpoint-steps": (reward.Reward(**TRAIN, checkpoint_steps=0), "--checkpoint-steps must be at least 1, got 0"),
    "minutes": (align.Align(**ALIGN, checkpoint_minutes=0.0), "--checkpoint-minutes must be positive, got 0"),
    "beta": (align.Align(**ALIGN, beta=0.0), "--beta must be positive, got 0"),
    "answers": (align.Align(**ALIGN, evaluation_answers=0), "--evaluation-answers must be at least 1"),
    "timeout": (align.Align(**ALIGN, annotator_timeout=-1.0), "--annotator-timeout must be positive"),
    "tokens": (evaluate.Evaluate(**COMPARE, max_new_tokens=0), "--max-new-tokens must be at least 1"),
    "temperature": (sample.Sample(policy=BASE, temperature=-0.5), "--temperature must not be negative"),
    "top-p": (sample.Sample(policy=BASE, top_p=0.0), r"--top-p must lie in \(0, 1\], got 0"),
    "bucket": (align.Align(**ALIGN, output=P("gs://bucket/run")), "--output gs://bucket/run is an address"),
    "prepared": (reward.Reward(**TRAIN, data_dir=P("s3://bucket/data")), "--data-dir s3://bucket/data is an address"),
    "model": (sample.Sample(policy=P("hf://owner/model")), "--policy hf://owner/model is an address"),
    "file": (export.Export(source=BASE, to=P("file://tmp/x")), "--to file://tmp/x is an address"),
    "data": (supervised.Supervised(policy=BASE, data="https://host/x.jsonl"), "--data https://host/x.jsonl is an addr"),
    "bytes": (export.Export(source=BASE, to=P("a\udcff")), "--to .* is a name that is not UTF-8"),
    "zero": (supervised.Supervised(**TRAIN, output=P("a\0b")), "--output .* holds a zero byte"),
    "share": (reward.Reward(**TRAIN, held_out=1.0), r"--held-out must lie in \[0, 1\), got 1"),
    "home": (sample.Sample(policy=P("~/model")), "--policy ~/model begins with ~, which the shell has not replaced"),
    "odd": (
        supervised.Supervised(tokenizer=BASE, data="pairs.jsonl", width=6, heads=2),
        "--width 6 over --heads 2 is 3, which must be even",
    ),
    "mesh-twice": (align.Align(**ALIGN, mesh="data=1,data=1"), "names data twice"),
    "no-stencil-here": (
        supervised.Supervised(**TRAIN, held_out=0.25, mesh="stencil=2", steps=1),
        "--mesh stencil=2 does not apply here",
    ),
    "no-annotator": (align.Align(**TRAIN, annotator=""), "Give --annotator or --score"),
    "ftp": (
        align.Align(**TRAIN, annotator="ftp://host#m"),
        "There is no directory ftp://host#m; give a reward model's",
    ),
    "typo": (align.Align(**TRAIN, annotator="runs/rewrad-1"), "There is no directory runs/rewrad-1; give"),
    "shape": (supervised.Supervised(**TRAIN, width=8, heads=2), "--width and --heads do not apply with --policy"),
    "both": (
        supervised.Supervised(**TRAIN, steps=2, epochs=3.0, held_out=0.25),
        "--epochs does not apply with --steps",
    ),
    "no-adapters": (
        supervised.Supervised(**TRAIN, lora_alpha=2.0, lora_modules=("q_proj",)),
        "--lora-alpha and --lora-modules do not apply without --lora-rank",
    ),
    "all-dropped": (
        supervised.Supervised(**TRAIN, lora_rank=2, lora_dropout=1.0),
        r"--lora-dropout must lie in \[0, 1\), got 1",
    ),
    "balance": (
        supervised.Supervised(**TRAIN, expert_balance=0.1),
        "--expert-balance does not apply to a model without experts",
    ),
    "new-half": (
        supervised.Supervised(tokenizer=BASE, data="pairs.jsonl", dtype="bfloat16", lora_rank=2),
        "--dtype does not apply with --tokenizer",
    ),
    "no-stencil": (
        align.Align(**ALIGN, relative_sigma=0.1),
        "--relative-sigma does not apply with --estimator boltzmann, which unlike central",
    ),
    "no-tangent": (
        align.Align(**ALIGN, estimator="decoupled", tangent_learning_rate=1e-5),
        "--tangent-learning-rate does not apply with --estimator decoupled",
    ),
    "no-judge": (
        align.Align(**ALIGN, judge_tokens=4096, judge_verdict="(A|B)"),
        "--judge-tokens and --judge-verdict do not apply to an annotator that is no LLM judge",
    ),
    "judge-timeout": (
        align.Align(**TRAIN, annotator="http://localhost/v1#m", annotator_timeout=5.0),
        "--annotator-timeout does not apply to an annotator that is no function",
    ),
    "pattern": (
        evaluate.Evaluate(**TRAIN, reference=BASE, annotator="http://localhost/v1#m", judge_verdict="A|B"),
        "needs a group around A, B or tie",
    ),
    "reward-flags": (
        evaluate.Evaluate(reward=BASE, data="pairs.jsonl", reference=BASE, max_new_tokens=5),
        "--reference and --max-new-tokens do not apply with --reward",
    ),
    "policy-flags": (evaluate.Evaluate(**COMPARE, batch_size=4), "--batch-size does not apply with --policy"),
    "context": (sample.Sample(policy=BASE, max_new_tokens=48), "--max-new-tokens 48 is more than the 47 that"),
    "no-room": (evaluate.Evaluate(**COMPARE, max_new_tokens=47), "--max-new-tokens 47 leaves no room for a prompt"),
    "tilt": (
        align.Align(**ALIGN, max_new_tokens=8, estimator="central", relative_sigma=50.0),
        "--relative-sigma 50 is too large",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_flags_are_refused_by_name(here, monkeypatch, capsys, case):
    config, message = WRONG[case]
    before = {path.name for path in here.iterdir()}
    with pytest.raises(SystemExit) as caught:
        run(config)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(message, error), error
    # Nothing is written by a command that is refused, least of all a folder `gs:`.
    assert {path.name for path in here.iterdir()} - before <= {"runs"}


def test_defaults_are_in_range():
    for config in (
        supervised.Supervised(**TRAIN),
        reward.Reward(**TRAIN),
        align.Align(**TRAIN),
        evaluate.Evaluate(data="hh-rlhf:helpful-base"),
        sample.Sample(policy=BASE),
        export.Export(source=P("a:b/c"), to=P("/gs:/x")),
    ):
        check_flags(config)
