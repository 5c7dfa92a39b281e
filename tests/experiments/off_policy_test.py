"""The off-policy study: equal budgets, kills and resumption to the bit, updates that are not finite."""

import json
import os
import pathlib
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tyro

EXPERIMENTS = pathlib.Path(__file__).resolve().parents[2] / "experiments"
sys.path.append(str(EXPERIMENTS))

pytest.importorskip("gymnax", reason="needs the extra control")

import off_policy  # noqa: E402
import off_policy_tables as tables  # noqa: E402
import off_policy_tasks as tasks  # noqa: E402

SMALL = (
    "--tasks=pendulum", "--seeds=2", "--sessions=5", "--environment-steps=4400", "--first-steps=400", "--width=8",
    "--batch-size=8", "--fit-size=4", "--epochs=1", "--save-seconds=0",
)  # fmt: skip


@pytest.fixture(autouse=True)
def broadcasting():
    """The library forbids implicit rank promotion; the study's small networks add their biases the usual way."""
    with jax.numpy_rank_promotion("allow"):
        yield


def curves(**changes):
    rows = {
        "returns": np.linspace(-9, 0, 10).reshape(2, 5).tolist(), "steps": [[1, 2, 3, 4, 5]] * 2,
        "labels": [[2, 4, 6, 8, 10]] * 2, "predicted": [[1.0] * 5] * 2, "correlation": [[0.5] * 5] * 2,
        "seconds": 3.0, "skipped": [0, 0],
    }  # fmt: skip
    return rows | changes


def test_unequal_budgets_are_refused():
    results = {"oracle": curves(labels=[[0] * 5] * 2), "pebble": curves(), "iterated": curves()}
    tables.check_equal(results, off_policy.METHODS)
    half = {"pebble, half the labels": curves(labels=[[1, 2, 3, 4, 5]] * 2)}
    tables.check_equal(results | half, off_policy.METHODS)
    with pytest.raises(AssertionError, match="iterated bought"):
        tables.check_equal(results | {"iterated": curves(labels=[[2, 4, 6, 8, 9]] * 2)}, off_policy.METHODS)
    with pytest.raises(AssertionError, match=r"iterated took .* environment steps"):
        tables.check_equal(results | {"iterated": curves(steps=[[1, 2, 3, 4, 6]] * 2)}, off_policy.METHODS)


def test_the_table_has_means_and_intervals_over_seeds():
    lines = tables.table({"pebble": curves(), "oracle": curves(labels=[[0] * 5] * 2)}, off_policy.METHODS)
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| oracle", "| pebble"]
    # The last of five sessions: -5 and 0, whose interval is 12.706 times 2.5.
    assert "-2.50 ± 31.77 |" in lines[3] and "| 10 | 5 | 0.50 |" in lines[3]
    nothing = tables.table({"pebble": curves(returns=[[np.nan] * 5] * 2)}, off_policy.METHODS)
    assert "no episode ended" in nothing[2]


def test_trees_are_stored_without_arrays_that_have_no_elements():
    tree = (jnp.arange(3.0), {"none": jnp.zeros((2, 0))}, np.arange(4))
    stored = off_policy.stored(tree)
    assert sorted(stored) == ["0", "2"]
    back = off_policy.unstored({name: jnp.asarray(leaf) for name, leaf in stored.items()}, tree)
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    np.testing.assert_array_equal(back[1]["none"], tree[1]["none"])
    back[2][0] = 7


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--sessions=7"], "200 labels cannot be bought in 7 equal sessions"),
        (["--environment-steps=4001"], "4001 steps leave none for each of 10 sessions"),
    ],
)
def test_what_cannot_be_run_is_named(arguments, message, tmp_path):
    config = tyro.cli(
        off_policy.Config, args=["--tasks=pendulum", "--methods=oracle", f"--output={tmp_path}", *arguments]
    )
    with pytest.raises(SystemExit, match=message):
        off_policy.main(config)


def test_units_must_suit_the_observations():
    with pytest.raises(ValueError, match="2 units were given for 3 observations"):
        tasks.parts_of(tasks.TASKS["pendulum"]._replace(units=(1.0, 1.0)), width=4)


def run(command):
    done = subprocess.run(command, capture_output=True, text=True, timeout=1500, check=False)
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_bit(tmp_path):
    """Killed with -9 in the fourth of five sessions; the same command again ends with an undisturbed run's curves."""

    def command(name):
        chosen = ["--methods", "pebble", "offline", "--output", str(tmp_path / name)]
        return [sys.executable, str(EXPERIMENTS / "off_policy.py"), *SMALL, *chosen]

    def results(name):
        found = {}
        for path in sorted((tmp_path / name / "curves").iterdir()):
            found[path.name] = json.loads(path.read_text())["curves"] | {"seconds": None}
        return found

    whole = run(command("whole"))
    assert whole.stdout.count("session 5") == 2
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    with subprocess.Popen(command("killed"), **pipes) as process:
        assert process.stdout is not None
        for line in process.stdout:
            # The save of session 3 is done, or under way, when session 4 is reported.
            if line.startswith("  session 4"):
                os.kill(process.pid, signal.SIGKILL)
                break
    assert process.returncode == -signal.SIGKILL and not list((tmp_path / "killed" / "curves").iterdir())
    again = run(command("killed"))
    assert "goes on after session" in again.stdout
    assert results("killed") == results("whole") and len(results("whole")) == 2
    assert not list((tmp_path / "killed" / "saves").iterdir())


@pytest.mark.slow
def test_a_session_that_is_not_finite_is_undone_for_its_seed_alone():
    """The other seed's update is finite, without the compiler's optimisations too: gradients of the smaller critic."""
    config = tyro.cli(off_policy.Config, args=[*SMALL])
    programs = off_policy.programs_of(tasks.TASKS["pendulum"], config)
    keys = jax.random.split(jax.random.key(0), 2)
    state = off_policy.begin(programs, off_policy.METHODS["oracle"], keys)
    steps = state.learner.replay.steps
    steps = steps._replace(reward=steps.reward.at[1].set(jnp.nan))
    poisoned = state._replace(learner=state.learner._replace(replay=state.learner.replay._replace(steps=steps)))
    after, result = programs.update(keys, poisoned, programs.propose["uniform"](keys, poisoned), 0)
    np.testing.assert_array_equal(result.skipped, [False, True])
    np.testing.assert_array_equal(after.step, [1, 1])
    for old, new in zip(jax.tree.leaves(state.policy), jax.tree.leaves(after.policy), strict=True):
        np.testing.assert_array_equal(old[1], new[1])
        assert np.all(np.isfinite(new)) and not np.array_equal(old[0], new[0])
