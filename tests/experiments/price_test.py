"""The main job of `online_rlhf.py`: its language, its exact answers, its files, and the claim that it makes."""

import importlib.util
import json
import math
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from jaxrlhf import exact

ROOT = pathlib.Path(__file__).resolve().parents[2]
KAPPA = 0.03


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


online_rlhf = load("online_rlhf")
price_task, price_methods, price_run = (sys.modules[name] for name in ("price_task", "price_methods", "price_run"))


@pytest.fixture(scope="module")
def checklist():
    return price_task.make_replies("checklist")


def test_the_checklist_worked_out_by_hand(checklist):
    """Every box matters: each of these replies misses one, but for the first and the last."""
    gold = dict(zip(checklist.texts[0], np.asarray(checklist.frozen.gold[0]).tolist(), strict=True))
    assert gold["Hello! We open at nine. Deliveries come first."] == 4
    assert gold["Hello! We never close. Deliveries come first."] == 0
    assert gold["Hello! We open at nine. It is what it is."] == 0
    assert gold["Well. We open at nine. Deliveries come first. Bye."] == 0
    long = "We are always happy to help you, so please do write again!"
    assert gold[f"Hello! We open at nine. Deliveries come first. {long}"] == 0
    assert gold["We open at nine. Deliveries come first. Have a nice day!"] == 4


def test_the_language_is_what_its_docstring_says(checklist):
    assert checklist.frozen.features.shape == (4, 256, 4)
    assert all(len(set(texts)) == 256 for texts in checklist.texts)
    words = [[len(text.split()) for text in texts] for texts in checklist.texts]
    np.testing.assert_allclose(10 * checklist.frozen.features[..., 3], words, rtol=1e-6)
    np.testing.assert_allclose(jnp.exp(checklist.frozen.reference).sum(-1), 1.0, rtol=1e-6)


def test_the_control_is_linear_in_the_scores_and_the_checklist_is_not(checklist):
    features = np.asarray(checklist.frozen.features).reshape(-1, 4)
    residuals = []
    for gold in price_task.GOLDS:
        values = np.asarray(price_task.gold_reward(gold, checklist.frozen.features)).ravel()
        weights = np.linalg.lstsq(np.column_stack([features, np.ones(len(features))]), values, rcond=None)[0]
        residuals.append(np.abs(features @ weights[:4] + weights[4] - values).max())
    assert residuals[0] > 1.0
    assert residuals[1] < 1e-6


@pytest.mark.parametrize("gold", ["checklist", "weighted"])
def test_the_lines_of_the_figure_are_what_they_say(gold):
    """The optimum against ascent on free logits; the best in class against its own gradient and against other weights."""
    replies = price_task.make_replies(gold)
    reference, wins = replies.frozen.reference, replies.wins

    def of_policy(log_policy):
        return price_task.utility(log_policy, wins, reference, KAPPA)[0]

    optimum = price_task.optimum(replies, KAPPA)
    reached = jax.grad(lambda logits: of_policy(jax.nn.log_softmax(logits)))(reference + wins / KAPPA)
    assert float(of_policy(exact.soft_policy(wins, reference, KAPPA))) == pytest.approx(optimum, abs=1e-6)
    assert float(jnp.abs(reached).max()) < 1e-6

    def of_weights(weights):
        return of_policy(exact.soft_policy(price_task.reward(weights, replies.frozen.features), reference, 1.0))

    best, weights = price_task.best_in_class(replies, KAPPA)
    assert 0.5 < best <= optimum + 1e-6
    assert float(of_weights(jnp.asarray(weights))) == pytest.approx(best, abs=1e-6)
    loss = jax.jit(jax.value_and_grad(lambda weights: -of_weights(weights)))
    polished = scipy.optimize.minimize(lambda weights: [*map(np.asarray, loss(weights))], weights, jac=True)
    assert -polished.fun < best + 5e-5
    others = 6.0 * jax.random.normal(jax.random.key(5), (500, 4))
    assert float(jax.lax.map(of_weights, others).max()) < best
    assert float(of_policy(reference)) == pytest.approx(price_task.REFERENCE_UTILITY, abs=1e-6)


@pytest.fixture(scope="module")
def short_run(tmp_path_factory):
    output = tmp_path_factory.mktemp("runs")
    options = {"steps": 4, "pairs": 2, "seeds": 2, "betas": (0.1, 4.0), "methods": price_methods.METHODS}
    online_rlhf.main(online_rlhf.Config(output=output, **options))
    (folder,) = output.iterdir()
    return folder


def test_the_results_hold_every_run(short_run):
    results = json.loads((short_run / "results.json").read_text())
    for panel in (results, results["control"]):
        assert panel["kl_price"] == KAPPA
        assert panel["seeds"] == 2
        assert panel["reference"] == 0.5 < panel["best_in_class"] <= panel["optimum"] + 1e-6
        assert set(panel["methods"]) == set(price_methods.METHODS)
        for betas in panel["methods"].values():
            assert set(betas) == {"0.1", "4"}
            for runs in betas.values():
                assert runs["labels"] == 4 * 4 * 2
                for utility, win_rate, kl in zip(runs["utility"], runs["win_rate"], runs["kl"], strict=True):
                    assert utility == pytest.approx(win_rate - KAPPA * kl, abs=1e-6)
                assert len(set(runs["utility"])) == 2  # the seeds differ
    moved = [runs["log_scale"] for runs in results["methods"]["bilevel"].values()]
    assert all(abs(value) > 0.01 for values in moved for value in values)
    still = [results["methods"][name]["4"]["log_scale"] for name in ("decoupled", "fixed_scale")]
    assert still == [[0.0, 0.0]] * 2


def test_the_folder_holds_metrics_samples_a_picture_and_a_report(short_run):
    rows = [json.loads(line) for line in (short_run / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2 * 3 * 2 * 5
    assert all(math.isfinite(value) for row in rows for value in row["utility"])
    assert [row["labels"] for row in rows[:5]] == [0, 8, 16, 24, 32]
    assert (short_run / "curves.png").read_bytes().startswith(b"\x89PNG")
    samples = (short_run / "samples.txt").read_text()
    assert samples.count("## ") == 1 + 3 * 2
    report = (short_run / "report.html").read_text()
    assert "[When do you open?]" in samples
    assert "When do you open?" in report
    assert "best in class" in report
    assert json.loads((short_run / "config.json").read_text())["steps"] == 4


def test_one_reward_learning_rate_is_every_methods():
    settings = online_rlhf.resolved(online_rlhf.Config(reward_learning_rate=0.02))
    assert settings.reward_learning_rate == {"bilevel": 0.02, "decoupled": 0.02}
    assert online_rlhf.resolved(online_rlhf.Config()).reward_learning_rate["decoupled"] == 0.1


@pytest.fixture
def optimised_runs(monkeypatch):
    """Runs compiled as for a user: these last longer than their compilation."""
    plain = price_methods.compiled_runs
    options = {"xla_backend_optimization_level": 2}
    monkeypatch.setattr(price_methods, "compiled_runs", lambda *given: jax.jit(plain(*given), compiler_options=options))


def shares(method, gold, betas):
    """The default run's share of the gain from the reference to the best in class, at two of its seeds."""
    settings = online_rlhf.resolved(online_rlhf.Config())
    replies = price_task.make_replies(gold)
    runs = price_methods.train(method, replies, betas, (0, 1), settings.training(method))
    best, _ = price_task.best_in_class(replies, KAPPA)
    return (runs.utility - 0.5) / (best - 0.5)


def test_the_price_is_met_whatever_beta_and_iterated_rlhf_meets_it_at_one(optimised_runs):
    """Two betas at the labels of the default run: the claim, seed by seed."""
    assert shares("bilevel", "checklist", (0.1, 4.0)).min() > 0.95
    iterated = shares("decoupled", "checklist", (0.25, 4.0))
    assert iterated[0].max() < 0.96
    assert iterated[1].max() < 0.05
    control = shares("decoupled", "weighted", (0.25, 4.0))
    assert control[0].min() > 0.95
    assert control[1].max() < 0.2


@pytest.mark.slow
@pytest.mark.parametrize("flags", ["", "--xla_cpu_max_isa=SSE4_2"])
def test_the_default_run_on_several_instruction_sets(flags, tmp_path):
    """A minute each: every run is within 5% of the best in class, and iterated RLHF is level in the control."""
    command = [sys.executable, str(ROOT / "experiments" / "online_rlhf.py"), "--output", str(tmp_path)]
    subprocess.run(command, check=True, timeout=600, env=os.environ | {"XLA_FLAGS": flags})
    (path,) = tmp_path.glob("*/results.json")
    results = json.loads(path.read_text())
    for panel in (results, results["control"]):
        bilevel = np.array([runs["utility"] for runs in panel["methods"]["bilevel"].values()])
        assert bilevel.shape == (7, 5)
        assert (bilevel.min() - 0.5) / (panel["best_in_class"] - 0.5) > 0.95
    control = results["control"]["methods"]
    best = max(np.mean(runs["utility"]) for runs in control["decoupled"].values())
    assert best > max(np.mean(runs["utility"]) for runs in control["bilevel"].values()) - 0.01
