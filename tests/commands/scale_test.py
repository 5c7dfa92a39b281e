"""`jaxrlhf align --learn-scale`: with all weights and with adapters, saved, reported, and resumed."""

import json

import numpy as np
import pytest

from jaxrlhf.commands import align, models
from jaxrlhf.training.run_folder import RunFolder


def settings(here, **others):
    shared = {"data": "pairs.jsonl", "score": "annotators:score", "policy": here / "base", "held_out": 0.25, "steps": 2}
    shared |= {"batch_size": 4, "pairs": 2, "max_new_tokens": 6, "evaluations": 1, "evaluation_answers": 4}
    return align.Align(
        **shared | {"data_dir": here / "prepared", "output": here / "scaled", "learn_scale": True} | others
    )


@pytest.mark.parametrize("rank", [0, 2])
def test_the_scale_is_learned_reported_and_left_out_of_the_saved_reward(here, trained, report_text, rank):
    folder = align.main(settings(here, lora_rank=rank, warmup=0, estimator="boltzmann" if rank else "central"))
    text = report_text(folder)
    assert "learned scale is" in text and "effective beta" in text
    row = [row for row in RunFolder.followed(folder).metrics() if "upper_loss" in row][-1]
    assert np.isfinite(row["coupled_slope"]) and np.isfinite(row["kl_slope"])
    (evaluated,) = [row for row in RunFolder.followed(folder).metrics() if "scale" in row]
    assert evaluated["scale"] != 1 and f"learned scale is {evaluated['scale']:.3g} at the end" in text
    assert evaluated["effective_beta"] * evaluated["scale"] == pytest.approx(0.2)
    reward = models.open_model(folder / "reward", "reward")
    assert reward.params["head"].shape == (reward.config.width,)
    assert json.loads((folder / "config.json").read_text())["learn_scale"] is True


def test_a_resumed_run_learns_the_same_scale(here, trained):
    options = {"lora_rank": 2, "warmup": 0, "estimator": "boltzmann", "resume": True}
    whole = align.main(settings(here, run="whole", **options))
    align.main(settings(here, run="parted", **options | {"steps": 1}))
    parted = align.main(settings(here, run="parted", **options))
    notes = [
        line
        for folder in (whole, parted)
        for line in (folder / "report.html").read_text().split("<")
        if "learned scale is" in line
    ]
    assert len(notes) == 2 and notes[0] == notes[1]
    rows = [[row for row in RunFolder.followed(folder).metrics() if "kl_slope" in row] for folder in (whole, parted)]
    assert [row["kl_slope"] for row in rows[0]] == [row["kl_slope"] for row in rows[1]] and len(rows[0]) == 2


def test_flags_that_do_not_go_together_are_refused(here):
    with pytest.raises(ValueError, match="--estimator decoupled ignores"):
        align.main(settings(here, estimator="decoupled"))
    with pytest.raises(ValueError, match=r"--scale-learning-rate.*without --learn-scale"):
        align.main(settings(here, learn_scale=False, scale_learning_rate=0.1))
    with pytest.raises(ValueError, match=r"--scale-learning-rate must not be negative"):
        align.main(settings(here, scale_learning_rate=-0.1))
