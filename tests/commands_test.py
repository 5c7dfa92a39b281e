"""The command line end to end: every stage from the last one's folder, reports, and what cannot be done."""

import dataclasses
import html.parser
import json
import pathlib
import runpy
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.annotation.functions import load_function
from jaxrlhf.commands import align, evaluate, export, models, reward, sample, stage, supervised
from jaxrlhf.commands.main import COMMANDS, run
from jaxrlhf.data.encode import encode_prompt
from jaxrlhf.data.records import DataError
from jaxrlhf.lm.hugging_face.weights import SpecialIds
from jaxrlhf.lm.reward import reward_model
from jaxrlhf.lm.transformer.model import decoder

EXPERIMENTS = pathlib.Path(__file__).parents[1] / "experiments"
JUDGES = """
def score(prompts, completions):
    return [float(text.split().count("sun")) - float(text.split().count("rain")) for text in completions]


def prefers_sun(prompts, firsts, seconds):
    pairs = zip(score(prompts, firsts), score(prompts, seconds))
    return [None if a == b else float(a > b) for a, b in pairs]


def signs(prompts, firsts, seconds):
    return [-1.0] * len(prompts)


def silent(prompts, firsts, seconds):
    return None


def too_few(prompts, completions):
    return [0.0]


def rude(prompts, firsts, seconds):
    return [7.0] * len(prompts)
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory, make_world):
    """A folder with a tiny model, preferences for `sun` over `rain`, prompts and a module of judges; one works in it."""
    folder = make_world(tmp_path_factory.mktemp("world"))
    (folder / "judges.py").write_text(JUDGES)
    return folder


@pytest.fixture
def here(world, monkeypatch):
    monkeypatch.chdir(world)
    monkeypatch.syspath_prepend(str(world))
    return world


@pytest.fixture(scope="module")
def learned(world):
    """Folders of a supervised and a reward run."""
    shared = {"held_out": 0.25, "data_dir": world / "prepared", "output": world / "runs", "evaluations": 1}
    data = str(world / "pairs.jsonl")
    first = supervised.main(
        supervised.Supervised(
            data=data, policy=world / "base", steps=12, batch_size=8, max_length=24, learning_rate=1e-2, **shared
        )
    )
    second = reward.main(
        reward.Reward(data=data, policy=first, steps=12, batch_size=8, max_length=24, learning_rate=1e-2, **shared)
    )
    return first, second


class Balanced(html.parser.HTMLParser):
    """Collects text, and fails on tags that do not close."""

    def __init__(self):
        super().__init__()
        self.open, self.text = [], []

    def handle_starttag(self, tag, attrs):
        if tag not in {"meta", "img", "br", "link", "hr", "col", "input"}:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def told(folder):
    page = Balanced()
    page.feed((folder / "report.html").read_text())
    assert not page.open
    return " ".join(" ".join(page.text).split())


def logits(directory, seed=0):
    model = models.open_model(directory, "policy")
    tokens = jax.random.randint(jax.random.key(seed), (2, 9), 0, 14)
    language = decoder(model.config)
    return language.logits(model.params, language.hidden(model.params, tokens, tokens >= 0))


def test_the_stages_build_on_each_other(learned):
    first, second = learned
    results = json.loads((first / "results.json").read_text())
    assert results["after"]["loss"] < 0.8 * results["before"]["loss"]
    assert "On held-out texts" in told(first)
    verdict = json.loads((second / "results.json").read_text())
    assert verdict["reward"]["accuracy"] > 0.9
    assert verdict["reward"]["low"] < verdict["reward"]["accuracy"] <= verdict["reward"]["high"]
    assert "length of the completion" in told(second)
    for folder, kind in ((first, "policy"), (second, "reward")):
        assert (folder / kind / "tokenizer_config.json").exists()
        assert (folder / "metrics.jsonl").read_text().count("\n") >= 12
        assert json.loads((folder / "config.json").read_text())["steps"] == 12


def test_transformers_reads_every_stage(learned):
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    first, second = learned
    tokens = np.random.default_rng(0).integers(3, 14, (2, 9))
    with torch.no_grad():
        theirs = transformers.AutoModelForCausalLM.from_pretrained(first / "policy")(torch.tensor(tokens)).logits
        scores = transformers.AutoModelForSequenceClassification.from_pretrained(second / "reward")(
            torch.tensor(tokens)
        )
    model = models.open_model(first, "policy")
    language = decoder(model.config)
    ours = language.logits(model.params, language.hidden(model.params, tokens, tokens >= 0))
    np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-4)
    rewards = models.open_model(second, "reward")
    found = reward_model(decoder(rewards.config)).score(rewards.params, tokens, tokens >= 0)
    np.testing.assert_allclose(found, scores.logits[:, 0].numpy(), atol=1e-4)
    tokenizer = transformers.AutoTokenizer.from_pretrained(first / "policy")
    assert tokenizer("good day", add_special_tokens=False)["input_ids"] == [3, 5]


ALIGN = {"steps": 6, "batch_size": 4, "pairs": 2, "max_new_tokens": 6, "max_prompt": 16, "evaluations": 1}


@pytest.fixture(scope="module")
def aligned(world, learned):
    """Runs of all weights judged by a function, and of adapters judged by the reward model."""
    first, second = learned
    shared = {"policy": first, "data": str(world / "pairs.jsonl"), "held_out": 0.25, "evaluation_answers": 8}
    shared |= {
        "policy_learning_rate": 1e-2,
        "warmup": 1,
        "data_dir": world / "prepared",
        "output": world / "runs",
    } | ALIGN
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(world))
        half = {"dtype": "bfloat16", "lora_rank": 2, "rollout_dtype": "bfloat16", "microbatches": 2, "keep_best": 1}
        return {
            "whole": align.main(align.Align(score="judges:score", reward=second, **shared)),
            "adapters": align.main(align.Align(annotator=str(second), **half, **shared)),
        }


@pytest.mark.parametrize("kind", ["whole", "adapters"])
def test_alignment_moves_the_policy_and_reports(learned, aligned, kind):
    first, second = learned
    folder = aligned[kind]
    assert float(np.max(np.abs(logits(folder) - logits(first)))) > 1e-3
    results = json.loads((folder / "results.json").read_text())
    assert results["labels"] == 6 * 4 * 2
    assert 0 <= results["aligned"]["win_rate"] <= 1
    assert results["reference"]["kl"] == pytest.approx(0.0, abs=1e-5)
    assert "Answers to held-out prompts" in told(folder)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "upper_loss" in row] == [1, 2, 3, 4, 5, 6]
    # Nothing has moved in the first step, whatever precision the weights are in.
    assert rows[0]["kl"] == pytest.approx(0.0, abs=1e-5)
    assert models.open_model(folder, "reward").config == models.open_model(second, "reward").config
    # The only evaluated step is the last one.
    assert (folder / "best").is_dir() == (kind == "adapters")
    if kind == "adapters":
        np.testing.assert_array_equal(logits(folder / "best"), logits(folder))


def test_policies_and_rewards_are_evaluated(here, learned, aligned):
    first, second = learned
    shared = {"data": "pairs.jsonl", "held_out": 0.25}
    judge = {"annotator": "judges:prefers_sun", "prompts": 8, "max_new_tokens": 6}
    folder = evaluate.main(evaluate.Evaluate(policy=aligned["whole"], reference=first, **judge, **shared))
    results = json.loads((folder / "results.json").read_text())
    assert results["kl"] != 0
    assert "win rate against the reference" in told(folder)
    pairs = evaluate.main(evaluate.Evaluate(reward=second, split="test", **shared))
    kept = json.loads((second / "results.json").read_text())["reward"]
    again = json.loads((pairs / "results.json").read_text())["reward"]
    assert again["pairs"] == kept["pairs"]
    assert again["log_loss"] == pytest.approx(kept["log_loss"], rel=1e-4)


def test_a_reward_goes_on_from_a_reward_and_starts_from_a_policy(learned, aligned):
    first, second = learned
    fresh, again = models.open_reward(first), models.open_reward(second)
    assert not np.any(fresh.params["head"])
    assert np.any(again.params["head"])
    jax.tree.map(np.testing.assert_array_equal, models.open_reward(second / "reward").params, again.params)
    # Of a run that left both.
    assert np.any(models.open_reward(aligned["whole"]).params["head"])


def test_samples_repeat_and_begin_with_their_prompt(here, learned, capsys):
    first, _ = learned
    settings = sample.Sample(policy=first, prompt="good day ?", max_new_tokens=5, number=3, seed=4)
    one, other = sample.main(settings), sample.main(settings)
    assert one == other
    assert len(set(one)) > 1
    printed = capsys.readouterr().out
    assert printed.count("good day ?") == 6
    greedy = sample.main(dataclasses.replace(settings, temperature=0.0, number=2))
    assert greedy[0] == greedy[1]
    # Nothing but the beginning of a text.
    assert len(sample.main(dataclasses.replace(settings, prompt="", number=1))) == 1


def test_the_real_model_writes_its_text(capsys):
    stories = pathlib.Path(__file__).resolve().parents[2] / "shared" / "models" / "stories260K"
    if not stories.is_dir():
        pytest.skip(f"the pretrained model is missing: {stories} does not exist")
    # An empty prompt is the beginning of a text alone.
    run(sample.Sample(policy=stories, prompt="", temperature=0.0, max_new_tokens=256))
    expected = (
        "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she"
    )
    written = capsys.readouterr().out
    assert written.startswith(expected)
    assert written.endswith("Don't worry, Lily. We can help you.\n")


def test_nothing_of_another_model_is_left_in_an_export(learned, tmp_path):
    first, second = learned
    stale = {"bos_token_id": 5, "eos_token_id": 7, "pad_token_id": 9}
    for kind, source in (("policy", first), ("reward", second)):
        target = tmp_path / kind
        target.mkdir()
        (target / "chat_template.jinja").write_text("old")
        (target / "generation_config.json").write_text(json.dumps(stale))
        export.main(export.Export(source=source, to=target, kind=kind))
        words = models.open_words(target)
        assert words.template is None
        assert (words.special.bos, words.special.eos) == (0, (1,))


def test_a_reward_model_pads_with_what_no_text_ends_with(learned, tmp_path):
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    model = models.open_model(learned[1], "reward")
    words = model.words._replace(special=SpecialIds(0, (1,), 1))
    models.save_model(tmp_path, model._replace(words=words), "reward")
    tokens = np.array([[0, 3, 5, 6, 1]])
    with torch.no_grad():
        theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)(torch.tensor(tokens)).logits
    ours = reward_model(decoder(model.config)).score(model.params, tokens, tokens >= 0)
    np.testing.assert_allclose(ours, theirs[:, 0].numpy(), atol=1e-4)


def test_texts_begin_as_the_tokenizer_says(world, tmp_path):
    shutil.copytree(world / "base", tmp_path / "plain")
    settings = {"bos_token": None, "eos_token": "</s>", "add_bos_token": False}
    (tmp_path / "plain" / "tokenizer_config.json").write_text(json.dumps(settings))
    encoded = [
        encode_prompt(models.open_words(place).codec(), "good day") for place in (world / "base", tmp_path / "plain")
    ]
    assert [tokens.tolist() for tokens in encoded] == [[0, 3, 5], [3, 5]]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_export_is_the_model_again(here, learned, tmp_path, dtype):
    first, second = learned
    for kind, source in (("policy", first), ("reward", second)):
        export.main(export.Export(source=source, to=tmp_path / kind, kind=kind, dtype=dtype))
        one, other = (models.open_model(place, kind).params for place in (source, tmp_path / kind))
        rounded = jax.tree.map(lambda leaf: leaf.astype(dtype).astype("float32"), one)
        jax.tree.map(np.testing.assert_array_equal, rounded, other)
    with pytest.raises(ValueError, match="is a file; name a directory"):
        export.main(export.Export(source=first, to=here / "pairs.jsonl"))
    with pytest.raises(ValueError, match="is the source itself"):
        export.main(export.Export(source=first, to=first / "policy"))


def test_adapters_learn_in_every_stage(here, learned):
    first, _ = learned
    shared = {"data": "pairs.jsonl", "held_out": 0.25, "steps": 8, "batch_size": 8, "lora_rank": 2}
    kept = {"keep_best": 1, "evaluations": 8}
    tuned = supervised.main(
        supervised.Supervised(
            policy=first,
            packed=False,
            microbatches=2,
            learning_rate=1.0,
            max_length=24,
            dtype="bfloat16",
            **kept,
            **shared,
        )
    )
    # It goes wrong at such a rate, and what it was at its best is there.
    rows = [json.loads(line) for line in (tuned / "metrics.jsonl").read_text().splitlines()]
    losses = {row["step"]: row["held_out_loss"] for row in rows if "held_out_loss" in row}
    best = min(losses, key=losses.__getitem__)
    assert best < 8 and f"The best on held-out data was step {best};" in told(tuned)
    assert float(np.max(np.abs(logits(tuned / "best") - logits(tuned)))) > 1e-2
    tuned, shared = tuned / "best", shared | {"evaluations": 1}
    pytest.importorskip("tensorboardX")
    settings = {"learning_rate": 3e-2, "max_length": 24, "ties": 0.1, "track": "tensorboard"}
    judged = reward.main(reward.Reward(policy=first, **settings, **shared))
    assert list((judged / "tensorboard").iterdir())
    assert json.loads((judged / "results.json").read_text())["reward"]["accuracy"] > 0.8


WRONG = {
    "no-model": (lambda: sample.Sample(policy=pathlib.Path("none")), "none holds no policy model: give a Hugging Face"),
    "two-judges": (
        lambda: align.Align(policy=pathlib.Path("base"), data="pairs.jsonl", score="a:b", annotator="c:d"),
        "Give --annotator or --score, one of the two",
    ),
    "no-function": (
        lambda: align.Align(policy=pathlib.Path("base"), data="pairs.jsonl", score="judges:scores"),
        "The module judges has no function scores",
    ),
    "no-module": (
        lambda: align.Align(policy=pathlib.Path("base"), data="pairs.jsonl", score="judge:score"),
        "There is no module judge here or among the installed ones",
    ),
    "too-few": (
        lambda: align.Align(policy=pathlib.Path("base"), data="pairs.jsonl", score="judges:too_few", **ALIGN),
        r"judges:too_few gave \(1,\) numbers for 6[0-9] texts",
    ),
    "no-label": (
        lambda: align.Align(policy=pathlib.Path("base"), data="pairs.jsonl", annotator="judges:rude", **ALIGN),
        "judges:rude answered 7; a label is 1, 0, 1/2 or None",
    ),
    "signs": (
        lambda: align.Align(policy=pathlib.Path("base"), data="pairs.jsonl", annotator="judges:signs", **ALIGN),
        "judges:signs answered -1; a label is 1, 0, 1/2 or None",
    ),
    "silent": (
        lambda: align.Align(policy=pathlib.Path("base"), data="pairs.jsonl", annotator="judges:silent", **ALIGN),
        "judges:silent did not give a list of numbers",
    ),
    "no-reward": (
        lambda: align.Align(
            policy=pathlib.Path("base"), reward=pathlib.Path("base"), data="pairs.jsonl", score="judges:score"
        ),
        "a reward model is wanted here",
    ),
    "empty-batch": (
        lambda: supervised.Supervised(data="pairs.jsonl", policy=pathlib.Path("base"), batch_size=0),
        "--microbatches 1 must divide --batch-size 0",
    ),
    "half-precision": (
        lambda: align.Align(policy=pathlib.Path("base"), data="pairs.jsonl", score="judges:score", dtype="bfloat16"),
        "Weights in bfloat16 cannot be trained whole.* give --lora-rank",
    ),
    "no-data": (lambda: reward.Reward(policy=pathlib.Path("base"), data="none.jsonl"), "no file or folder none.jsonl"),
    "no-start": (
        lambda: supervised.Supervised(data="pairs.jsonl"),
        "Give --policy to start from a model, or --tokenizer",
    ),
    "no-room": (
        lambda: align.Align(policy=pathlib.Path("base"), data="pairs.jsonl", score="judges:score", max_new_tokens=48),
        "leaves no room for a prompt: the model's context is 48",
    ),
    "nothing": (lambda: evaluate.Evaluate(data="pairs.jsonl"), "Give --policy with --reference, or --reward"),
    "diverged": (
        lambda: supervised.Supervised(
            data="pairs.jsonl",
            policy=pathlib.Path("base"),
            steps=9,
            learning_rate=1e30,
            batch_size=8,
            max_length=24,
            patience=2,
        ),
        r"2 steps in a row up to step . were not finite \(.*nan.*\) and were left out; lower the learning rates",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_done_is_one_sentence(here, capsys, case):
    config, message = WRONG[case]
    with pytest.raises((ValueError, DataError), match=message):
        dict(COMMANDS.values())[type(config())](config())
    with pytest.raises(SystemExit) as caught:
        run(config())
    assert caught.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


ALIGNMENT = ["--score", "judges:score", "--max-new-tokens", "8"]


@pytest.mark.parametrize("script", ["stage_1_sft", "stage_2_reward", "stage_3_align"])
def test_the_stages_are_scripts_too(here, monkeypatch, capsys, script):
    arguments = ["--policy", "base", "--data", "none.jsonl", *(ALIGNMENT if "3" in script else [])]
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(EXPERIMENTS / f"{script}.py"), run_name="__main__")
    assert caught.value.code == 2
    assert "There is no file or folder none.jsonl" in capsys.readouterr().err


@pytest.mark.slow
def test_rewards_from_human_preferences_from_end_to_end(here, capsys):
    lines = [
        {side: f"\n\nHuman: the day {number} ?\n\nAssistant: the {word} ." for side, word in sides}
        for number in range(40)
        for sides in [(("chosen", "sun"), ("rejected", "rain"))]
    ]
    (here / "hh.jsonl").write_text("\n".join(map(json.dumps, [*lines[:20], {"chosen": 3}, *lines[20:]])) + "\n")
    study = runpy.run_path(str(EXPERIMENTS / "hh_rlhf.py"))
    settings = {"width": 8, "layers": 1, "heads": 2, "max_length": 24, "batch_size": 8, "epochs": 1.0}
    with pytest.raises(DataError, match=r"hh\.jsonl, line 21: .*skip such lines with --skip-bad"):
        study["main"](study["Config"](data="hh.jsonl", policy=pathlib.Path("base"), **settings))
    config = study["Config"](data="hh.jsonl", policy=pathlib.Path("base"), skip_bad=True, **settings)
    folder = study["main"](config)
    assert {"pretrained", "from scratch"} <= json.loads((folder / "results.json").read_text()).keys()
    assert "reward, from scratch, seed 0" in told(folder)
    assert "Skipped hh.jsonl, line 21" in told(next(folder.glob("reward-*")))


def test_norms_and_biases_do_not_decay():
    layers = {
        "mlp_norm": {"scale": jnp.ones((3, 4))},
        "gate_up": {"weight": jnp.ones((3, 4, 2, 5)), "bias": jnp.ones((3, 2, 5))},
    }
    params = {"layers": layers, "embedding": jnp.ones((7, 4)), "head": jnp.ones(4)}
    optimizer = stage.adamw(supervised.Supervised(data="", weight_decay=0.5, warmup=0.0), 10)
    move, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    moved = jax.tree.map(lambda leaf: bool(jnp.any(leaf != 0)), move)
    assert moved["layers"] == {"mlp_norm": {"scale": False}, "gate_up": {"weight": True, "bias": False}}
    assert moved["embedding"] and not moved["head"]


def test_the_command_is_installed_and_says_what_it_can_do():
    command = pathlib.Path(sys.executable).with_name("jaxrlhf")
    shown = subprocess.run([command, "--help"], capture_output=True, text=True, timeout=120, check=True).stdout
    for name in ("sft", "reward", "align", "evaluate", "sample", "export"):
        assert name in shown


def test_functions_are_found_by_name_only():
    assert load_function("math:sqrt")(4) == 2
    for name in ("math", "math:", ":sqrt", ""):
        with pytest.raises(ValueError, match="names no function; write module:function"):
            load_function(name)
