"""The control study: equal label budgets, its functions against their definitions, and its command."""

import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tyro

EXPERIMENTS = pathlib.Path(__file__).resolve().parents[2] / "experiments"
sys.path.append(str(EXPERIMENTS))

import control  # noqa: E402
import control_methods as methods  # noqa: E402
import control_tasks as tasks  # noqa: E402

from jaxrlhf import bilevel  # noqa: E402
from jaxrlhf.bilevel import Labelled  # noqa: E402
from jaxrlhf.control import ensembles  # noqa: E402
from jaxrlhf.mdp import four_rooms as rooms  # noqa: E402
from jaxrlhf.mdp.trajectories import FrozenPolicies  # noqa: E402
from jaxrlhf.objectives import likelihood  # noqa: E402


@pytest.fixture(autouse=True)
def broadcasting():
    """The library forbids implicit rank promotion; the study's small networks add their biases the usual way."""
    with jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(scope="module")
def pendulum():
    return tasks.TASKS["pendulum"]()._replace(steps=20, segment=5)


def sample_of(task, pairs=6, seed=0):
    budget = methods.Budget(pairs=pairs)
    problem = methods.problem_of(task, budget, likelihood(coupled=False), ensembles.of_samples(task.reward))
    _, lower, _ = task.first(jax.random.key(seed))
    return jax.jit(problem.sample)(jax.random.key(seed), lower, None, FrozenPolicies((), lower))


def test_every_learner_buys_equally_many_labels():
    task, budget = tasks.TASKS["pendulum"](), methods.Budget()
    for name, method in methods.METHODS.items():
        collecting = methods.collecting_steps(task, method, budget)
        learning = task.outer_steps - collecting - method.exploration
        bought = collecting * budget.pairs + (learning * budget.labels if method.reward == "learned" else 0)
        assert bought == (0 if method.reward == "gold" else 20 * 16 + 100 * 8), name
        assert learning > 0
    with pytest.raises(ValueError, match="half as many labels a step as pairs"):
        methods.collecting_steps(task, methods.METHODS["iterated, entropy first"], budget._replace(labels=7))
    with pytest.raises(ValueError, match="leave none to learn in"):
        methods.collecting_steps(task._replace(outer_steps=20), methods.METHODS["iterated"], budget)


def test_the_myopic_annotator_weighs_the_end_of_each_segment(pendulum):
    sample = sample_of(pendulum)
    labelled = Labelled(sample, control.annotator_of("myopic", pendulum)(1)(jax.random.key(0), sample, ()))
    assert labelled.labels.shape == (1, 6, 1)
    window, gold = np.asarray(sample.responses.window), np.asarray(sample.responses.gold)
    score = np.zeros(window.shape[:-1])
    for index in np.ndindex(score.shape):
        inside = np.flatnonzero(window[index])
        score[index] = pendulum.scale * np.sum(0.9 ** np.arange(len(inside))[::-1] * gold[index][inside])
    # The mean of many labels of the same pair is the logistic of the difference.
    annotate = control.annotator_of("myopic", pendulum)(20000)
    probability = 1 / (1 + np.exp(score[..., 1] - score[..., 0]))
    found = np.asarray(annotate(jax.random.key(1), sample, ())).mean(axis=-1)
    np.testing.assert_allclose(found, probability, atol=5 * 0.5 / np.sqrt(20000))


def test_hidden_rewards_of_four_rooms():
    task = tasks.TASKS["four-rooms"]()
    place = {cell: state for state, cell in enumerate(rooms.CELLS)}
    for cell, expected in (((11, 11), 1.0), ((11, 9), np.exp(-2 / 3)), ((5, 8), np.exp(-9 / 3) - 0.5)):
        _, _, reward, ends = task.environment.step(jax.random.key(0), jnp.asarray(place[cell]), jnp.asarray(0))
        np.testing.assert_allclose(reward, expected, rtol=1e-6)
        assert not ends


def test_another_rule_or_budget_is_another_result(monkeypatch):
    config, task = control.Config(), tasks.TASKS["pendulum"]()

    def settings(name="bilevel central", annotator="rational", config=config):
        return control.settings_of(task, name, annotator, config)

    first = settings()
    assert first == settings() == json.loads(json.dumps(first))
    others = [
        settings("bilevel forward"),
        settings(annotator="mistaken"),
        settings(config=control.Config(seeds=3)),
        settings(config=control.Config(budget=methods.Budget(labels=4))),
    ]
    monkeypatch.setitem(methods.METHODS, "bilevel central", methods.Method(rule=bilevel.central(0.4)))
    assert all(other != first for other in [*others, settings()])


@pytest.mark.slow
def test_the_command_resumes_where_it_stopped(tmp_path, capsys):
    small = ("--outer-steps=12", "--budget.pairs=4", "--budget.labels=2", "--budget.first-steps=1", "--seeds=2")
    names = ("oracle", "bilevel, all of PEBBLE")

    def arguments(*methods):
        return ["--tasks", "cartpole", "--output", str(tmp_path), *small, "--methods", *methods]

    def run_here(*methods):
        control.main(tyro.cli(control.Config, args=arguments(*methods)))

    with pytest.raises(SystemExit, match="There is no method newton; there are oracle"):
        run_here("newton")
    command = [sys.executable, str(EXPERIMENTS / "control.py"), *arguments(*names)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("environment steps a second") == len(names)
    results = [json.loads(path.read_text()) for path in sorted((tmp_path / "curves").iterdir())]
    assert {result["method"] for result in results} == set(names)
    for result in results:
        curves = {name: np.asarray(curve, float) for name, curve in result["curves"].items() if name != "seconds"}
        assert all(curve.shape == (2, 12) for curve in curves.values())
        np.testing.assert_array_equal(curves["labels"].sum(axis=1), 0 if result["method"] == "oracle" else 26)
        # A step of CartPole pays 1: half of the steps are slot 0's, the policy's own, up to chance.
        assert np.all(np.isfinite(curves["returns"])) and np.all(curves["steps"] >= 4 * curves["returns"])
    table = (tmp_path / "tables.md").read_text()
    assert "</table>" in (tmp_path / "report.html").read_text()
    assert all(f"| {name} |" in table for name in names)
    assert (tmp_path / "bilevel.png").exists()
    capsys.readouterr()
    run_here(*names)
    again = capsys.readouterr().out
    assert table.strip() in again and "environment steps a second" not in again
    assert (tmp_path / "tables.md").read_text() == table
