"""`online_rlhf.py` as a command: what it writes, what it refuses, and its reproducibility."""

import dataclasses
import importlib.util
import json
import math
import pathlib
import sys

import jax
import pytest
import tokenizers

from jaxrlhf.lm.hugging_face.weights import SpecialIds, save_decoder
from jaxrlhf.lm.transformer.model import DecoderConfig, decoder

ROOT = pathlib.Path(__file__).resolve().parents[2]
STORIES = ROOT.parent / "shared" / "models" / "stories260K"
KEYS = {"true_return", "win_rate", "kl", "upper_loss", "gap", "labels"}


def load(name):
    sys.path.insert(0, str(ROOT / "experiments"))
    try:
        spec = importlib.util.spec_from_file_location(name, ROOT / "experiments" / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.pop(0)


online_rlhf = load("online_rlhf")


def run(output, **options):
    """Runs once; returns the run's folder and results."""
    online_rlhf.main(online_rlhf.Config(output=output, **options))
    (folder,) = output.iterdir()
    return folder, json.loads((folder / "results.json").read_text())


def words():
    vocabulary = {"<s>": 0, "</s>": 1, "happy": 2, "sad": 3, "<unk>": 4, "fun": 5, "lost": 6}
    model = tokenizers.models.WordLevel(vocabulary, unk_token="<unk>")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return tokenizer


@pytest.fixture(scope="module")
def model_directory(tmp_path_factory):
    """A tiny random Llama directory, with a tokenizer of seven words."""
    directory = tmp_path_factory.mktemp("model")
    shape = DecoderConfig(7, 16, 1, 2, 1, 8, 16, context_length=64)
    params = decoder(shape).init(jax.random.key(0))
    save_decoder(directory, shape, params, special=SpecialIds(bos=0, eos=(1,)), tokenizer=words())
    return directory


def check_folder(folder, results, methods, steps):
    assert set(results["methods"]) == set(methods)
    for measured in results["methods"].values():
        assert set(measured) >= KEYS
        assert all(math.isfinite(measured[key]) for key in KEYS)
        assert measured["gap"] >= 0
        assert 0 < measured["win_rate"] < 1
    assert {"seconds", "seed", "config"} <= set(results)
    for name in ("curves.png", "return.png", "kl.png", "gap.png", "gold_reward_against_kl.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for method in methods:
        assert [row["step"] for row in rows if row["method"] == method and row["kind"] == "step"] == [
            *range(1, steps + 1)
        ]
    assert json.loads((folder / "config.json").read_text())["steps"] == steps
    assert (folder / "samples.txt").read_text().count("## ") == 1 + len(methods)
    assert "Completions" in (folder / "report.html").read_text()


def make_small(patch):
    """Makes the enumerable language small: an evaluation compares all pairs of completions, 2,801 squared by default."""
    patch.setattr(sys.modules["online_rlhf_tasks"], "MAX_LETTERS", 2)
    patch.setattr(sys.modules["online_rlhf_tasks"], "LAYERS", 1)


@pytest.fixture(scope="module")
def short_run(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        make_small(patch)
        return run(tmp_path_factory.mktemp("runs"), task="letters", steps=3, pairs=2, evaluations=1)


@pytest.mark.slow
def test_a_run_on_letters_writes_its_folder(short_run, capsys):
    folder, results = short_run
    check_folder(folder, results, ("bilevel", "boltzmann", "decoupled"), 3)
    assert {measured["labels"] for measured in results["methods"].values()} == {3 * 4 * 2}
    assert results["config"]["tangent_learning_rate"] is not None


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bits(short_run, tmp_path, monkeypatch):
    _, results = short_run
    make_small(monkeypatch)
    # Evaluations do not affect training: with more of them the run is the same.
    _, again = run(tmp_path, task="letters", steps=3, pairs=2, evaluations=2, methods=("bilevel",))
    assert again["methods"]["bilevel"] == results["methods"]["bilevel"] | {"gap": again["methods"]["bilevel"]["gap"]}
    options = {"task": "letters", "steps": 3, "pairs": 2, "evaluations": 1, "methods": ("bilevel",)}
    _, other = run(tmp_path / "other", seed=1, **options)
    assert other["methods"]["bilevel"] != again["methods"]["bilevel"]


@pytest.mark.slow
def test_a_model_directory_runs_the_same_way(model_directory, tmp_path):
    options = {"steps": 2, "batch": 2, "pairs": 2, "max_new_tokens": 4, "evaluations": 2}
    folder, results = run(tmp_path, policy=model_directory, methods=("bilevel",), **options)
    check_folder(folder, results, ("bilevel",), 2)
    assert results["methods"]["bilevel"]["labels"] == 2 * 2 * 2


def test_the_story_score_worked_out_by_hand():
    score = load("stories").story_score
    assert score("She was happy. Happy! They played and laughed.") == 2.0 * 3
    assert score("He was sad and he cried, but the dog was kind.") == 2.0 * (1 - 2)
    assert score("Funny meaning, nicest badge.") == 0.0


def refuse(capsys, **options):
    with pytest.raises(SystemExit) as stopped:
        online_rlhf.main(online_rlhf.Config(**options))
    assert stopped.value.code == 2
    message = capsys.readouterr().err.strip()
    assert message.startswith("online_rlhf: ")
    assert "\n" not in message
    return message


LETTERS = {"task": "letters"}


@pytest.mark.parametrize(
    "options, words",
    [
        (LETTERS | {"relative_sigma": 0.0}, "relative_sigma must be positive"),
        (LETTERS | {"relative_sigma": -0.1}, "relative_sigma must be positive"),
        (LETTERS | {"relative_sigma": 50.0}, "relative_sigma 50 is too large"),
        (LETTERS | {"beta": 0.0}, "beta must be positive"),
        (LETTERS | {"beta": -1.0}, "must be positive"),
        (LETTERS | {"methods": ("bilevel", "ppo")}, "no method 'ppo' in this task; choose from bilevel, boltzmann"),
        (LETTERS | {"batch": 3}, "leave out --batch"),
        (
            LETTERS | {"kl_price": 0.1},
            "--kl-price has no meaning in the task letters: it needs the default task, replies",
        ),
        (LETTERS | {"seeds": 3}, "--seeds has no meaning in the task letters"),
        (LETTERS | {"policy": pathlib.Path("absent")}, "--policy and --task letters exclude each other"),
        ({"policy": pathlib.Path("absent"), "betas": (1.0,)}, "--betas has no meaning with --policy"),
        ({"beta": 0.3}, "--beta has no meaning in the task replies: it needs --task letters or --policy DIR"),
        ({"relative_sigma": 0.2}, "--relative-sigma has no meaning in the task replies"),
        ({"batch": 4}, "--batch has no meaning in the task replies"),
        (
            {"methods": ("boltzmann",)},
            "no method 'boltzmann' in this task; choose from bilevel, decoupled, fixed_scale",
        ),
        ({"methods": ()}, "--methods needs at least one"),
        ({"methods": ("bilevel", "bilevel")}, "--methods names one of them twice"),
        ({"betas": ()}, "--betas needs at least one"),
        ({"betas": (0.5, 0.5)}, "--betas names one of them twice"),
        ({"betas": (0.5, -1.0)}, "beta must be positive, got -1"),
        ({"betas": (float("nan"),)}, "beta must be positive"),
        ({"kl_price": 0.0}, "--kl-price must be positive"),
        ({"kl_price": float("inf")}, "--kl-price must be positive"),
        ({"seeds": 0}, "--seeds must be at least 1"),
        ({"steps": 0}, "--steps must be at least 1"),
        ({"pairs": 1}, "at least 2 pairs"),
        ({"utility_weight": -1.0}, "--utility-weight must be"),
        ({"utility_weight": float("nan")}, "--utility-weight must be"),
        ({"reward_learning_rate": -1.0}, "--reward-learning-rate must be"),
        ({"scale_learning_rate": float("inf")}, "--scale-learning-rate must be"),
    ],
)
def test_bad_values_get_one_sentence_and_write_nothing(options, words, capsys, tmp_path):
    assert words in refuse(capsys, output=tmp_path / "runs", **options)
    assert not (tmp_path / "runs").exists()


def test_bad_directories_get_one_sentence(model_directory, capsys, tmp_path):
    options = {"output": tmp_path / "runs", "steps": 1}
    assert "absent is not a directory" in refuse(capsys, policy=tmp_path / "absent", **options)

    def copy(name):
        directory = tmp_path / name
        directory.mkdir()
        for path in model_directory.iterdir():
            (directory / path.name).write_bytes(path.read_bytes())
        return directory

    corrupt = copy("corrupt")
    weights = corrupt / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "cut short" in refuse(capsys, policy=corrupt, **options)
    larger = copy("larger")
    tokenizer = words()
    tokenizer.add_tokens(["extra", "words"])
    tokenizer.save(str(larger / "tokenizer.json"))
    assert "tokenizer" in refuse(capsys, policy=larger, **options)
    (tmp_path / "file").write_text("")
    for task in ("replies", "letters"):
        assert "give --output" in refuse(capsys, output=tmp_path / "file", steps=1, task=task)
    assert "context" in refuse(capsys, policy=model_directory, max_new_tokens=100, **options)
    assert not (tmp_path / "runs").exists()


def test_a_batch_that_does_not_divide_over_the_devices(model_directory, capsys, monkeypatch, tmp_path):
    class FourDevices:
        shape = {"data": 4, "fsdp": 1}  # noqa: RUF012

    monkeypatch.setattr(sys.modules["online_rlhf_networks"], "data_mesh", lambda devices=None: FourDevices)
    message = refuse(capsys, policy=model_directory, batch=6, output=tmp_path / "runs")
    assert "does not divide over 4 devices" in message


def test_every_option_belongs_to_a_task_and_is_in_its_resolved_configuration():
    options = {field.name for field in dataclasses.fields(online_rlhf.Config)} - {"task", "policy", "output"}
    tasks = ({}, {"task": "letters"}, {"policy": pathlib.Path("model")})
    resolved = [vars(online_rlhf.resolved(online_rlhf.Config(**task))) for task in tasks]
    assert options == {name for values in resolved for name in values} - {"policy", "output"}
    assert all(value is not None for values in resolved for name, value in values.items() if name != "policy")


@pytest.mark.slow
@pytest.mark.skipif(not STORIES.is_dir(), reason=f"the pretrained model {STORIES.name} is missing beside the clone")
def test_a_pretrained_model_gains_1_5_standard_deviations_within_6_nats(tmp_path):
    """Ten minutes on 2 cores."""
    _, results = run(tmp_path, policy=STORIES, methods=("bilevel",))
    measured = results["methods"]["bilevel"]
    assert measured["gain_in_spreads"] >= 1.5
    assert measured["kl"] <= 6
