"""`align_settings.py`: its commands are the command line's own; scores and tables worked out by hand."""

import dataclasses
import importlib.util
import json
import pathlib
import sys

import numpy as np
import pytest

from jaxrlhf.commands.align_config import Align
from jaxrlhf.commands.configuration import parse

EXPERIMENTS = pathlib.Path(__file__).resolve().parents[2] / "experiments"
STORIES = EXPERIMENTS.parents[1] / "shared" / "models" / "stories260K"


@pytest.fixture(scope="module")
def study():
    sys.path.insert(0, str(EXPERIMENTS))
    try:
        spec = importlib.util.spec_from_file_location("align_settings", EXPERIMENTS / "align_settings.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules["align_settings"] = module
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(EXPERIMENTS))


def test_a_run_is_the_command_with_the_value_and_is_evaluated_at_every_number_of_labels(study, tmp_path):
    config = study.Config(policy=tmp_path, labels=(96, 160), options=("learn-scale", "beta=0.5"))
    study.check(config)
    words = study.command(config, tmp_path, study.Cell("2", "checklist", 7))
    assert words[3] == "align"
    run = parse(Align, words[4:], "align")
    assert (run.reuse, run.seed, run.steps, run.evaluations, run.beta, run.learn_scale) == (2, 7, 5, 5, 0.5, True)
    assert run.score == "align_settings:checklist" and run.batch_size * run.pairs == 32
    assert run.run == study.run_name(study.Cell("2", "checklist", 7)) == "checklist-2-7"


def test_scores_are_of_the_completion(study):
    assert study.glad_words(["p"], ["They had fun and were sad."]) == [0.0]
    assert study.glad_words(["p"], ["They had fun."]) == [2.0]
    assert study.checklist(["p", "p"], ["Fun. They play.", "Fun. They cry."]) == [4.0, 0.0]


def test_differences_are_paired_by_seed(study, tmp_path):
    config = study.Config(policy=tmp_path, values=("0", "1"), labels=(32,), seeds=2, golds=("checklist",))
    at = lambda utility: study.Measured(np.array([utility]), np.array([utility + 0.1]), np.array([2.0]), 10.0)  # noqa: E731
    found = {
        study.Cell(value, "checklist", seed): at(0.5 + 0.1 * seed + 0.02 * int(value))
        for value in "01"
        for seed in (0, 1)
    }
    first, second = study.table_of(config, "checklist", found).rows
    assert first[:2] == ("32", "0") and first[2].startswith("0.550 ± ") and first[3] == ""
    # The seeds differ by more than the values, and their differences not at all.
    assert second[3] == "0.020 ± 0.000" and second[4:6] == ("0.670", "2.00")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"golds": ("none",)}, "--golds knows glad words, checklist"),
        ({"labels": (30,)}, "--labels are multiples of 32"),
        ({"labels": (64, 32)}, "--labels rise"),
        ({"seeds": 0}, "--seeds must be at least 1"),
    ],
)
def test_what_cannot_be_run_is_named(study, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        study.check(dataclasses.replace(study.Config(policy=tmp_path), **change))


@pytest.mark.slow
def test_the_study_runs_and_a_command_that_fails_ends_it_with_its_sentence(study, tmp_path, capsys):
    if not STORIES.is_dir():
        pytest.skip(f"{STORIES} is missing")
    config = study.Config(
        policy=STORIES,
        labels=(32, 64),
        seeds=1,
        values=("0", "1"),
        golds=("checklist",),
        evaluation_answers=8,
        output=tmp_path,
    )
    results = json.loads((study.main(config) / "results.json").read_text())
    assert len(results["runs"]) == 2 and len(results["runs"][0]["utility"]) == 2
    with pytest.raises(SystemExit):
        study.main(dataclasses.replace(config, vary="nothing"))
    assert "nothing" in capsys.readouterr().err
