"""Models as the commands print, score and export them: one token for every reward, and nothing lost or added unseen."""

import dataclasses
import functools
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from jaxrlhf.commands import (
    align,
    align_report,
    annotators,
    comparison,
    evaluate,
    export,
    models,
    reward,
    sample,
    supervised,
)
from jaxrlhf.data import Message, Preference
from jaxrlhf.data.batches import padded_pairs, padded_prompts, rectangle
from jaxrlhf.data.encode import encode_prompt
from jaxrlhf.data.tokenization import tokenize_pairs
from jaxrlhf.lm.hugging_face.weights import SpecialIds, save_decoder
from jaxrlhf.lm.learning import pair_scores
from jaxrlhf.lm.memory import MemoryPlan
from jaxrlhf.lm.pairing import Prompts, Responses
from jaxrlhf.lm.reward import reward_model, score_responses
from jaxrlhf.lm.transformer.config import DecoderConfig
from jaxrlhf.lm.transformer.model import decoder

SHAPE = DecoderConfig(
    vocabulary_size=261,
    width=16,
    layers=1,
    query_heads=2,
    key_value_heads=1,
    head_size=8,
    mlp_width=24,
    context_length=96,
)
BOS, EOS, END = range(257, 260)
GUIDE = pathlib.Path(__file__).resolve().parents[2] / "docs" / "language_models.md"
ASK = Message("user", "Hi?")
PAIRS = [
    Preference((ASK,), (Message("assistant", first),), (Message("assistant", second),))
    for first, second in (("Yes", "No"), ("A longer answer!", "?"), ("!!", "What\nnow"))
]


@functools.cache
def lively_params():
    return jax.jit(lambda: jax.tree.map(lambda leaf: 3 * leaf, decoder(SHAPE).init(jax.random.key(0))))()


@pytest.fixture
def policy(lay_out, tmp_path):
    """`policy(template, layout="config", **config)`: a random policy's directory."""

    def make(template, layout="config", **config):
        directory = tmp_path / "policy"
        params = lively_params()
        save_decoder(directory, SHAPE, params)
        settings = json.loads((directory / "config.json").read_text())
        (directory / "generation_config.json").unlink()
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            settings.pop(name)
        return lay_out(directory, layout, template, **(settings | config))

    return make


@functools.cache
def scoring(config):
    """The compiled scores of pairs of texts, and of sampled pairs."""
    rewards = reward_model(decoder(config))
    return tuple(jax.jit(functools.partial(score, rewards)) for score in (pair_scores, score_responses))


def with_head(policy):
    model = models.reward_on(models.open_model(policy, "policy"))
    head = jnp.asarray(np.random.default_rng(0).normal(0, 2, SHAPE.width), jnp.float32)
    return model._replace(params=model.params | {"head": head})


@pytest.mark.parametrize("template", ["eos", "eos-line", "own-line", "own-then-eos", "blocks"])
def test_a_pair_scores_the_same_everywhere(policy, tmp_path, template):
    """In `reward` and `evaluate`, in `align`, by `--annotator DIR`, and in transformers."""
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    start = policy(template)
    saved = models.save_model(tmp_path / "reward", with_head(start), "reward")
    model, bundle = models.open_model(saved, "reward"), models.open_bundle(start)
    tokenizer, (score_pairs, score_sampled) = bundle.chat_tokenizer(), scoring(model.config)

    rows = tokenize_pairs(models.open_bundle(saved).chat_tokenizer(), PAIRS, max_length=90).rows
    learned = np.asarray(score_pairs(model.params, padded_pairs(rows, 96)))

    # What the sampler writes of the same answers: up to its first stop token.
    said = []
    for row in rows:
        for text in (row.first, row.second):
            tokens = text.tokens[int(text.completion_mask.argmax()) :]
            said.append(tokens[: int(np.isin(tokens, bundle.stop_ids).argmax()) + 1])
    prompts = Prompts(*padded_prompts([encode_prompt(tokenizer, (ASK,))] * len(PAIRS), 24))
    responses = Responses(*(jnp.asarray(part).reshape(len(PAIRS), 1, 2, -1) for part in rectangle(said, 24)))
    sampled = np.asarray(score_sampled(model.params, prompts, responses))[:, 0]
    np.testing.assert_allclose(sampled, learned, rtol=1e-5)
    assert np.std(learned) > 0.1

    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(saved)
    reader = transformers.AutoTokenizer.from_pretrained(saved)
    texts, guide = [], {}
    (code,) = (
        block for block in re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL) if "ids_to_score" in block
    )
    exec(code, guide)
    for pair in PAIRS:
        for completion in (pair.chosen, pair.rejected):
            talk = [message._asdict() for message in (ASK, *completion)]
            texts.append(guide["ids_to_score"](reader, theirs, talk))
    batch = reader.pad({"input_ids": texts}, return_tensors="pt")
    with torch.no_grad():
        scores = theirs(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 0].numpy()
    np.testing.assert_allclose(scores.reshape(-1, 2), learned, rtol=1e-4)

    # The annotator draws labels of the same scores: with a head a thousand times as large, the better one.
    strong = with_head(start)
    strong = strong._replace(params=strong.params | {"head": 1000 * strong.params["head"]})
    strong_directory = models.save_model(tmp_path / "strong", strong, "reward")
    annotator = annotators.open_annotator(str(strong_directory), None, models.open_model(start, "policy"))
    labels = comparison._label_function(annotator)(jax.random.key(0), comparison._sample(prompts, *_slots(responses)))
    np.testing.assert_array_equal(labels, sampled[:, 0] > sampled[:, 1])


def _slots(responses):
    return [tuple(part[:, 0, slot] for part in responses) for slot in (0, 1)]


def test_an_export_keeps_the_generation_settings_and_names_every_end(policy, tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    source = policy("own-line", "lists", eos_token_id=EOS)
    settings = {"eos_token_id": [EOS], "temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.1, "do_sample": True}
    (source / "generation_config.json").write_text(json.dumps(settings))
    export.main(export.Export(source=source, to=tmp_path / "to"))
    told = " ".join(capsys.readouterr().out.split())
    for part in (
        "completions end '</s>' (258; tokenizer_config.json, generation_config.json, config.json)",
        "'<end>' (259; the chat template)",
        "'<s>' (257; BOS of the next text)",
        "temperature 0.6, top_p 0.9, repetition_penalty 1.1, do_sample True (kept for exports, not used here)",
        "ends a turn with '<end>' (259), which no file names beside '</s>' (258); it ends a completion too.",
    ):
        assert part in told
    written = json.loads((tmp_path / "to" / "generation_config.json").read_text())
    assert written == settings | {"eos_token_id": [EOS, END], "bos_token_id": BOS, "pad_token_id": None}
    theirs = transformers.GenerationConfig.from_pretrained(tmp_path / "to")
    assert (theirs.temperature, theirs.top_p, theirs.eos_token_id) == (0.6, 0.9, [EOS, END])
    assert models.open_bundle(tmp_path / "to").stop_ids == models.open_bundle(source).stop_ids
    # Whoever reads the export has nothing left to be told.
    assert not models.open_bundle(tmp_path / "to").found.notes


KEPT = {
    "dropout": ({"attention_dropout": 0.1, "initializer_range": 0.05, "note": "mine"}, True),
    "of the decoder": ({"rms_norm_eps": 1e-3, "rope_scaling": None}, False),
    "quantisation": ({"quantization_config": None, "auto_map": {"a": "b"}, "transformers_version": "4.1"}, False),
    "labels": ({"num_labels": 7, "id2label": {"3": "x"}}, False),
    "old generation settings": ({"temperature": 0.5}, False),
}


@pytest.mark.parametrize(("further", "kept"), KEPT.values(), ids=KEPT.keys())
@pytest.mark.parametrize("kind", ["policy", "reward"])
def test_settings_that_are_not_read_are_written_again(policy, tmp_path, further, kept, kind):
    transformers = pytest.importorskip("transformers")
    source = policy("eos", **further)
    model = models.open_model(source, "policy") if kind == "policy" else with_head(source)
    saved = models.save_model(tmp_path / "saved", model, kind)
    written = json.loads((saved / "config.json").read_text())
    for name, value in further.items():
        assert (written.get(name) == value and name in written) == (kept or name in ("rms_norm_eps",))
    theirs = transformers.AutoConfig.from_pretrained(saved)
    assert theirs.architectures == written["architectures"]
    assert (getattr(theirs, "attention_dropout", 0.0) == 0.1) == ("attention_dropout" in further)
    # Not those of the model that only lends its tokenizer.
    new = model._replace(bundle=model.bundle.for_vocabulary(261))
    again = json.loads((models.save_model(tmp_path / "new", new, kind) / "config.json").read_text())
    assert not {"attention_dropout", "note"} & again.keys()


def test_every_plan_says_what_ends_a_text(policy, tmp_path, capsys):
    directory = policy("own-line")
    talks = [{"prompt": f"Is {n}?", "chosen": "Yes", "rejected": "No"} for n in range(24)]
    data = tmp_path / "pairs.jsonl"
    data.write_text("\n".join(json.dumps(talk) for talk in talks))
    shared = {"policy": directory, "data": str(data), "held_out": 0.3, "data_dir": tmp_path / "prepared", "steps": 1}
    shared |= {"output": tmp_path / "runs", "batch_size": 4, "max_length": 32}
    for command in (supervised, reward):
        config = {supervised: supervised.Supervised, reward: reward.Reward}[command](**shared)
        inputs = command.prepare(config)
        trainable = command.trainable_policy if command is supervised else command.trainable_reward
        trained = trainable(inputs.start, None, jax.random.key(0))
        more = () if command is supervised else (reward_model(decoder(inputs.start.config)), None)
        more = (*more, lambda result: result.folder.path)
        rows = command._stage(config, inputs, trained, *more).plan_rows
        assert (
            "'<end>' (259; the chat template)" in rows["completions end"]
            and "which no file names" in rows["special tokens"]
        )
    model = models.open_model(directory, "policy")
    console = Console(record=True, width=200)
    run = align.Align(policy=directory, data=str(data), score="x:y")
    align_report.print_plan(console, run, model, MemoryPlan({"reference": 1}), [])
    assert "'<end>' (259; the chat template)" in console.export_text()
    evaluate._print_plan(model, {})
    assert "'<end>' (259; the chat template)" in " ".join(capsys.readouterr().out.split())
    sample.main(sample.Sample(policy=directory, prompt="Hi", max_new_tokens=2))
    assert "which no file names" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("special", "named"),
    [
        (SpecialIds(BOS, (EOS,), None), "none"),
        (SpecialIds(BOS, (EOS,), EOS), "an end"),
        (SpecialIds(EOS, (EOS, BOS), BOS), "both"),
        (SpecialIds(BOS, (EOS,), 0), "an ordinary word"),
        (SpecialIds(BOS, (EOS,), BOS), "the beginning"),
    ],
)
def test_a_reward_model_has_padding_that_no_text_holds(policy, tmp_path, special, named):
    model = with_head(policy("eos-line", "map"))
    model = model._replace(bundle=model.bundle._replace(special=special))
    saved = models.save_model(tmp_path / "reward", model, "reward")
    again = models.open_model(saved, "reward")
    assert again.bundle.special.pad == 261 and again.bundle.tokenizer.id_to_token(261) == "<|pad|>"
    assert again.config.vocabulary_size == 262
    trunk = again.params["trunk"]
    np.testing.assert_array_equal(trunk["embedding"][:261], model.params["trunk"]["embedding"])
    for text in ("!", "!! What a day", "</s>\n", "<s> <end>"):
        tokens = [each.bundle.tokenizer.encode(text).ids for each in (model, again)]
        assert tokens[0] == tokens[1] and 261 not in tokens[0]
    map_file = json.loads((saved / "special_tokens_map.json").read_text())
    assert map_file["pad_token"] == "<|pad|>" and map_file["eos_token"]["content"] == "</s>"
    # Written again, it stays as it is; the policy of the same tokens may be judged by it.
    twice = models.save_model(tmp_path / "twice", again, "reward")
    for path in sorted({*saved.iterdir()} - {saved / "config.json"}):
        assert (twice / path.name).read_bytes() == path.read_bytes(), path.name
    models.check_tokens(model.bundle, again.bundle, named)


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"additional_special_tokens": ["<user>"]},
        {"extra_special_tokens": ["<user>"]},
        {"extra_special_tokens": {"x_token": "<user>"}},
    ],
)
def test_a_word_that_was_padding_is_still_split_off(policy, tmp_path, extra):
    transformers = pytest.importorskip("transformers")
    source = policy("eos-line", pad_token_id=0)
    settings = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(json.dumps(settings | {"pad_token": "!"} | extra))
    saved = models.save_model(tmp_path / "reward", with_head(source), "reward")
    theirs = [transformers.AutoTokenizer.from_pretrained(each) for each in (source, saved)]
    ours = [models.open_bundle(each).tokenizer for each in (source, saved)]
    assert [each.pad_token for each in theirs] == ["!", "<|pad|>"]
    for text in ("!!! What", "<user>Hi!</s>", "a ! b"):
        ids = [each(text, add_special_tokens=False)["input_ids"] for each in theirs]
        assert ids[0] == ids[1] == ours[0].encode(text, add_special_tokens=False).ids == ours[1].encode(text).ids
        assert theirs[0].decode(ids[0], skip_special_tokens=True) == theirs[1].decode(ids[0], skip_special_tokens=True)


def test_a_row_for_padding_keeps_the_vocabulary_divisible():
    sizes = {512: 576, 50257: 50258, 151936: 152000, 14: 16, 513: 514}
    assert {size: models.vocabulary_with(size, size) for size in sizes} == sizes
    assert models.vocabulary_with(100, 512) == 512


def test_a_reward_of_another_tokenizer_is_refused(policy, tmp_path):
    directory = policy("eos")
    model = with_head(directory)
    saved = models.save_model(tmp_path / "reward", model, "reward")
    annotators.open_annotator(str(saved), None, models.open_model(directory, "policy"))
    content = json.loads((saved / "tokenizer.json").read_text())
    words = content["model"]["vocab"]
    words["!"], words['"'] = words['"'], words["!"]
    (saved / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r'another tokenizer than the policy \(the same id is "!" and "\\""\)'):
        annotators.open_annotator(str(saved), None, models.open_model(directory, "policy"))


def test_a_new_model_has_no_end_outside_of_its_vocabulary(policy):
    bundle = models.open_bundle(policy("eos", eos_token_id=[EOS, 300], vocab_size=320))
    assert bundle.special.eos == (EOS, 300)
    shape = supervised.new_shape(bundle, width=16, layers=1, heads=2, context=32)
    assert shape.vocabulary_size == 261 and bundle.for_vocabulary(261).special.eos == (EOS,)
    assert "300" not in bundle.for_vocabulary(261).plan_rows()["completions end"]


def test_a_changed_export_is_noticed(policy, tmp_path, monkeypatch):
    source = policy("eos")

    def forgetful(directory: pathlib.Path, model: models.Model, kind: str) -> pathlib.Path:
        special = model.bundle.special._replace(eos=(END,))
        bundle = model.bundle._replace(special=special)
        saved = models.save_model(directory, model._replace(bundle=bundle), "policy")
        settings = json.loads((saved / "tokenizer_config.json").read_text())
        (saved / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": "<end>"}))
        return saved

    monkeypatch.setattr(export, "save_model", forgetful)
    with pytest.raises(ValueError, match="reads otherwise than"):
        export.main(export.Export(source=source, to=tmp_path / "to"))


def test_notes_on_weights_are_in_the_plan(policy):
    directory = policy("eos")
    model = models.open_model(directory, "policy")
    assert "weights" not in model.plan_rows()
    assert dataclasses.replace(model.config, tied_embeddings=True) == model.config
    noted = model._replace(notes=("1 tensor is not read.",))
    assert noted.plan_rows()["weights"] == "1 tensor is not read."
