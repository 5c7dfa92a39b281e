"""`people.py`: the simulated person's labels, and commands that differ in how labels are used alone."""

import importlib.util
import pathlib
import sys

import numpy as np
import pytest

from jaxrlhf.commands.align_config import Align, check_config
from jaxrlhf.commands.configuration import parse

EXPERIMENTS = pathlib.Path(__file__).resolve().parents[2] / "experiments"


@pytest.fixture(scope="module")
def study():
    sys.path.insert(0, str(EXPERIMENTS))
    try:
        spec = importlib.util.spec_from_file_location("people", EXPERIMENTS / "people.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules["people"] = module
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(EXPERIMENTS))


def test_the_person_errs_in_one_label_of_ten_and_is_asked_for_the_truth_in_evaluations(study, monkeypatch):
    monkeypatch.setenv(study.SEED, "3")
    monkeypatch.setenv(f"{study.SEED}_PAIRS", "4000")
    glad, sorry = "They had fun, play, love, friends.", "They were sad, lost, hurt, angry."
    prompts = [f"Once {number}" for number in range(4000)]
    labels = study.person(prompts, [glad] * 4000, [sorry] * 4000)
    assert set(labels) == {0.0, 1.0} and 0.085 < 1 - np.mean(labels) < 0.115
    assert study.person(prompts, [glad] * 4000, [sorry] * 4000) == labels
    even = study.person(prompts, ["Fun."] * 4000, ["They play."] * 4000)
    assert 0.47 < np.mean(even) < 0.53
    # Many pairs at once are an evaluation's: two glad words more are worth 4, of which no mistake takes any.
    monkeypatch.setenv(f"{study.SEED}_PAIRS", "1")
    assert study.person(["a", "b"], ["fun and play", ""], ["", "fun"]) == pytest.approx(
        [1 / (1 + np.exp(-4)), 1 / (1 + np.exp(2))]
    )
    monkeypatch.setenv(study.SEED, "4")
    monkeypatch.setenv(f"{study.SEED}_PAIRS", "4000")
    assert study.person(prompts, ["Fun."] * 4000, ["They play."] * 4000) != even


def test_runs_differ_in_how_labels_are_used_alone(study, tmp_path):
    config = study.Config(policy=tmp_path, options=("beta=0.5",))
    found = []
    for way in study.WAYS:
        words = study.command(config, tmp_path, study.Cell(way, 7))
        found.append(parse(Align, words[4:], "align"))
        check_config(found[-1])
    assert [(each.reuse, each.choose) for each in found] == [(0, "random"), (4, "random"), (4, "disagreement")]
    assert len({each.run for each in found}) == 3
    others = [{n: v for n, v in vars(each).items() if n not in ("reuse", "choose", "run")} for each in found]
    assert others[0] == others[1] == others[2]
    assert others[0]["steps"] * others[0]["labels_per_step"] == 400 and others[0]["beta"] == 0.5
