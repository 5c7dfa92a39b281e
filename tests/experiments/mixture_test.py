"""`mixture.py`: its scores and golds on texts, its fit and search against closed forms, and the command on stories."""

import importlib.util
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf import bandit

ROOT = pathlib.Path(__file__).resolve().parents[2]
STORIES = ROOT.parent / "shared" / "models" / "stories260K"


def load(name):
    sys.path.insert(0, str(ROOT / "experiments"))
    try:
        spec = importlib.util.spec_from_file_location(f"{name}_study", ROOT / "experiments" / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[f"{name}_study"] = module
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.pop(0)


mixture = load("mixture")


@pytest.mark.parametrize(
    "text, scores, golds",
    [
        ("Tim was happy. They had fun.", (2, 0, 0, 0, 28, 2), (4.0, 5.0)),
        ("Tim was happy. He was sad.", (1, -1, 0, -1, 26, 2), (0.0, 3.0)),
        ('"Hi!" said the the the dog', (0, 0, 1, -2, 26, 1), (0.0, 0.0)),
        ("fun " * 20, (1, 0, 0, -19, 80, 0), (0.0, 2.0 - 1.5)),
    ],
)
def test_scores_and_golds_of_a_text(text, scores, golds):
    row = {name: float(score(text)) for name, score in mixture.SCORES.items()}
    assert tuple(row.values()) == scores
    assert tuple(float(gold(row)) for gold in mixture.GOLDS.values()) == golds


def made_up(weights):
    features = jax.random.normal(jax.random.key(0), (4, 30, len(weights)))
    return bandit.Bandit(features, features @ jnp.asarray(weights), jnp.full((4, 30), -jnp.log(30.0)))


def test_a_fit_finds_weights_that_the_labels_were_drawn_from():
    weights = np.array([1.0, -0.5, 0.0])
    fitted = [mixture.fit_once(made_up(weights), 20_000, jax.random.key(seed)) for seed in range(3)]
    # A logistic fit's standard error is about 2 / sqrt(labels * variance of a difference).
    np.testing.assert_allclose(np.mean(fitted, axis=0), weights, atol=6 * 2 / (2 * 3 * 20_000) ** 0.5)


def test_a_search_ends_at_its_best_candidate_if_labels_are_many():
    frozen = made_up([1.0, 0.5, 0.2])
    utilities = [
        float(mixture.utility_of_reward(mixture.search(frozen, 0.03, labels, jax.random.key(seed)), frozen, 0.03))
        for labels in (16, 160_000)
        for seed in range(8)
    ]
    assert np.mean(utilities[8:]) > np.mean(utilities[:8]) and min(utilities[8:]) > 0.6


@pytest.mark.slow
def test_every_method_runs_on_stories(tmp_path):
    if not STORIES.is_dir():
        pytest.skip("needs ../shared/models/stories260K, which is not part of this repository")
    config = mixture.Config(policy=STORIES, seeds=2, steps=2, responses=8, output=tmp_path)
    folder = mixture.main(config)
    results = json.loads((folder / "results.json").read_text())["results"]
    assert [(each["gold"], each["method"]) for each in results] == [
        (gold, name) for gold in mixture.GOLDS for name in mixture.METHODS
    ]
    for each in results:
        assert np.shape(each["utility"]) == (2, 5)
        _, optimum, best_in_class = each["bounds"].values()
        assert np.max(each["utility"]) <= best_in_class + 1e-3 <= optimum + 2e-3
        assert each["labels"] == (0 if each["method"] == mixture.EQUAL else 2 * 2 * 16)
    equal = [np.array(each["utility"]) for each in results if each["method"] == mixture.EQUAL]
    assert all(np.ptp(utility, axis=0).max() == 0 for utility in equal)
    page = (folder / "report.html").read_text()
    assert "less the other at its best" in page and (folder / "mixture.png").stat().st_size > 0


def test_settings_that_cannot_be_run_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        mixture.main(mixture.Config(policy=tmp_path, seeds=1))
    assert stopped.value.code == 2 and "--seeds" in capsys.readouterr().err
