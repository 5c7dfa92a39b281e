"""`sft` and `reward`: each stage starts from the last one's folder, with all weights or adapters."""

import functools
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.commands import models, reward, stage, supervised
from jaxrlhf.lm.reward import reward_model
from jaxrlhf.lm.transformer.model import decoder


def test_stages_build_on_each_other(trained, report_text):
    policy, reward_run = trained
    results = json.loads((policy / "results.json").read_text())
    assert results["after"]["loss"] < 0.8 * results["before"]["loss"]
    assert "On held-out texts" in report_text(policy)
    predictor = json.loads((reward_run / "results.json").read_text())["reward"]
    assert predictor["accuracy"] > 0.9
    assert predictor["low"] < predictor["accuracy"] <= predictor["high"]
    assert "length of the completion" in report_text(reward_run)
    for folder, kind in ((policy, "policy"), (reward_run, "reward")):
        assert (folder / kind / "tokenizer_config.json").exists()
        assert (folder / "metrics.jsonl").read_text().count("\n") >= 12
        assert json.loads((folder / "config.json").read_text())["steps"] == 12


def test_transformers_reads_every_stage(trained):
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    policy, reward_run = trained
    tokens = np.random.default_rng(0).integers(3, 14, (2, 9))
    with torch.no_grad():
        theirs = transformers.AutoModelForCausalLM.from_pretrained(policy / "policy")(torch.tensor(tokens)).logits
        scores = transformers.AutoModelForSequenceClassification.from_pretrained(reward_run / "reward")(
            torch.tensor(tokens)
        )
    model = models.open_model(policy, "policy")
    language = decoder(model.config)
    ours = jax.jit(lambda params: language.logits(params, language.hidden(params, tokens, tokens >= 0)))(model.params)
    np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-4)
    rewards = models.open_model(reward_run, "reward")
    our_scores = jax.jit(reward_model(decoder(rewards.config)).score)(rewards.params, tokens, tokens >= 0)
    np.testing.assert_allclose(our_scores, scores.logits[:, 0].numpy(), atol=1e-4)
    tokenizer = transformers.AutoTokenizer.from_pretrained(policy / "policy")
    assert tokenizer("good day", add_special_tokens=False)["input_ids"] == [3, 5]


def test_adapters_learn_in_every_stage(here, trained, report_text, logits):
    policy, _ = trained
    shared = {"data": "pairs.jsonl", "held_out": 0.25, "steps": 8, "batch_size": 8, "lora_rank": 2, "max_length": 24}
    tuned = supervised.main(
        supervised.Supervised(
            policy=policy,
            packed=False,
            microbatches=2,
            learning_rate=1.0,
            dtype="bfloat16",
            keep_best=1,
            evaluations=8,
            **shared,
        )
    )
    # Training diverges at this learning rate; the best model before that is kept.
    rows = [json.loads(line) for line in (tuned / "metrics.jsonl").read_text().splitlines()]
    losses = {row["step"]: row["held_out_loss"] for row in rows if "held_out_loss" in row}
    best = min(losses, key=losses.__getitem__)
    assert best < 8 and f"The best on held-out data was step {best};" in report_text(tuned)
    assert float(np.max(np.abs(logits(tuned / "best") - logits(tuned)))) > 1e-2
    pytest.importorskip("tensorboardX")
    settings = {"learning_rate": 3e-2, "ties": 0.1, "track": "tensorboard", "evaluations": 1, "lora_alpha": 5.0}
    reward_run = reward.main(reward.Reward(policy=policy, **settings, **shared))
    assert list((reward_run / "tensorboard").iterdir())
    assert json.loads((reward_run / "results.json").read_text())["reward"]["accuracy"] > 0.8
    for folder, kind, bound in ((tuned / "best", "policy", 2e-2), (reward_run, "reward", 1e-6)):
        merged = models.open_model(folder, kind)
        adapted = models.open_model(folder / kind / "adapter", kind)
        assert adapted.adapted and "is merged into" in adapted.notes[0] and not merged.adapted
        # The merged policy is stored in bfloat16, under its base.
        ours, theirs = (model.params.get("trunk", model.params)["layers"] for model in (adapted, merged))
        jax.tree.map(functools.partial(np.testing.assert_allclose, atol=bound), ours, theirs)
    exported = models.save_model(here / "from-adapter", adapted, "reward")
    chex.assert_trees_all_equal(models.open_model(exported, "reward").params["head"], adapted.params["head"])


def test_an_adapter_of_a_merged_base_is_not_written(tmp_path):
    start = models.Model(None, {}, None, (), adapted=True)
    models.save_trained_adapter(tmp_path, start, {}, "policy")
    assert not list(tmp_path.iterdir())


def test_norms_and_biases_do_not_decay():
    layers = {
        "mlp_norm": {"scale": jnp.ones((3, 4))},
        "gate_up": {"weight": jnp.ones((3, 4, 2, 5)), "bias": jnp.ones((3, 2, 5))},
    }
    params = {"layers": layers, "embedding": jnp.ones((7, 4)), "head": jnp.ones(4)}
    optimizer = stage.adamw(supervised.Supervised(data="", weight_decay=0.5, warmup=0.0), 10)
    gradient = jax.tree.map(jnp.zeros_like, params)
    updates, _ = jax.jit(optimizer.update)(gradient, jax.jit(optimizer.init)(params), params)
    decayed = jax.tree.map(lambda leaf: bool(jnp.any(leaf != 0)), updates)
    assert decayed["layers"] == {"mlp_norm": {"scale": False}, "gate_up": {"weight": True, "bias": False}}
    assert decayed["embedding"] and not decayed["head"]
