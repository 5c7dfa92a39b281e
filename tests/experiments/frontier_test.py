"""The frontier study: every method has the same budget, and a small study runs end to end."""

import importlib
import json
import pathlib
import sys

import jax
import numpy as np
import pytest
import tokenizers

from jaxrlhf.lm.hugging_face.weights import SpecialIds, save_decoder
from jaxrlhf.lm.pairing import Prompts
from jaxrlhf.lm.problem import LanguageFrozen
from jaxrlhf.lm.transformer.config import DecoderConfig
from jaxrlhf.lm.transformer.model import decoder

EXPERIMENTS = pathlib.Path(__file__).parents[2] / "experiments"
sys.path.insert(0, str(EXPERIMENTS))
frontier = importlib.import_module("frontier")
harness = importlib.import_module("frontier_harness")
methods = importlib.import_module("frontier_methods")
tables = importlib.import_module("frontier_tables")
tasks = importlib.import_module("frontier_tasks")
load_stories = importlib.import_module("stories").load_stories
sys.path.remove(str(EXPERIMENTS))


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A tiny random model with words that the gold reward scores."""
    folder = tmp_path_factory.mktemp("model")
    words = ("<s>", "</s>", "<unk>", "happy", "sad", "fun", "lost", "the")
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    shape = DecoderConfig(len(words), 16, 1, 2, 1, 8, 16, context_length=32)
    special = SpecialIds(bos=0, eos=(1,))
    save_decoder(folder, shape, decoder(shape).init(jax.random.key(0)), special=special, tokenizer=tokenizer)
    return folder


@pytest.fixture(scope="module")
def stories(directory):
    return load_stories(directory, max_new_tokens=5)


def config(directory, **options):
    sizes = {"seeds": 2, "steps": 2, "batch": 4, "pairs": 2, "max_new_tokens": 5, "evaluations": 2}
    return frontier.Config(
        policy=directory,
        **(sizes | {"evaluation_responses": 32, "pool": 8, "kls": (0.5,), "at": (0.01,), "workers": 1} | options),
    )


def test_every_method_proposes_the_same_responses(stories, directory):
    """Equal numbers of prompts and responses, by shapes; updates are run in `algorithms/methods_test.py` and below."""
    setup, first = frontier.setup_of(config(directory), stories, "whole")
    frozen, key = LanguageFrozen(stories.start), jax.random.key(0)
    prompts = Prompts(*(leaf[:4] for leaf in stories.openings))
    assert set(methods.RATES) == {*methods.WITHOUT_REWARD, *methods.WITH_REWARD}
    shapes = {}
    for name, rates in methods.RATES.items():
        method = methods.build(name, setup, rates)
        algorithm = method.make(rates.beta)
        upper = first(key) if method.has_reward else stories.start
        state = jax.eval_shape(algorithm.init, key, upper, stories.start)
        sample = jax.eval_shape(algorithm.propose, key, state, prompts, frozen)
        shapes[name] = sample.responses.tokens.shape
    assert set(shapes.values()) == {(4, 2, 2, 5)}


def test_prompts_come_in_one_order_for_all_and_equally_often():
    budget = harness.Budget((0,), (1.0,), 10, 8, 1)
    order = harness.prompt_order(16, budget, 3)
    np.testing.assert_array_equal(order, harness.prompt_order(16, budget, 3))
    assert not np.array_equal(order, harness.prompt_order(16, budget, 4))
    assert np.all(np.bincount(order.ravel(), minlength=16) == 5)


@pytest.mark.slow
def test_a_small_study_end_to_end(directory, tmp_path, capsys):
    names = ("offline DPO", "GRPO")
    folder = frontier.main(config(directory, methods=names, golds=("words",), rewards=("small",), output=tmp_path))
    results = json.loads((folder / "results.json").read_text())
    (setting,) = results["settings"].values()
    spent = [setting["methods"][name]["spent"] for name in names]
    for each in spent:
        assert (each["labels"], each["responses"]) == (2 * 4 * 2, 2 * 4 * 2 * 2)
    assert [each["control_tokens"] > 0 for each in spent] == [True, False]
    for name in names:
        history = setting["methods"][name]["history"]
        assert [row["step"] for row in history] == [[1, 1], [2, 2]]
        for row in history:
            assert all(np.isfinite(value) for field in ("kl", "gain", "win_rate", "beta") for value in row[field])
            assert all(0 <= value <= 1 for value in row["fresh_calibration"])
    for name in ("frontier.png", "calibration.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    text = (folder / "tables.md").read_text()
    assert "Gold gain at 0.01 nats" in text and "best of n, by gold" in text and "GRPO" in text
    assert "Spent" in (folder / "report.html").read_text()
    assert "minutes" in capsys.readouterr().out


def test_a_study_includes_the_runs_of_an_earlier_one(directory, tmp_path):
    history = [{"kl": [1.0, 2.0], "gain": [0.1, 0.2]}]
    row = {"gold": "words", "method": "GRPO", "reward": "small", "history": history, "kls": [0.5], "seconds": 3.0}
    spent = {"labels": 1, "responses": 2, "tokens": 3, "control_tokens": 0}
    (tmp_path / "config.json").write_text(json.dumps(frontier.plain(config(directory, kls=(0.5,)))))
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row | {"spent": spent}) + "\n")
    (earlier,) = frontier.earlier_of(config(directory, kls=(0.8, 0.9), extends=tmp_path)).values()
    later = [{"kl": np.arange(4.0), "gain": -np.arange(4.0)}]
    both = tables.joined(earlier["words"], tables.Runs(later, (0.8, 0.9), harness.Spent(**spent), 1.0))
    np.testing.assert_array_equal(both.field("kl")[0], [[1, 0, 1], [2, 2, 3]])
    assert both.kls == (0.5, 0.8, 0.9) and both.seconds == 4.0
    for other, message in (
        ({"steps": 3}, "its steps differ"),
        ({"extends": tmp_path / "no"}, "is no study's folder"),
        ({"methods": ("boltzmann",)}, "did not run boltzmann"),
    ):
        with pytest.raises(ValueError, match=message):
            frontier.check(config(directory, **({"extends": tmp_path} | other)))


def test_gains_between_evaluations_and_their_intervals():
    # Two seeds with two target KLs each; only the last evaluation counts.
    history = [{"kl": np.full(4, 2.25), "gain": np.full(4, 9.0)}]
    history += [{"kl": np.array([1.0, 4.0, 1.0, 2.0]), "gain": np.array([1.0, 3.0, 2.0, 3.0])}]
    found = tables.Runs(history, (1.0, 4.0), harness.Spent(1, 2, 3, 0), 1.0)
    np.testing.assert_allclose(tables.gains_at(found, 2.25), [2.0, np.nan])
    assert tables.interval(np.array([2.0, np.nan])) == "2.00 (1 of 2)"
    assert tables.interval(np.array([np.nan])) == "not reached"
    assert tables.interval(np.array([1.0, 2.0, 3.0])) == "2.00 ± 2.48"


def test_the_gold_model_scores_every_response(stories):
    """On a tiny model: the scores are scaled, and deterministic."""
    gold = tasks.model_gold(stories, tasks.fit_gold_model(stories, prompts=128, steps=2, members=2))
    some = tasks.reference_pool(stories, 4, seed=0)
    scores = gold(stories.openings, some)
    assert scores.shape == (16, 4, 1) and np.all(np.isfinite(scores))
    np.testing.assert_array_equal(scores, gold(stories.openings, some))
    assert tasks.craft_score('"Hi," he said') > tasks.craft_score("hi he said") > tasks.craft_score("hi hi hi")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": ("SFT",)}, "no method 'SFT'; choose from offline DPO"),
        ({"golds": ("money",)}, "--golds knows words and model, got 'money'"),
        ({"pairs": 1}, "a prompt needs at least 2 pairs"),
        ({"at": (9.0,)}, "--at lies within --kls"),
        ({"kls": (2.0, 1.0)}, "--kls are positive and rise"),
        ({"evaluations": 3}, "--evaluations 3 are more than the 2 steps"),
        ({"policy": pathlib.Path("nowhere")}, "nowhere"),
    ],
)
def test_invalid_settings_get_one_sentence(directory, tmp_path, capsys, options, message):
    with pytest.raises(SystemExit) as caught:
        frontier.main(config(**({"directory": directory, "output": tmp_path} | options)) if "policy" not in options else
                      config(options["policy"], output=tmp_path))  # fmt: skip
    assert caught.value.code == 2
    printed = capsys.readouterr().err
    assert message in printed and printed.count("\n") == 1
