"""`one_run.py` as a command: what it writes, on exact problems and on stories, and what it refuses."""

import importlib.util
import json
import pathlib
import sys

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
STORIES = ROOT.parent / "shared" / "models" / "stories260K"


def load(name):
    sys.path.insert(0, str(ROOT / "experiments"))
    try:
        spec = importlib.util.spec_from_file_location(name, ROOT / "experiments" / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.pop(0)


one_run = load("one_run")
exact, stories = sys.modules["one_run_exact"], sys.modules["one_run_stories"]


def results_of(folder):
    stored = json.loads((folder / "results.json").read_text())["results"]
    assert (folder / "one_run.png").stat().st_size > 0 and "worst / best" in (folder / "report.html").read_text()
    return {(each["problem"], each["method"]): each for each in stored}


@pytest.mark.parametrize(
    "methods", [(exact.SCALED, exact.CONTROLLER), pytest.param(exact.METHODS, marks=pytest.mark.slow)]
)
def test_methods_run_on_an_exact_problem(tmp_path, methods):
    shape = {"families": ("gated",), "kinds": ("language",), "seeds": 2, "exact_steps": 3}
    results = results_of(one_run.main(one_run.Config(**shape, methods=methods, output=tmp_path)))
    assert {method for _, method in results} == set(methods)
    for (problem, method), result in results.items():
        assert problem == "language, gated" and result["labels"] == 3 * 8 * 16
        assert np.shape(result["utility"]) == (2, 5), method
        utility = np.array(result["win_rate"]) - 0.03 * np.array(result["kl"])
        np.testing.assert_allclose(result["utility"], utility, atol=1e-6)
        assert np.all(utility < result["optimum"]) and result["best_in_class"] < result["optimum"]
        labels = np.array(result["labels_to_95"], float)
        assert np.all(np.isnan(labels) | ((labels >= 8 * 16) & (labels <= result["labels"])))
        assert (np.array(result["scale"]) != 1.0).all() == (method == exact.SCALED)


@pytest.mark.parametrize(
    "gains, expected",
    [
        ([0.1, 0.5, 0.9, 1.0], 4),
        ([1.0, 1.0, 1.0], 1),
        ([1.0, 0.2, 0.97, 1.0], 3),
        ([0.5, 2.0, 1.0], 2),
        ([0.3, -0.1], None),
    ],
)
def test_labels_are_counted_until_the_gain_stays(gains, expected):
    steps = float(exact.steps_to(0.95, np.array(gains, np.float32)))
    assert np.isnan(steps) if expected is None else steps == expected


def test_the_best_of_a_class_is_the_optimum_where_it_holds_the_win_rates():
    """A gold reward of 0 wins half of all pairs: no policy gains anything, and no reward of the class does."""
    frozen = exact.problem_of("linear", "bandit", 0)
    bounds = exact.bounds_of(frozen._replace(gold=0.0 * frozen.gold), 0.03, restarts=2, steps=300)
    np.testing.assert_allclose(bounds, 0.5, atol=2e-3)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"methods": ("PPO2",)}, "--methods knows"),
        ({"families": ("square",)}, "--families knows"),
        ({"kl_price": 0.0}, "--kl-price must be positive"),
        ({"exact_steps": 1}, "--exact-steps must be at least 2"),
        ({"starts": (1, 5)}, "--starts are numbers from 0 to 4, got (1, 5)"),
        ({"starts": ()}, "--starts are numbers"),
    ],
)
def test_what_cannot_be_run_is_refused(tmp_path, capsys, options, message):
    with pytest.raises(SystemExit) as stopped:
        one_run.main(one_run.Config(output=tmp_path, **options))
    assert stopped.value.code == 2 and message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_sweep_on_the_labels_of_one_run_is_beside_the_mean_of_its_starts():
    def result(problem, method, utility, labels):
        utility = np.array(utility)
        return one_run.Result(problem, method, (0.1, 0.6), utility, utility, utility, utility, 0.5, 1.0, None, labels)

    ours = result("p", one_run.SCALED, [[0.6, 0.7], [0.7, 0.9]], 100)
    sweep = result("p" + one_run.SHARED, "RLOO", [[0.5, 0.6], [0.7, 0.6]], 50)
    (row,) = one_run.shared_table([ours, sweep]).rows
    # Our means are 0.65 and 0.8; the best start is 0.6 on average (0.1 and 0.6 tie), each seed's best 0.6 and 0.7.
    assert row[:3] == ("p", "RLOO", "50") and row[3].startswith("0.600")
    assert row[4].startswith("0.125") and row[5].startswith("0.075")


def test_a_part_has_its_share_of_the_steps():
    setup = stories.Setup(*[None] * 8, 512, 8, 8, hold=6)._replace(steps=64)
    part = stories.share_of(setup, stories.Budget((0,), 64, 8, 1))
    assert (part.budget.steps, part.setup.steps, part.setup.hold, part.setup.buffer) == (13, 13, 1, 104)
    assert stories.share_of(setup, stories.Budget((0,), 64, 8, 1, starts=(1, 2, 3))).budget.steps == 22


@pytest.mark.slow
@pytest.mark.skipif(not STORIES.is_dir(), reason=f"the pretrained model is missing: {STORIES}")
@pytest.mark.parametrize("methods", [(stories.SCALED, "online DPO"), (stories.CONTROLLER,)])
def test_stories_run_from_every_start(tmp_path, methods):
    config = one_run.Config(
        policy=STORIES, methods=methods, golds=("words",), families=("linear",), kinds=("bandit",), seeds=2, steps=2,
        exact_steps=2, shared_labels=True, output=tmp_path,
    )  # fmt: skip
    results = results_of(one_run.main(config))
    shared = {method for problem, method in results if problem.endswith(one_run.SHARED)}
    swept = [method for method in methods if method != stories.SCALED]
    assert shared == {*swept, *(f"{method}, 3 x rate" for method in swept)}
    for method in methods:
        result = results["stories, words", method]
        assert np.shape(result["utility"]) == (2, 5) and result["labels"] == 2 * 8 * 4
        assert result["starts"] == list(stories.TARGETS if method == stories.CONTROLLER else stories.BETAS)
        assert np.all(np.isfinite(result["utility"])) and np.all(np.array(result["utility"]) < 1)
