"""The scale that `jaxrlhf align` learns from a price: with all weights and with adapters, saved, reported, and resumed."""

import json
import pathlib

import numpy as np
import pytest

from jaxrlhf.commands import align, models
from jaxrlhf.commands.align_config import check_config, estimator_of
from jaxrlhf.commands.align_report import trade_off
from jaxrlhf.commands.method_flags import beta_of, learns_scale
from jaxrlhf.training.run_folder import RunFolder


def settings(here, **others):
    shared = {"data": "pairs.jsonl", "score": "annotators:score", "policy": here / "base", "held_out": 0.25, "steps": 2}
    shared |= {"batch_size": 4, "pairs": 2, "max_new_tokens": 6, "evaluations": 1, "evaluation_answers": 4}
    return align.Align(**shared | {"data_dir": here / "prepared", "output": here / "scaled"} | others)


@pytest.mark.parametrize("kind", ["all-weights", "adapters"])
def test_the_scale_is_learned_reported_and_left_out_of_the_saved_reward(aligned, report_text, kind):
    folder = aligned[kind]
    text = report_text(folder)
    assert "learned scale is" in text and "effective beta" in text
    row = [row for row in RunFolder.followed(folder).metrics() if "upper_loss" in row][-1]
    assert np.isfinite(row["coupled_slope"]) and np.isfinite(row["kl_slope"])
    (evaluated,) = [row for row in RunFolder.followed(folder).metrics() if "scale" in row]
    assert evaluated["scale"] != 1 and f"learned scale is {evaluated['scale']:.3g} at the end" in text
    assert evaluated["effective_beta"] * evaluated["scale"] == pytest.approx(0.2)
    reward = models.open_model(folder / "reward", "reward")
    assert reward.params["head"].shape == (reward.config.width,)
    assert json.loads((folder / "config.json").read_text())["beta"] is None


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ["boltzmann", "central"])
def test_a_resumed_run_learns_the_same_scale(here, trained, estimator):
    options = {"lora_rank": 2, "warmup": 0, "estimator": estimator, "resume": True}
    whole = align.main(settings(here, run=f"{estimator}-whole", **options))
    align.main(settings(here, run=f"{estimator}-parted", **options | {"steps": 1}))
    parted = align.main(settings(here, run=f"{estimator}-parted", **options))
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
    for options, message in [
        ({"estimator": "decoupled", "learn_scale": True}, "--estimator decoupled ignores"),
        ({"beta": 0.2, "scale_learning_rate": 0.1}, r"--scale-learning-rate.*where no scale is learned"),
        ({"scale_learning_rate": -0.1}, r"--scale-learning-rate must not be negative"),
        ({"kl_price": 0.0}, r"--kl-price 0 says that KL costs nothing.*or a --beta"),
        ({"kl_price": 0.0, "method": "rloo"}, r"--kl-price 0 says that KL costs nothing.*or a --beta"),
        ({"kl_price": 0.0, "beta": 0.1, "learn_scale": True}, r"--kl-price 0 finds no scale"),
        ({"learn_scale": True, "utility_weight": 0.0}, r"--utility-weight is 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            align.main(settings(here, **options))


@pytest.mark.parametrize(
    "options, learned, beta, estimator, sentence",
    [
        ({}, True, 0.2, "boltzmann", "0.05 of win rate a nat of KL; the reward's scale is learned, from a beta of 0.2"),
        ({"beta": 0.7}, False, 0.7, "central", "a beta of 0.7"),
        ({"beta": 0.7, "learn_scale": True}, True, 0.7, "boltzmann", "is learned, from a beta of 0.7"),
        ({"target_kl": 3.0}, False, 0.2, "central", "a KL of 3 nats at the end"),
        ({"estimator": "decoupled"}, False, 0.2, "decoupled", "a beta of 0.2"),
        ({"estimator": "central", "kl_price": 0.1}, True, 0.4, "central", "0.1 of win rate a nat of KL; the reward's"),
        ({"kl_price": 0.0, "beta": 0.3}, False, 0.3, "central", "a beta of 0.3"),
        (
            {"rewards": ("a:b",), "reward_weights": (1.0,), "weights_learning_rate": 0.0},
            *(False, 0.2, "central", "a beta of 0.2, from --kl-price"),
        ),
        ({"utility_weight": 0.0}, False, 0.2, "central", "a beta of 0.2"),
        ({"method": "rloo", "kl_price": 0.03}, False, 0.12, "central", "a beta of 0.12, from --kl-price"),
        ({"method": "online-ipo"}, False, 0.05, "central", "a beta of 0.05, from --kl-price"),
        ({"method": "label-gradient"}, False, 0.2, "central", "0.05 of win rate a nat of KL"),
    ],
)
def test_a_price_a_beta_or_a_target_says_how_far_the_policy_goes(options, learned, beta, estimator, sentence):
    config = align.Align(policy=pathlib.Path("p"), data="d", score="s:s", **options)
    check_config(config)
    assert (learns_scale(config), beta_of(config)) == (learned, beta)
    assert estimator_of(config) == estimator and sentence in trade_off(config)
    assert learned or "is learned" not in trade_off(config)


@pytest.mark.parametrize("price", [0.01, 0.05, 0.3])
def test_the_beta_of_a_price_is_the_best_one_while_wins_are_even(price):
    """Small rewards r of 50 responses, uniform reference: the policies exp(r / beta), all in closed form."""
    rewards = 1e-3 * price * np.random.default_rng(0).normal(size=50)
    wins = np.mean(1.0 / (1.0 + np.exp(rewards[None, :] - rewards[:, None])), axis=1)

    def utility(beta):
        policy = np.exp(rewards / beta) / np.sum(np.exp(rewards / beta))
        return policy @ wins - price * policy @ np.log(50 * policy)

    config = align.Align(policy=pathlib.Path("p"), data="d", score="s:s", method="rloo", kl_price=price)
    betas = beta_of(config) * np.geomspace(0.5, 2.0, 801)
    assert betas[np.argmax([utility(beta) for beta in betas])] == pytest.approx(4 * price, rel=1e-2)
