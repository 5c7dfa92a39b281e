"""`jaxrlhf align --rewards`: weights of users' scores are learned, reported, resumed; what cannot be used is refused."""

import json

import numpy as np
import pytest

from jaxrlhf.annotation.functions import optional_scores, score_function
from jaxrlhf.commands import align, models
from jaxrlhf.training.run_folder import RunFolder

SCORES = """
CALLS = []


def suns(completions, **further):
    CALLS.append(sorted(further))
    return [text.split().count("sun") for text in completions]


def rains(prompts, completions):
    return [100.0 * text.split().count("rain") for text in completions]


def nothing(prompts, completions):
    return [7.0] * len(completions)


def sometimes(prompts, completions):
    return [None if "good" in text else float("bad" in text) for text in completions]


def by_place(texts, answers):
    return [float(len(answer)) for answer in answers]


def with_reference(completions, reference):
    return [0.0 for _ in completions]


def with_default(completions, reference=3.0):
    return [reference for _ in completions]


def by_keyword(*, completions, prompts):
    return [float(len(text)) for text in prompts]


def infinite(prompts, completions):
    return [float("inf")] * len(completions)
"""
REWARDS = ("scores:suns", "scores:rains", "scores:nothing", "scores:sometimes")


@pytest.fixture
def scores(here):
    (here / "scores.py").write_text(SCORES)


def settings(here, **others):
    shared = {"data": "pairs.jsonl", "policy": here / "base", "held_out": 0.25, "steps": 12, "rewards": REWARDS}
    shared |= {"batch_size": 4, "pairs": 4, "max_new_tokens": 6, "evaluations": 1, "evaluation_answers": 16}
    shared |= {"estimator": "boltzmann", "lora_rank": 2, "warmup": 0, "weights_learning_rate": 0.05}
    shared |= {"score": "annotators:score"} if "annotator" not in others else {}
    return align.Align(**shared | {"data_dir": here / "prepared", "output": here / "mixed"} | others)


def metrics(folder):
    return [row for row in RunFolder.followed(folder).metrics() if "upper_loss" in row]


def test_weights_are_learned_in_the_scores_own_units_and_reported(here, scores, trained, report_text):
    folder = align.main(settings(here))
    learned = json.loads((folder / "mixture.json").read_text())["rewards"]
    assert tuple(learned) == REWARDS
    suns, rains, nothing, sometimes = learned.values()
    # Labels prefer sun to rain, whatever the scores' own size.
    assert suns["weight"] > 0.1 and rains["weight"] < -0.1 and nothing["weight"] == 0.0
    assert np.isclose(rains["weight_per_point"] * rains["standard_deviation"], rains["weight"])
    assert rains["standard_deviation"] > 10 and (nothing["mean"], nothing["standard_deviation"]) == (7.0, 1.0)
    assert 0 <= sometimes["mean"] <= 1 and nothing["marginal_gain"] == 0.0
    rows = metrics(folder)
    assert len(rows) == 12 and rows[0]["weight/scores:suns"] == 0.0 < rows[-1]["weight/scores:suns"]
    assert all(np.isfinite(row[f"gain/{name}"]) for row in rows for name in REWARDS)
    text = report_text(folder)
    assert "weight per standard deviation" in text and "scores:rains" in text and "mixture.json" in text
    assert (folder / "policy").is_dir() and not (folder / "reward").exists()


@pytest.mark.slow
def test_a_resumed_run_goes_on_with_the_same_units_scores_and_weights(here, scores, trained):
    options = {"resume": True, "steps": 4, "learn_scale": True}
    whole = align.main(settings(here, run="whole", **options))
    align.main(settings(here, run="parted", **options | {"steps": 2}))
    parted = align.main(settings(here, run="parted", **options))
    assert [row["weight/scores:suns"] for row in metrics(whole)] == [
        row["weight/scores:suns"] for row in metrics(parted)
    ]
    files = [json.loads((folder / "mixture.json").read_text()) for folder in (whole, parted)]
    assert files[0] == files[1]


def test_a_reward_model_labels_and_another_is_mixed_in(here, scores, trained, capsys):
    """The traced annotator runs between the halves; the network of the mixture is saved as a reward model."""
    policy, reward = trained
    config = settings(
        here,
        annotator=str(reward),
        annotator_timeout=60.0,
        rewards=("scores:suns",),
        reward_network=True,
        reward=reward,
        steps=2,
        policy=policy,
    )
    folder = align.main(config)
    before, after = (models.open_model(each, "reward").params for each in (reward, folder))
    assert 0 < np.abs(after["head"] - before["head"]).max() < 0.1
    assert "a mixture of scores:suns and the reward model" in " ".join(capsys.readouterr().out.split())
    assert len(metrics(folder)) == 2 and "weight/scores:suns" in metrics(folder)[-1]


def test_given_weights_may_stay(here, scores, trained):
    folder = align.main(
        settings(
            here,
            rewards=("scores:suns", "scores:rains"),
            reward_weights=(0.5, -0.25),
            weights_learning_rate=0.0,
            steps=2,
        )
    )
    learned = json.loads((folder / "mixture.json").read_text())["rewards"]
    assert [each["weight"] for each in learned.values()] == [0.5, -0.25]


@pytest.mark.parametrize(
    "others, message",
    [
        ({"rewards": (), "reward_weights": (1.0,)}, r"--reward-weights.* without --rewards"),
        ({"rewards": ("scores:suns", "scores:suns")}, "names a function twice"),
        ({"reward_weights": (1.0,)}, "gives 1 weights for 4 --rewards"),
        ({"reward_weights": (1.0, float("nan"), 0.0, 0.0)}, "must be finite"),
        ({"weights_learning_rate": 0.0}, "the reward stays 0"),
        ({"weights_learning_rate": -1.0}, "--weights-learning-rate must not be negative"),
        ({"reward_learning_rate": 0.1}, "--reward-learning-rate does not apply with --rewards, unless"),
        ({"rewards": ("scores:missing",)}, "has no function missing"),
        ({"rewards": ("scores:with_reference",)}, "needs reference; a score is a function of prompts and completions"),
        ({"rewards": ("scores:infinite",)}, "scores that are infinite"),
        ({"rewards": ("annotators:silent",)}, "annotators:silent failed with TypeError"),
    ],
)
def test_what_cannot_be_mixed_is_refused(here, scores, trained, others, message):
    with pytest.raises(ValueError, match=message):
        align.main(settings(here, **others))


@pytest.mark.parametrize(
    "name, expected",
    [
        ("suns", [1.0, 0.0]),
        ("rains", [0.0, 100.0]),
        ("sometimes", [np.nan, 1.0]),
        ("by_place", [8.0, 8.0]),
        ("with_default", [3.0, 3.0]),
        ("by_keyword", [1.0, 2.0]),
    ],
)
def test_functions_are_called_as_they_are_written(here, scores, name, expected):
    given = score_function(f"scores:{name}")(["a", "ab"], ["sun good", "rain bad"])
    np.testing.assert_array_equal(optional_scores(given, 2, name), expected)
    if name == "suns":
        import scores as module

        assert module.CALLS[-1] == ["prompts"]


@pytest.mark.parametrize("values, message", [([1.0], "for 2 texts"), (["a", "b"], "list of numbers"), (None, "list")])
def test_scores_that_are_none_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        optional_scores(values, 2, "scores:x")
