"""The best of several completions: its KL, which is chosen, and policies in one table."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from scipy.integrate import quad

from jaxrlhf.commands import best_of, evaluate, models, sample
from jaxrlhf.commands.comparison import Comparer
from jaxrlhf.commands.main import run
from jaxrlhf.lm.generate import Completions
from jaxrlhf.lm.pairing import Prompts

BASE = pathlib.Path("base")
P = pathlib.Path


@pytest.mark.parametrize("number", [2, 4, 64])
def test_the_kl_is_that_of_the_largest_of_n_uniform_numbers(number):
    def integrand(u):
        density = number * u ** (number - 1)
        return density * np.log(density) if density > 0 else 0.0

    assert best_of.best_of_kl(number) == pytest.approx(quad(integrand, 0, 1)[0], abs=1e-6)


def test_the_best_of_the_first_n_is_chosen_from_one_pool():
    rewards, drawn = np.random.default_rng(0).normal(size=(8, 3)), []

    def complete(params, reference, key, rows):
        number = len(drawn)
        drawn.append(key)
        tokens = np.stack([np.full(2, 10 * number + row) for row in range(3)])
        return Completions(tokens, tokens >= 0, np.zeros((3, 2))), np.zeros(3)

    def score(rows, completions):
        return rewards[completions.tokens[:, 0] // 10, completions.tokens[:, 0] % 10]

    rows = Prompts(np.zeros((3, 1), np.int32), np.ones((3, 1), bool))
    responders = best_of.best_of_responders(Comparer(None, complete), (), score, (2, 8))
    for number, respond in responders.items():
        completions, log_ratio = respond(0, jax.random.key(0), rows)
        chosen = rewards[:number].argmax(axis=0)
        np.testing.assert_array_equal(completions.tokens[:, 0], 10 * chosen + np.arange(3))
        np.testing.assert_allclose(log_ratio, np.log(number) - (number - 1) / number)
    # Eight in all, each with randomness of its own.
    assert len(drawn) == 8 and len({tuple(jax.random.key_data(key).tolist()) for key in drawn}) == 8


SHARED = {"data": "pairs.jsonl", "score": "annotators:score", "prompts": 4, "max_new_tokens": 6}


def test_policies_and_the_best_of_n_stand_in_one_table(here, trained, report_text, capsys):
    policy, reward_run = trained
    settings = {"policy": (policy, BASE), "reference": BASE, "reward": reward_run, "best_of": (2, 4), "completions": 2}
    folder = evaluate.main(evaluate.Evaluate(**SHARED | settings))
    results = json.loads((folder / "results.json").read_text())
    assert list(results["policies"]) == [str(policy), "base", "best of 2 by the reward", "best of 4 by the reward"]
    first = results["policies"][str(policy)]
    assert {name: results[name] for name in first} == first  # the first policy's figures stand alone too
    for figures in results["policies"].values():
        for name in ("win_rate", "length_controlled", "kl", "length"):
            assert figures[f"{name}_low"] <= figures[name] + 1e-9 and figures[name] <= figures[f"{name}_high"] + 1e-9
    assert results["policies"]["base"]["kl"] == pytest.approx(0.0, abs=1e-4)
    assert results["policies"]["best of 4 by the reward"]["kl"] == pytest.approx(np.log(4) - 0.75)
    out = capsys.readouterr().out
    assert "40 labels" not in out and "32 labels" in out  # 4 prompts, 2 completions, 4 rivals
    text = report_text(folder)
    assert "at equal length" in text and "0.636 at most" in text


@pytest.mark.slow
def test_a_policy_alone_is_compared_as_in_a_table_of_two(here, trained):
    policy, _ = trained
    figures = []
    for policies in ((policy,), (BASE, policy)):
        folder = evaluate.main(evaluate.Evaluate(**SHARED | {"policy": policies, "reference": BASE}))
        figures.append(json.loads((folder / "results.json").read_text())["policies"][str(policy)])
    assert figures[0] == figures[1]


@pytest.mark.slow
def test_another_chat_template_is_reported(here, tmp_path, report_text):
    shutil.copytree(BASE, tmp_path / "other")
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    (tmp_path / "other" / "chat_template.jinja").write_text(template)
    folder = evaluate.main(evaluate.Evaluate(**SHARED | {"policy": (BASE, tmp_path / "other"), "reference": BASE}))
    note = f"Prompts are written in the chat template of base; {tmp_path / 'other'} has another."
    assert note in report_text(folder)


def test_sampling_keeps_the_best_by_the_reward(here, trained, capsys):
    _, reward_run = trained
    shared = {"policy": BASE, "prompt": "good day ?", "max_new_tokens": 6}
    every = sample.main(sample.Sample(**shared, number=12))
    best = sample.main(sample.Sample(**shared, number=3, best_of=4, reward=reward_run))
    reward = models.open_model(reward_run, "reward")
    rows, completions = sample.generate_rows(
        models.open_model(BASE, "policy"), [np.array([0, 3, 5, 13], np.int32)] * 12, max_new_tokens=6
    )
    scores = best_of.reward_scorer(reward)(rows, completions).reshape(3, 4)
    assert best == [every[4 * row + scores[row].argmax()] for row in range(3)]
    assert f"Reward {scores[0].max():.3f}, the best of 4" in capsys.readouterr().err


COMPARE = {"data": "pairs.jsonl", "policy": (BASE,), "reference": BASE, "score": "annotators:score"}
REFUSED = {
    "no-reward": (evaluate.Evaluate(**COMPARE, best_of=(2,)), "--best-of needs --reward"),
    "one": (evaluate.Evaluate(**COMPARE, reward=BASE, best_of=(1, 2)), "numbers from 2 to 1024, got 1 2"),
    "twice": (evaluate.Evaluate(**COMPARE, reward=BASE, best_of=(2, 2)), "--best-of must be different numbers"),
    "unused": (evaluate.Evaluate(**COMPARE, reward=BASE), "one thing is evaluated at a time"),
    "same": (evaluate.Evaluate(**COMPARE | {"policy": (BASE, BASE)}), "--policy names one twice"),
    "pairs": (
        evaluate.Evaluate(data="pairs.jsonl", reward=BASE, best_of=(2,)),
        "--best-of does not apply with --reward",
    ),
    "none": (evaluate.Evaluate(**COMPARE, completions=0), "--completions must be at least 1"),
    "address": (evaluate.Evaluate(**COMPARE | {"policy": (P("gs://a"),)}), "--policy gs://a is an address"),
    "chooser": (evaluate.Evaluate(**COMPARE, reward=BASE, best_of=(2,)), "a reward model is wanted"),
    "sample": (sample.Sample(policy=BASE, best_of=4), "Give --best-of with --reward"),
    "reward-alone": (sample.Sample(policy=BASE, reward=BASE), "Give --best-of with --reward"),
    "greedy": (sample.Sample(policy=BASE, reward=BASE, best_of=4, temperature=0.0), "--temperature 0 gives the same"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_settings_are_refused_by_name(here, capsys, case):
    config, message = REFUSED[case]
    with pytest.raises(SystemExit) as caught:
        run(config)
    error = capsys.readouterr().err
    assert caught.value.code == 2
    assert error.count("\n") == 1 and message in error, error
