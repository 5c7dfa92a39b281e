"""Runs ended by kill -9 resume bit for bit: a kill in the default run, three of each method in the slow one."""

import json
import pathlib
import subprocess
import sys

import pytest

from jaxrlhf.algorithms.methods import METHODS

KILLS = pathlib.Path(__file__).parents[2] / "experiments" / "kills.py"


def killed(tmp_path, make_world, *options, kills=3, seed=7):
    """The results of a study."""
    (tmp_path / "world").mkdir()
    world = make_world(tmp_path / "world")
    command = [sys.executable, KILLS, "--policy", world / "base", "--kills", kills, "--most", kills, "--steps", "12"]
    command += ["--seed", seed, "--output", tmp_path / "runs", *options]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    (found,) = (tmp_path / "runs").glob("kills-*/results.json")
    return json.loads(found.read_text())


def test_a_kill_changes_nothing(tmp_path, make_world):
    # The method is the one that starts fastest.
    results = killed(tmp_path, make_world, "--method", "online-dpo", "--reuse", "1", kills=1)
    assert results["differences"] == [] and len(results["kills"]) == 1


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_three_kills_change_nothing_of_any_method_and_kept_labels(tmp_path, make_world, method):
    results = killed(tmp_path, make_world, "--method", method, "--reuse", "1")
    assert results["differences"] == [] and len(results["kills"]) == 3
    if method == "online-dpo":
        # With this seed each of the three moments that are waited for occurs once.
        moments = [kill["moment"] for kill in results["kills"]]
        assert sorted(moments) == ["in a checkpoint", "labels written", "while labelling"]
