"""`align` and `evaluate`: with all weights and with adapters, labelled by a function and by a reward model."""

import json
from types import SimpleNamespace

import chex
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.commands import align, align_setup, evaluate, models
from jaxrlhf.commands.annotators import ComparisonAnnotator
from jaxrlhf.lm import lora
from jaxrlhf.lm.reward import reward_model
from jaxrlhf.lm.transformer.model import decoder


@pytest.mark.parametrize("kind", ["all-weights", "adapters"])
def test_alignment_moves_the_policy_and_reports(trained, aligned, report_text, logits, kind):
    policy, reward_run = trained
    folder = aligned[kind]
    assert float(np.max(np.abs(logits(folder) - logits(policy)))) > 1e-3
    results = json.loads((folder / "results.json").read_text())
    assert results["labels"] == 6 * 4 * 2
    assert 0 <= results["aligned"]["win_rate"] <= 1
    assert results["reference"]["kl"] == pytest.approx(0.0, abs=1e-5)
    assert "Completions of held-out prompts" in report_text(folder)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "upper_loss" in row] == [1, 2, 3, 4, 5, 6]
    # Nothing has been updated before the first step, whatever precision the weights are in.
    assert rows[0]["kl"] == pytest.approx(0.0, abs=1e-5)
    assert models.open_model(folder, "reward").config == models.open_model(reward_run, "reward").config
    # The only evaluated step is the last one.
    assert (folder / "best").is_dir() == (kind == "adapters")
    if kind == "adapters":
        np.testing.assert_array_equal(logits(folder / "best"), logits(folder))
        for name in ("policy", "reward"):
            whole, adapted = (models.open_model(folder / name / end, name) for end in ("", "adapter"))
            # Merged in bfloat16.
            ours, theirs = (model.params.get("trunk", model.params)["layers"] for model in (whole, adapted))
            chex.assert_trees_all_close(ours, theirs, atol=2e-2)


def test_policies_and_rewards_are_evaluated(here, trained, aligned, report_text):
    policy, reward_run = trained
    shared = {"data": "pairs.jsonl", "held_out": 0.25}
    settings = {"annotator": "annotators:prefers_sun", "prompts": 8, "max_new_tokens": 6}
    folder = evaluate.main(evaluate.Evaluate(policy=aligned["all-weights"], reference=policy, **settings, **shared))
    results = json.loads((folder / "results.json").read_text())
    assert results["kl"] != 0
    assert "win rate against the reference" in report_text(folder)
    folder = evaluate.main(evaluate.Evaluate(reward=reward_run, split="test", **shared))
    during_training = json.loads((reward_run / "results.json").read_text())["reward"]
    evaluated = json.loads((folder / "results.json").read_text())["reward"]
    assert evaluated["pairs"] == during_training["pairs"]
    assert evaluated["log_loss"] == pytest.approx(during_training["log_loss"], rel=1e-4)


def test_an_adapter_on_a_reward_model_starts_as_that_model(trained):
    """Its trunk is not the policy's: the frozen parameters hold it, and the trained ones add nothing yet."""
    policy_run, reward_run = trained
    policy, reward = models.open_model(policy_run, "policy"), models.open_model(reward_run, "reward")
    config = align.Align(policy=policy_run, reward=reward_run, data="", lora_rank=2, pairs=1, microbatches=1, beta=0.1)
    setup = align_setup.build_setup(config, policy, reward, ComparisonAnnotator(None, None, ()))
    start = setup.reward_of(SimpleNamespace(upper=setup.upper))
    chex.assert_trees_all_equal(start, reward.params)
    tokens, mask = jnp.arange(6)[None] % 5, jnp.ones((1, 6), bool)
    model = reward_model(decoder(reward.config))
    chex.assert_trees_all_equal(
        model.score(lora.reward_on_own_trunk(setup.upper, setup.frozen), tokens, mask),
        model.score(reward.params, tokens, mask),
    )
