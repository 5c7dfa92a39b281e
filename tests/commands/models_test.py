"""`sample` and `export`: models and tokenizers are read and written as they are."""

import dataclasses
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

from jaxrlhf.commands import export, models, sample
from jaxrlhf.commands.main import run
from jaxrlhf.data.encode import encode_prompt
from jaxrlhf.lm.hugging_face.weights import SpecialIds
from jaxrlhf.lm.reward import reward_model
from jaxrlhf.lm.transformer.model import decoder


def test_a_reward_continues_from_a_reward_or_starts_from_a_policy(trained, aligned):
    policy, reward_run = trained
    from_policy, from_reward = models.open_reward(policy), models.open_reward(reward_run)
    assert not np.any(from_policy.params["head"])
    assert np.any(from_reward.params["head"])
    jax.tree.map(np.testing.assert_array_equal, models.open_reward(reward_run / "reward").params, from_reward.params)
    # The folder of a run that saved both.
    assert np.any(models.open_reward(aligned["all-weights"]).params["head"])


def test_samples_are_reproducible_and_begin_with_their_prompt(here, trained, capsys):
    policy, _ = trained
    settings = sample.Sample(policy=policy, prompt="good day ?", max_new_tokens=5, number=3, seed=4)
    completions = sample.main(settings)
    assert completions == sample.main(settings)
    assert len(set(completions)) > 1
    printed = capsys.readouterr().out
    assert printed.count("good day ?") == 6
    greedy = sample.main(dataclasses.replace(settings, temperature=0.0, number=2))
    assert greedy[0] == greedy[1]
    # From BOS alone.
    assert len(sample.main(dataclasses.replace(settings, prompt="", number=1))) == 1


def test_a_pretrained_model_generates_its_text(capsys):
    stories = pathlib.Path(__file__).resolve().parents[3] / "shared" / "models" / "stories260K"
    if not stories.is_dir():
        pytest.skip(f"the pretrained model is missing: {stories} does not exist")
    # An empty prompt is BOS alone.
    run(sample.Sample(policy=stories, prompt="", temperature=0.0, max_new_tokens=256))
    expected = (
        "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she"
    )
    printed = capsys.readouterr().out
    assert printed.startswith(expected)
    assert printed.endswith("Don't worry, Lily. We can help you.\n")


def test_an_export_replaces_every_file_of_another_model(trained, tmp_path):
    policy, reward_run = trained
    stale = {"bos_token_id": 5, "eos_token_id": 7, "pad_token_id": 9}
    for kind, source in (("policy", policy), ("reward", reward_run)):
        target = tmp_path / kind
        target.mkdir()
        (target / "chat_template.jinja").write_text("old")
        (target / "generation_config.json").write_text(json.dumps(stale))
        export.main(export.Export(source=source, to=target, kind=kind))
        bundle = models.open_bundle(target)
        assert bundle.template is None
        assert (bundle.special.bos, bundle.special.eos) == (0, (1,))


def test_a_reward_model_pads_with_a_token_that_no_text_ends_with(trained, tmp_path):
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    model = models.open_model(trained[1], "reward")
    bundle = model.bundle._replace(special=SpecialIds(0, (1,), 1))
    models.save_model(tmp_path, model._replace(bundle=bundle), "reward")
    tokens = np.array([[0, 3, 5, 6, 1]])
    with torch.no_grad():
        theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)(torch.tensor(tokens)).logits
    ours = jax.jit(reward_model(decoder(model.config)).score)(model.params, tokens, tokens >= 0)
    np.testing.assert_allclose(ours, theirs[:, 0].numpy(), atol=1e-4)


def test_bos_is_prepended_as_the_tokenizer_says(world, tmp_path):
    shutil.copytree(world / "base", tmp_path / "plain")
    settings = {"bos_token": None, "eos_token": "</s>", "add_bos_token": False}
    (tmp_path / "plain" / "tokenizer_config.json").write_text(json.dumps(settings))
    encoded = [
        encode_prompt(models.open_bundle(directory).chat_tokenizer(), "good day")
        for directory in (world / "base", tmp_path / "plain")
    ]
    assert [tokens.tolist() for tokens in encoded] == [[0, 3, 5], [3, 5]]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_export_equals_its_source(here, trained, tmp_path, dtype):
    policy, reward_run = trained
    for kind, source in (("policy", policy), ("reward", reward_run)):
        export.main(export.Export(source=source, to=tmp_path / kind, kind=kind, dtype=dtype))
        original, exported = (models.open_model(path, kind).params for path in (source, tmp_path / kind))
        rounded = jax.tree.map(lambda leaf: leaf.astype(dtype).astype("float32"), original)
        jax.tree.map(np.testing.assert_array_equal, rounded, exported)
    with pytest.raises(ValueError, match="is a file; name a directory"):
        export.main(export.Export(source=policy, to=here / "pairs.jsonl"))
    with pytest.raises(ValueError, match="is the source itself"):
        export.main(export.Export(source=policy, to=policy / "policy"))
