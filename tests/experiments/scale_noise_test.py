"""`scale_noise.py`: its measure on gradients of known noise, and the command on a few steps."""

import json
import pathlib
import sys

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
STORIES = ROOT.parent / "shared" / "models" / "stories260K"
sys.path.append(str(ROOT / "experiments"))

import scale_noise  # noqa: E402


def test_the_relative_error_is_that_of_one_draw():
    """Noise of 3 in each of 4 numbers around a mean of size 2: 6 / 2, with the noise of the mean itself taken off."""
    random = np.random.default_rng(0)
    draws = np.array([1.0, 1.0, 1.0, 1.0]) + 3.0 * random.normal(size=(20_000, 4))
    assert scale_noise.relative_error({"a": draws[:, :1], "b": draws[:, 1:]}) == pytest.approx(3.0, rel=0.03)
    assert scale_noise.relative_error(np.stack([np.ones(3), -np.ones(3)])) == float("inf")


@pytest.mark.slow
@pytest.mark.skipif(not STORIES.is_dir(), reason=f"the pretrained model is missing: {STORIES}")
def test_the_command_measures_both_kinds_of_pairs(tmp_path):
    folder = scale_noise.main(scale_noise.Config(policy=STORIES, steps=(2, 4), draws=4, output=tmp_path))
    rows = json.loads((folder / "results.json").read_text())["rows"]
    assert [row["step"] for row in rows] == [2, 2, 4, 4] and len({row["pairs"] for row in rows}) == 2
    assert all(row["deviation"] > 0 and row["scale"] > 0 for row in rows)
