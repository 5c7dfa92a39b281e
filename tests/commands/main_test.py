"""The entry point and the scripts beside it: help, functions by name, and errors in one sentence."""

import json
import pathlib
import runpy
import subprocess
import sys

import pytest

from jaxrlhf.annotation.functions import load_function
from jaxrlhf.commands import align, evaluate, reward, sample, supervised
from jaxrlhf.commands.main import COMMANDS, main, run
from jaxrlhf.data.records import DataError

EXPERIMENTS = pathlib.Path(__file__).parents[2] / "experiments"
BASE = pathlib.Path("base")


def aligning(**settings):
    """Returns the configuration of an alignment of the base model."""
    return align.Align(policy=BASE, data="pairs.jsonl", **settings)


WRONG = {
    "no-model": (
        lambda short: sample.Sample(policy=pathlib.Path("none")),
        "none holds no policy model: give a Hugging Face",
    ),
    "two-annotators": (
        lambda short: aligning(score="a:b", annotator="c:d"),
        "Give --annotator or --score, one of the two",
    ),
    "no-function": (
        lambda short: aligning(score="annotators:scores"),
        "The module annotators has no function scores; the nearest that it has is score.",
    ),
    "no-module": (
        lambda short: aligning(score="missing:score"),
        r"There is no module missing in /.* or among the installed ones\.",
    ),
    "near-module": (
        lambda short: aligning(score="anotators:score"),
        r"There is no module anotators in .*; the nearest here is annotators\.",
    ),
    "too-few": (
        lambda short: aligning(score="annotators:too_few", **short),
        r"annotators:too_few gave 1 numbers for 6[0-9] texts; give one number for each",
    ),
    "out-of-range": (
        lambda short: aligning(annotator="annotators:out_of_range", **short),
        "annotators:out_of_range answered 7; a label is 1, 0, 1/2 or None",
    ),
    "signs": (
        lambda short: aligning(annotator="annotators:signs", **short),
        "annotators:signs answered -1; a label is 1, 0, 1/2 or None",
    ),
    "silent": (
        lambda short: aligning(annotator="annotators:silent", **short),
        "annotators:silent did not give a list of numbers",
    ),
    "no-reward": (
        lambda short: aligning(reward=BASE, score="annotators:score"),
        "a reward model is wanted here",
    ),
    "empty-batch": (
        lambda short: supervised.Supervised(data="pairs.jsonl", policy=BASE, batch_size=0),
        "--microbatches 1 must divide --batch-size 0",
    ),
    "half-precision": (
        lambda short: aligning(score="annotators:score", dtype="bfloat16"),
        "Weights in bfloat16 cannot be trained whole.* give --lora-rank",
    ),
    "no-data": (lambda short: reward.Reward(policy=BASE, data="none.jsonl"), "no file or folder none.jsonl"),
    "no-start": (
        lambda short: supervised.Supervised(data="pairs.jsonl"),
        "Give --policy to start from a model, or --tokenizer",
    ),
    "no-room": (
        lambda short: aligning(score="annotators:score", max_new_tokens=48),
        "leaves no room for a prompt: the model's context is 48",
    ),
    "nothing": (lambda short: evaluate.Evaluate(data="pairs.jsonl"), "Give --policy with --reference, or --reward"),
    "diverged": (
        lambda short: supervised.Supervised(
            data="pairs.jsonl", policy=BASE, steps=9, learning_rate=1e30, batch_size=8, max_length=24, patience=2
        ),
        r"2 steps in a row up to step . were not finite \(.*nan.*\) and were skipped; lower the learning rates",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_errors_are_one_sentence(here, align_settings, capsys, case):
    make, message = WRONG[case]
    config = make(align_settings)
    with pytest.raises((ValueError, DataError), match=message):
        dict(COMMANDS.values())[type(config)](config)
    with pytest.raises(SystemExit) as caught:
        run(config)
    assert caught.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("script", ["stage_1_sft", "stage_2_reward", "stage_3_align"])
def test_stages_are_scripts_too(here, monkeypatch, capsys, script):
    arguments = ["--policy", "base", "--data", "none.jsonl"]
    if script == "stage_3_align":
        arguments += ["--score", "annotators:score", "--max-new-tokens", "8"]
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(EXPERIMENTS / f"{script}.py"), run_name="__main__")
    assert caught.value.code == 2
    assert "There is no file or folder none.jsonl" in capsys.readouterr().err


@pytest.mark.slow
def test_the_study_of_human_preferences(here, report_text):
    lines = [
        {side: f"\n\nHuman: the day {number} ?\n\nAssistant: the {word} ." for side, word in sides}
        for number in range(40)
        for sides in [(("chosen", "sun"), ("rejected", "rain"))]
    ]
    (here / "hh.jsonl").write_text("\n".join(map(json.dumps, [*lines[:20], {"chosen": 3}, *lines[20:]])) + "\n")
    study = runpy.run_path(str(EXPERIMENTS / "hh_rlhf.py"))
    settings = {"width": 8, "layers": 1, "heads": 2, "max_length": 24, "batch_size": 8, "epochs": 1.0}
    with pytest.raises(DataError, match=r"hh\.jsonl, line 21: .*skip such lines with --skip-bad"):
        study["main"](study["Config"](data="hh.jsonl", policy=BASE, **settings))
    folder = study["main"](study["Config"](data="hh.jsonl", policy=BASE, skip_bad=True, **settings))
    assert {"pretrained", "from scratch"} <= json.loads((folder / "results.json").read_text()).keys()
    assert "reward, from scratch, seed 0" in report_text(folder)
    assert "Skipped hh.jsonl, line 21" in report_text(next(folder.glob("reward-*")))


def test_the_command_is_installed_and_lists_its_commands():
    command = pathlib.Path(sys.executable).with_name("jaxrlhf")
    shown = subprocess.run([command, "--help"], capture_output=True, text=True, timeout=120, check=True).stdout
    for name in ("sft", "reward", "align", "evaluate", "sample", "export"):
        assert name in shown


def test_a_misspelled_command_is_answered_with_the_nearest(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["jaxrlhf", "algin", "--policy", "base"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "jaxrlhf: There is no command algin; the nearest is align.\n"


def test_the_package_is_the_command():
    command = [sys.executable, "-m", "jaxrlhf", "algin"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (found.returncode, found.stderr) == (2, "jaxrlhf: There is no command algin; the nearest is align.\n")


def test_functions_are_found_by_name_only():
    assert load_function("math:sqrt")(4) == 2
    for name in ("math", "math:", ":sqrt", ""):
        with pytest.raises(ValueError, match="names no function; write module:function"):
            load_function(name)
