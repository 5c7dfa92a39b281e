"""Runs ended by kill -9 resume bit for bit: three kills here, a hundred in `experiments/kills.py`."""

import json
import pathlib
import subprocess
import sys

KILLS = pathlib.Path(__file__).parents[2] / "experiments" / "kills.py"


def test_three_kills_change_nothing(tmp_path, make_world):
    (tmp_path / "world").mkdir()
    world = make_world(tmp_path / "world")
    command = [sys.executable, KILLS, "--policy", world / "base", "--kills", "3", "--most", "3", "--steps", "12"]
    # With this seed each of the three moments that are waited for occurs once.
    command += ["--seed", "7", "--output", tmp_path / "runs"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    (found,) = (tmp_path / "runs").glob("kills-*/results.json")
    results = json.loads(found.read_text())
    assert results["differences"] == []
    moments = [kill["moment"] for kill in results["kills"]]
    assert sorted(moments) == ["in a checkpoint", "labels written", "while labelling"]
